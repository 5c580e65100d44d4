"""What formats over folded weights share: rank paths, coordinates that split along the folds, one fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from geofx.errors import PlanError
from geofx.factorizations.contract import SIZES, Factors, stored
from geofx.factorizations.folds import fold
from geofx.factorizations.refine import refine
from geofx.linalg import root_and_inverse
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis, on_left

Axes = Mapping[str, Mapping[int, int]]
"""Factor -> its axis -> the fold, counted through rows and then columns, that runs along it."""

MOST_UNEVEN = 4.0
"""Ratio of the largest to the smallest fold above which padding the rows is cheaper than the folds."""


def rank_path(
    limits: tuple[int, ...],
    size: Callable[[tuple[int, ...]], int],
    dense: int,
    clip: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda ranks: ranks,
) -> Iterator[tuple[int, ...]]:
    """Ranks that grow together towards ``limits``, about dense / `SIZES` numbers apart, all below ``dense``.

    ``clip`` takes off what a rank has beyond what its neighbours can use.
    """
    ranks, last = [1] * len(limits), -dense
    while (numbers := size(useful := clip(tuple(ranks)))) < dense:
        if numbers >= last + dense / SIZES:
            yield useful
            last = numbers
        below = [mode for mode, limit in enumerate(limits) if ranks[mode] < limit]
        if not below:
            return
        ranks[min(below, key=lambda mode: (ranks[mode] + 1) / limits[mode])] += 1


def padded_fold(size: int, parts: int) -> tuple[int, ...]:
    """The least product of ``parts`` even folds that holds ``size``: (49, 38, 27) holds 50,257 rows."""
    for padded in range(size, 2 * size + 2**parts):
        found = fold(padded, parts)
        if found is not None and found[0] <= MOST_UNEVEN * found[-1]:
            return found
    raise AssertionError("a power of two lies between any number and its double")


def require_folds(rows: tuple[int, ...], columns: tuple[int, ...], region: Region, padding: int = 0) -> None:
    """Raises PlanError unless the folds multiply out to the shape of each site, but for padded rows."""
    out, across = region.rows[0], region.shape[1]
    folds = math.prod(rows) - padding == out and math.prod(columns) == across
    if folds and padding >= 0 and min((*rows, *columns), default=1) >= 1:
        return
    raise PlanError(
        f"rows {rows} and columns {columns} do not fold a weight of {out} x {across}",
        where=region.name,
        fix="give folds whose products are the weight's sides",
    )


def along(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Mode product: ``matrix`` (p, q), or a diagonal (q,), times ``tensor`` along ``axis`` of q."""
    moved = tensor.movedim(axis, 0)
    flat = on_left(matrix, moved.reshape(moved.shape[0], -1))
    return flat.reshape(-1, *moved.shape[1:]).movedim(0, axis)


def from_left(matrix: Tensor, state: Tensor) -> Tensor:
    """``matrix`` (p, q) times ``state`` (…, q, s)."""
    return functional.linear(state.squeeze(-1), matrix) if state.shape[-1] == 1 else matrix @ state


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Folds and per fold a root of the metric and its inverse, so that ⊗ roots² is near the metric.

    A moment's part along one fold is its partial trace over the others. Structure along folds survives a
    change of coordinates along each, so a plain decomposition of the whitened tensor is a weighted one.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    roots: tuple[Tensor | None, ...]
    inverses: tuple[Tensor | None, ...]

    def move(self, matrix: Tensor, towards_whitened: bool = True) -> Tensor:
        """(sites, rows, columns) in the other coordinates."""
        tensor = matrix.reshape(-1, *self.rows, *self.columns)
        for axis, change in enumerate(self.roots if towards_whitened else self.inverses):
            tensor = tensor if change is None else along(tensor, axis + 1, change)
        return tensor.reshape(matrix.shape)

    def metric(self, metric: Metric) -> Metric:
        """The metric as it reads in whitened coordinates."""
        split = len(self.rows)
        return Metric(
            _congruent(metric.input, self.columns, self.inverses[split:]),
            _congruent(metric.output, self.rows, self.inverses[:split]),
            metric.scale,
        )

    def move_factors(self, parts: Factors, axes: Axes, towards_whitened: bool) -> dict[str, Tensor]:
        """Factors in the other coordinates."""
        moved = dict(parts)
        for name, folds in axes.items():
            for axis, mode in folds.items():
                change = (self.roots if towards_whitened else self.inverses)[mode]
                moved[name] = moved[name] if change is None else along(moved[name], axis, change)
        return moved


def _coordinates(rows: tuple[int, ...], columns: tuple[int, ...], metrics: list[Metric]) -> Coordinates:
    roots: list[Tensor | None] = []
    inverses: list[Tensor | None] = []
    for folds, moment in (
        (rows, _mean([(metric.output, metric.scale) for metric in metrics])),
        (columns, _mean([(metric.input, 1.0) for metric in metrics])),
    ):
        for mode in range(len(folds)):
            part = None if moment is None else _partial(moment, folds, mode)
            root, inverse = (None, None) if part is None else root_and_inverse(part, "moment along a fold")
            roots.append(root)
            inverses.append(inverse)
    return Coordinates(rows, columns, tuple(roots), tuple(inverses))


def _mean(moments: list[tuple[Tensor | None, float]]) -> Tensor | None:
    """The mean; None, the identity, where one is not known or all are zero."""
    known = [scale * moment.double() for moment, scale in moments if moment is not None]
    if len(known) < len(moments):
        return None
    total = sum(known[1:], known[0])
    return total / len(known) if bool(total.any()) else None


def _partial(moment: Tensor, folds: tuple[int, ...], mode: int) -> Tensor:
    """Partial trace of (n, n), or of a diagonal (n,), over all folds but one; of mean diagonal 1."""
    before, size, after = math.prod(folds[:mode]), folds[mode], math.prod(folds[mode + 1 :])
    if moment.dim() == 1:
        part = moment.reshape(before, size, after).sum((0, 2))
        return part / part.mean()
    part = torch.einsum("aibajb->ij", moment.reshape(before, size, after, before, size, after))
    return part / part.diagonal().mean()


def _congruent(
    moment: Tensor | None, folds: tuple[int, ...], inverses: tuple[Tensor | None, ...]
) -> Tensor | None:
    """M^{-T} moment M^{-1} with M the product of the folds' roots."""
    if moment is None:
        return None
    result = moment.double()
    if moment.dim() == 1:
        result = result.reshape(folds)
        for axis, change in enumerate(inverses):
            result = result if change is None else along(result, axis, change.square())
        return result.reshape(-1)
    for _ in range(2):
        result = result.T.reshape(*folds, -1)
        for axis, change in enumerate(inverses):
            result = result if change is None else along(result, axis, change)
        result = result.reshape(moment.shape)
    return result


def fit_folded(
    analysis: RegionAnalysis,
    folds: tuple[tuple[int, ...], tuple[int, ...]],
    start: Callable[[Tensor], dict[str, Tensor]],
    dense: Callable[[Factors], Tensor],
    axes: Axes,
    sweeps: int,
    steps: int,
) -> dict[str, Tensor]:
    """argmin over the factors of Σ over sites of tr(G ΔW A ΔWᵀ): the better of two starts, refined.

    Args:
        analysis: of the region; the weights of its sites have one shape.
        folds: of rows, whose product may exceed the number of rows, and of columns.
        start: best known unweighted factors of a float64 tensor (sites, *rows, *columns).
        dense: (sites, rows, columns) from factors.
        axes: which fold runs along which axis of each factor.
        sweeps: of `refine`.
        steps: of `refine`.

    Returns:
        Factors of equal largest entry, as they are stored.
    """
    rows, columns = folds
    weights = analysis.stacked
    dtype = weights.dtype
    size = float(weights.abs().max()) or 1.0
    target = _pad_rows(weights.double() / size, math.prod(rows))
    metrics = [
        _pad_metric(analysis.metrics[name], len(weights[0]), math.prod(rows)) for name in analysis.weights
    ]
    coordinates = _coordinates(rows, columns, metrics)
    moved = coordinates.move(target)
    moved_metrics = [_cast(coordinates.metric(metric), dtype) for metric in metrics]
    shape = (len(weights), *rows, *columns)
    starts = [coordinates.move_factors(start(target.reshape(shape)), axes, True)]
    if any(root is not None for root in coordinates.roots):
        starts.append(start(moved.reshape(shape)))
    goal = moved.to(dtype)
    whitened = dict(zip(analysis.weights, moved_metrics, strict=True))
    gradient = replace(analysis, metrics=whitened).stacked_gradient()

    def loss(parts: Factors) -> float:
        change = goal - dense(parts)
        return float((change * gradient(change)).sum())

    best = min(({name: part.to(dtype) for name, part in parts.items()} for parts in starts), key=loss)
    best = refine(dense, balanced(best), goal, gradient, sweeps, steps)
    best = {name: part.double() for name, part in best.items()}
    best = balanced(coordinates.move_factors(best, axes, False), size)
    return stored(best, next(iter(analysis.weights.values())))


def balanced(parts: Factors, scale: float = 1.0) -> dict[str, Tensor]:
    """Factors of a multilinear form times ``scale``, none with larger entries than another."""
    peaks = {name: float(part.abs().max()) for name, part in parts.items()}
    if not all(peaks.values()):
        return dict(parts)
    level = math.exp((math.log(scale) + sum(math.log(peak) for peak in peaks.values())) / len(peaks))
    return {name: part * (level / peaks[name]) for name, part in parts.items()}


def _cast(metric: Metric, dtype: torch.dtype) -> Metric:
    def cast(side: Tensor | None) -> Tensor | None:
        return None if side is None else side.to(dtype)

    return Metric(cast(metric.input), cast(metric.output), metric.scale)


def _pad_rows(weights: Tensor, rows: int) -> Tensor:
    return functional.pad(weights, (0, 0, 0, rows - weights.shape[1]))


def _pad_metric(metric: Metric, rows: int, padded: int) -> Metric:
    """The metric with rows that weigh nothing."""
    extra = padded - rows
    if not extra:
        return metric
    output = torch.ones(rows) if metric.output is None else metric.output
    pads = (0, extra) * output.dim()
    return Metric(metric.input, functional.pad(output, pads), metric.scale)
