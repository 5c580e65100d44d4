"""W ≈ C ×₁ U₁ … ×_p U_p ×_{p+1} V₁ … ×_{p+q} V_q over the folds of its rows and columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor
from torch.nn import functional

from geofx.errors import PlanError
from geofx.factorizations.contract import SIZES, Factors, measured_loss, of_site, require_rank
from geofx.factorizations.folded import along, fit_folded, from_left, rank_path, require_folds
from geofx.factorizations.folds import fold
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import leading_axes
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

SWEEPS, STEPS = 1, 5
"""Of `refine`: five metric products for each of at most five factors."""

SIDE_STEPS = 256
"""Shares of a stack's sides among which the ranks are chosen."""

HOOI_SWEEPS = 2
"""Higher-order orthogonal iterations of the start; most of what they gain comes with the first."""


@dataclass(frozen=True)
class Tucker:
    """Bases U_k (m_k, r_k), V_k (n_k, s_k) and a core over out = Π m_k, the ``rows``, and in = Π n_k.

    Start: HOSVD and higher-order orthogonal iteration (De Lathauwer et al. 2000). Sites of a ``stack`` share
    all of these and a core with one more order; each owns a row of that order's factor,
    W_i = U (Σ_d a_id C_d) V^T (Wang et al. 2022). ``ranks``: a stack's layers, then rows, then columns.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    ranks: tuple[int, ...]

    name: ClassVar[str] = "tucker"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single", "stack"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Two even folds on each side, with ranks that grow in step; a stack's sides stay whole."""
        (out, *_), across = region.rows, region.shape[1]
        if region.kind == "stack":
            sizes = len(region.sites), out, across
            yield from (cls((out,), (across,), ranks) for ranks in _stack_ranks(sizes))
            return
        rows, columns = fold(out, 2), fold(across, 2)
        if rows is None or columns is None:
            return
        sides = (*rows, *columns)
        for ranks in rank_path(sides, lambda ranks: _numbers(sides, ranks), out * across, _useful):
            yield cls(rows, columns, ranks)

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``row1`` … (m_k, r_k), ``column1`` … (n_k, s_k), ``core``; of each site of a stack ``layer``."""
        require_folds(self.rows, self.columns, region)
        sites = (len(region.sites),) if region.kind == "stack" else ()
        sizes = (*sites, *self.rows, *self.columns)
        if len(self.ranks) != len(sizes):
            raise PlanError(
                f"{len(self.ranks)} ranks do not go with {len(sizes)} orders",
                where=region.name,
                fix="give one rank per order",
            )
        for size, rank in zip(sizes, self.ranks, strict=True):
            require_rank(rank, min(size, math.prod(self.ranks) // max(1, rank)), region)
        own = {of_site("layer", site): (self.ranks[0],) for site in range(len(region.sites) if sites else 0)}
        pairs = zip(self._names, zip(sizes, self.ranks, strict=True), strict=True)
        return {**{name: pair for name, pair in pairs if name != "layer"}, "core": self.ranks, **own}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """That of the factors that `fit` finds."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """HOOI of the weights or of the whitened weights, refined in the metric."""
        self.factor_shapes(analysis.region)
        names = [name for name in self._names if name != "layer"]
        axes = {name: {0: fold} for fold, name in enumerate(names)}
        parts = fit_folded(analysis, (self.rows, self.columns), self._start, self._dense, axes, SWEEPS, STEPS)
        own = {of_site("layer", site): row.clone() for site, row in enumerate(parts.pop("layer", ()))}
        return self, {**parts, **own}

    def _start(self, tensor: Tensor) -> dict[str, Tensor]:
        core, bases = hooi(tensor if self._stacked else tensor.squeeze(0), self.ranks, HOOI_SWEEPS)
        return {"core": core, **dict(zip(self._names, bases, strict=True))}

    def _dense(self, parts: Factors) -> Tensor:
        """(sites, Π rows, Π columns) from the core and its bases, a stack's ``layer`` (sites, depth) too."""
        tensor = parts["core"]
        for axis, name in enumerate(self._names):
            tensor = along(tensor, axis, parts[name])
        return tensor.reshape(-1, math.prod(self.rows), math.prod(self.columns))

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """Every fold of x onto its columns' basis, through the core, every fold out of its rows' basis."""
        out, lead = x, x.shape[:-1]
        sides, split = self.ranks[self._stacked :], len(self.rows)
        for k in reversed(range(len(self.columns))):
            before, after = math.prod(self.columns[:k]), math.prod(sides[split + k + 1 :])
            basis = factors[f"column{k + 1}"].T
            out = from_left(basis, out.reshape(*lead, before, self.columns[k], after))
        inner = math.prod(sides[split:])
        out = functional.linear(out.reshape(*lead, inner), factors["core"].reshape(-1, inner))
        if self._stacked:
            mix = factors[of_site("layer", site)].unsqueeze(0)
            out = mix @ out.reshape(*lead, self.ranks[0], math.prod(sides[:split]))
        for k in range(split):
            before, after = math.prod(self.rows[:k]), math.prod(sides[k + 1 : split])
            out = from_left(factors[f"row{k + 1}"], out.reshape(*lead, before, sides[k], after))
        return out.reshape(*lead, math.prod(self.rows))

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """The core multiplied along every order."""
        own = {"layer": factors[of_site("layer", site)].unsqueeze(0)} if self._stacked else {}
        return self._dense({**factors, **own})[0]

    def geometry(self, region: Region) -> GeometricForm:
        """One subspace per order and the core; each order of the core is resized by a contraction."""
        sizes = (*((len(region.sites),) if self._stacked else ()), *self.rows, *self.columns)
        orders = tuple(
            Subspace(name, rank, size)
            for name, rank, size in zip(self._names, self.ranks, sizes, strict=True)
        )
        core = Subspace("core", math.prod(self.ranks), math.prod(self.ranks))
        steps = tuple(Transformation("contract", ("core", space.name), "core") for space in orders)
        return GeometricForm((*orders, core), steps)

    @property
    def _stacked(self) -> bool:
        return len(self.ranks) > len(self.rows) + len(self.columns)

    @property
    def _names(self) -> list[str]:
        """Factor of each order of the core."""
        rows = [f"row{k}" for k in range(1, len(self.rows) + 1)]
        columns = [f"column{k}" for k in range(1, len(self.columns) + 1)]
        return [*(["layer"] if self._stacked else []), *rows, *columns]


def _stack_ranks(sizes: tuple[int, int, int]) -> Iterator[tuple[int, ...]]:
    """Ranks of (layers, out, in): of all in one step of size those whose shares are the most alike."""
    layers, out, across = sizes
    dense, best = math.prod(sizes), dict[int, tuple[float, int, tuple[int, ...]]]()
    for depth in range(1, layers + 1):
        for step in range(1, SIDE_STEPS + 1):
            sides = (max(1, size * step // SIDE_STEPS) for size in (out, across))
            ranks = _useful((depth, *sides))
            numbers = _numbers(sizes, ranks)
            found = (abs(depth / layers - step / SIDE_STEPS), numbers, ranks)
            bucket = numbers * SIZES // dense
            best[bucket] = min(best.get(bucket, found), found)
    return (best[bucket][2] for bucket in sorted(best) if bucket < SIZES)


def _numbers(sizes: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    return int(math.prod(ranks) + sum(size * rank for size, rank in zip(sizes, ranks, strict=True)))


def _useful(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """None above the product of the others, which bounds the rank of the core's unfolding."""
    for mode, rank in enumerate(ranks):
        others = math.prod(ranks[:mode]) * math.prod(ranks[mode + 1 :])
        ranks = (*ranks[:mode], min(rank, others), *ranks[mode + 1 :])
    return ranks


def hooi(tensor: Tensor, ranks: tuple[int, ...], sweeps: int) -> tuple[Tensor, list[Tensor]]:
    """Core and orthonormal bases: each the leading subspace of the tensor projected onto the others.

    HOSVD, then ``sweeps`` higher-order orthogonal iterations (De Lathauwer et al. 2000).
    """
    bases = [_basis(tensor, mode, rank) for mode, rank in enumerate(ranks)]
    for _ in range(sweeps):
        for mode, rank in enumerate(ranks):
            if rank < tensor.shape[mode]:
                bases[mode] = _basis(_project(tensor, bases, mode), mode, rank)
    return _project(tensor, bases, None), bases


def _basis(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """(size, rank): leading left singular vectors of the unfolding along ``mode``, from its Gram matrix."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    return leading_axes(unfolded @ unfolded.T, rank, "fold")


def _project(tensor: Tensor, bases: list[Tensor], but: int | None) -> Tensor:
    for axis, basis in enumerate(bases):
        if axis != but:
            tensor = along(tensor, axis, basis.T)
    return tensor
