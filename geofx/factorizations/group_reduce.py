"""W[v] ≈ L_b[v] R_b: rows in blocks by how much the loss sees of them, each block with a rank of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from geofx.errors import PlanError
from geofx.factorizations.contract import SIZES, Factors, measured_loss, require_rank, stored
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import eigh_psd, require_finite
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights, roots


@dataclass(frozen=True)
class GroupReduce:
    """argmin over rank r_b in block b of Σ_v w_v (W - L R)_v A (W - L R)_vᵀ; Σ_b r_b (n_b + in) numbers.

    GroupReduce (Chen et al., 2018): blocks of ``sizes`` n_b take the rows in order of their weight w, the
    share of tokens that read them, so frequent rows can have more ``ranks``. The metric is w ⊗ A, so each
    block's truncation in it is the optimum. ``exchanges`` is how often rows then move to the block whose
    subspace holds more of them, sizes kept; no such step is uphill.

    ``index`` is the place of each row in the blocks, one after the other.
    """

    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    exchanges: int = 0

    name: ClassVar[str] = "group_reduce"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"embedding", "tied_embedding"})
    closed_form: ClassVar[bool] = True

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Blocks that halve down to half as many rows as columns; ranks that gain most per number."""
        rows, columns = region.shape
        sizes = halved(rows, columns)
        if len(sizes) < 2 or columns < 2:
            return
        dense, ranks = rows * (columns - 1), [1] * len(sizes)
        used = sum(size + columns for size in sizes)
        step, due = dense // SIZES, max(used, dense // SIZES)
        for block in _best_first(sizes, columns, analysis):
            if used >= due:
                yield cls(sizes, tuple(ranks))
                due = used + step
            ranks[block] += 1
            used += sizes[block] + columns
            if used >= dense:
                return

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``left`` (n_b, r_b) of each block, ``right`` (Σ r_b, in), ``index`` (out,)."""
        rows, columns = region.shape
        if len(self.sizes) != len(self.ranks) or sum(self.sizes) != rows or not self.sizes:
            what = f"{len(self.ranks)} ranks for blocks of {self.sizes} of {rows} rows"
            raise PlanError(what, where=region.name, fix="give one rank per block, and blocks of all rows")
        for size, rank in zip(self.sizes, self.ranks, strict=True):
            require_rank(rank, min(size, columns), region)
        lefts = {_left(block): pair for block, pair in enumerate(zip(self.sizes, self.ranks, strict=True))}
        return {**lefts, "right": (sum(self.ranks), columns), "index": (rows,)}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Σ_b Σ_{i > r_b} σ_bi², of each block's part of W in the metric."""
        if self.exchanges:
            return measured_loss(self, analysis)
        spectra = _spectra(analysis, self.sizes)
        return float(sum(squares[rank:].sum() for squares, rank in zip(spectra, self.ranks, strict=True)))

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """Each block projected onto its leading r_b axes in the metric."""
        weight = weights[analysis.region.site.weight]
        blocks = _Blocks.of(analysis, self.sizes)
        axes = blocks.axes(self.ranks)
        for _ in range(self.exchanges):
            blocks = blocks.exchanged(axes)
            axes = blocks.axes(self.ranks)
        root, inverse = roots(analysis.metric.input, weight.shape[1], analysis.region.name)
        parts = {"right": torch.cat([axis.T @ inverse for axis in axes])}
        wide = require_finite(weight, analysis.region.name).double()
        for block, (rows, axis) in enumerate(zip(blocks.members, axes, strict=True)):
            parts[_left(block)] = wide[rows] @ root @ axis
        parts["index"] = torch.argsort(torch.cat(blocks.members)).int()
        return self, stored(parts, weight)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """L_b (R_b x) of every block, put in the rows' own order."""
        latents = functional.linear(x, factors["right"])
        starts = (0, *accumulate(self.ranks))
        parts = [
            functional.linear(latents.narrow(-1, starts[block], rank), factors[_left(block)])
            for block, rank in enumerate(self.ranks)
        ]
        return torch.cat(parts, -1).index_select(-1, factors["index"])

    def lookup(self, ids: Tensor, factors: Factors) -> Tensor:
        """[0 .. L_b[v] .. 0] R, zero but for the block that v lies in."""
        places = factors["index"].index_select(0, ids.flatten()).reshape(ids.shape)
        latents, start = [], 0
        for block, size in enumerate(self.sizes):
            inside = (places >= start) & (places < start + size)
            rows = functional.embedding((places - start).clamp(0, size - 1), factors[_left(block)])
            latents.append(torch.where(inside.unsqueeze(-1), rows, rows.new_zeros(())))
            start += size
        return torch.cat(latents, -1) @ factors["right"]

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """The blocks' products one below the other, rows in their own order."""
        rights = torch.split(factors["right"], list(self.ranks))
        blocks = [factors[_left(block)] @ right for block, right in enumerate(rights)]
        return torch.cat(blocks)[factors["index"].long()]

    def geometry(self, region: Region) -> GeometricForm:
        """The two subspaces of low rank for each block of rows; the blocks side by side, in their order."""
        columns, blocks = region.shape[1], list(enumerate(zip(self.sizes, self.ranks, strict=True)))
        spaces, steps = [], []
        for block, (size, rank) in blocks:
            spaces += [Subspace(f"input {block}", rank, columns), Subspace(f"rows {block}", rank, size)]
            steps.append(Transformation("project", (f"input {block}",), f"latent {block}"))
            steps.append(Transformation("expand", (f"latent {block}",), f"rows {block}"))
        rows = tuple(f"rows {block}" for block, _ in blocks)
        joined = Transformation("direct_sum", rows, "rows by block")
        return GeometricForm(
            tuple(spaces), (*steps, joined, Transformation("permute", ("rows by block",), "output"))
        )


def halved(rows: int, columns: int) -> tuple[int, ...]:
    """``rows`` cut at a half, a quarter, .. while every block has half as many as ``columns``; ascending.

    ``halved(1000, 200) == (125, 125, 250, 500)``.
    """
    sizes: list[int] = []
    while rows // 2 >= max(2, columns // 2):
        sizes.insert(0, rows - rows // 2)
        rows //= 2
    return (rows, *sizes)


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Y = diag(w)^{1/2} W A^{1/2} and the rows of each block: the loss of a block is ‖Y_b (I - V Vᵀ)‖²."""

    lifted: Tensor
    members: tuple[Tensor, ...]

    @classmethod
    def of(cls, analysis: RegionAnalysis, sizes: tuple[int, ...]) -> Self:
        weight, metric = analysis.weight, analysis.metric
        shares = torch.ones(len(weight)) if metric.output is None else metric.output
        shares = (shares if shares.dim() == 1 else shares.diagonal()).double()
        root, _ = roots(metric.input, weight.shape[1], analysis.region.name)
        lifted = require_finite(weight, analysis.region.name).double() @ root
        order = shares.argsort(descending=True, stable=True)
        return cls(lifted * (metric.scale * shares).sqrt()[:, None], torch.split(order, list(sizes)))

    def eigh(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.members:
            part = self.lifted[rows]
            yield eigh_psd(part.T @ part, "block of rows")

    def axes(self, ranks: tuple[int, ...]) -> list[Tensor]:
        return [vectors[:, :rank] for (_, vectors), rank in zip(self.eigh(), ranks, strict=True)]

    def exchanged(self, axes: list[Tensor]) -> _Blocks:
        """Of every two neighbours each keeps the rows, as many as it had, that its subspace gains most by."""
        members = list(self.members)
        for block in range(len(members) - 1):
            rows = torch.cat(members[block : block + 2])
            first, second = ((self.lifted[rows] @ axis).square().sum(1) for axis in axes[block : block + 2])
            order = (first - second).argsort(descending=True, stable=True)
            members[block : block + 2] = torch.split(
                rows[order], [len(part) for part in members[block : block + 2]]
            )
        return replace(self, members=tuple(members))


def _left(block: int) -> str:
    return f"left{block or ''}"


_KNOWN: WeakKeyDictionary[RegionAnalysis, dict[tuple[int, ...], list[Tensor]]] = WeakKeyDictionary()


def _spectra(analysis: RegionAnalysis, sizes: tuple[int, ...]) -> list[Tensor]:
    """σ² of every block, descending; kept as long as the analysis, which many candidates ask."""
    known = _KNOWN.setdefault(analysis, {})
    if sizes not in known:
        known[sizes] = [values for values, _ in _Blocks.of(analysis, sizes).eigh()]
    return known[sizes]


def _best_first(sizes: tuple[int, ...], columns: int, analysis: RegionAnalysis) -> Iterator[int]:
    """Blocks in the order in which one rank more lowers the loss most per number stored.

    Each block's gains fall and its price is fixed, so what is taken so far is the optimum of its size.
    """
    spectra = _spectra(analysis, sizes)
    gains = [
        (-float(square) / (size + columns), block, rank)
        for block, (squares, size) in enumerate(zip(spectra, sizes, strict=True))
        for rank, square in enumerate(squares[1:size])
    ]
    return (block for _, block, _ in sorted(gains))
