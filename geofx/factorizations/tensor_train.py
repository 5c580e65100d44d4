"""W[(i₁…i_d), (j₁…j_d)] ≈ G₁[i₁, j₁] G₂[i₂, j₂] … G_d[i_d, j_d]: a matrix product operator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from geofx.errors import PlanError
from geofx.factorizations.contract import Factors, measured_loss, of_site, require_rank
from geofx.factorizations.folded import fit_folded, from_left, padded_fold, rank_path, require_folds
from geofx.factorizations.folds import fold
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import leading_axes
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

SWEEPS, STEPS = 2, 4
"""Of `refine`: two times four metric products for each of three cores."""


@dataclass(frozen=True)
class TensorTrain:
    """Cores (r_{k-1}, m_k, n_k, r_k) over out = Π m_k - padding, m_k ``rows``, and in = Π n_k, ``columns``.

    Matrix form: Oseledets (2011), Novikov et al. (2015), Liu et al. (2021); of an embedding, Hrinchuk et al.
    (2020), its vocabulary padded to Π m_k. Sites of a ``stack`` share all cores and have a matrix
    of their own in the middle, W_i = G₁ S_i G₂ (Wang et al. 2022); ``ranks`` are those of all bonds in order.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    ranks: tuple[int, ...]
    padding: int = 0

    name: ClassVar[str] = "tensor_train"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single", "stack", "embedding", "tied_embedding"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Three even folds, else two, with ranks that grow in step; a stack's sides stay whole."""
        folds = _folds(region)
        if folds is None:
            return
        rows, columns = folds
        sites = len(region.sites) if region.kind == "stack" else 0
        sizes = cls(rows, columns, ())._sizes(sites)
        bonds = range(1, len(sizes))
        limits = tuple(min(math.prod(sizes[:bond]), math.prod(sizes[bond:])) for bond in bonds)

        def numbers(ranks: tuple[int, ...]) -> int:
            ends = zip((1, *ranks), sizes, (*ranks, 1), strict=True)
            return sum(left * size * right for left, size, right in ends)

        def clip(ranks: tuple[int, ...]) -> tuple[int, ...]:
            useful = [1, *ranks, 1]
            for bond in bonds:
                useful[bond] = min(useful[bond], useful[bond - 1] * sizes[bond - 1])
            for bond in reversed(bonds):
                useful[bond] = min(useful[bond], useful[bond + 1] * sizes[bond])
            return tuple(useful[1:-1])

        dense = len(region.sites) * region.rows[0] * region.shape[1]
        for ranks in rank_path(limits, numbers, dense, clip):
            yield cls(rows, columns, ranks, math.prod(rows) - region.rows[0])

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``core1`` … ``core<d>`` (r_{k-1}, m_k, n_k, r_k) and, of each site of a stack, ``site`` (r, r')."""
        require_folds(self.rows, self.columns, region, self.padding)
        sites = len(region.sites) if region.kind == "stack" else 0
        if len(self.rows) != len(self.columns) or len(self.ranks) != len(self.rows) - 1 + bool(sites):
            raise PlanError(
                f"{len(self.rows)} and {len(self.columns)} folds do not go with {len(self.ranks)} ranks",
                where=region.name,
                fix="give as many folds of rows as of columns, and a rank between neighbours",
            )
        shapes: dict[str, tuple[int, ...]] = {}
        sizes = self._sizes(sites)
        for index, (left, right) in enumerate(pairwise((1, *self.ranks, 1))):
            require_rank(right, min(left * sizes[index], math.prod(sizes[index + 1 :])), region)
            half = len(self.rows) // 2
            if sites and index == half:
                shapes.update({of_site("site", site): (left, right) for site in range(sites)})
            else:
                k = index - bool(sites and index > half)
                shapes[f"core{k + 1}"] = (left, self.rows[k], self.columns[k], right)
        return shapes

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """That of the factors that `fit` finds."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """TT-SVD, of the weights or of the whitened weights, refined in the metric."""
        self.factor_shapes(analysis.region)
        order = len(self.rows)
        axes = {f"core{k + 1}": {1: k, 2: order + k} for k in range(order)}
        parts = fit_folded(analysis, (self.rows, self.columns), self._start, self._dense, axes, SWEEPS, STEPS)
        middle = parts.pop("site", ())
        own = {of_site("site", site): part.clone() for site, part in enumerate(middle)}
        return self, {**parts, **own}

    def _start(self, tensor: Tensor) -> dict[str, Tensor]:
        """TT-SVD of (sites, *rows, *columns): the folds in pairs, a stack's sites in the middle."""
        order = len(self.rows)
        stacked = len(self.ranks) == order
        pairs = [axis for k in range(order) for axis in (1 + k, 1 + order + k)]
        pairs.insert(2 * (order // 2) if stacked else 0, 0)
        sizes = self._sizes(tensor.shape[0] if stacked else 0)
        cores = tt_svd(tensor.permute(pairs).reshape(sizes), self.ranks)
        middle = {"site": cores.pop(order // 2).movedim(1, 0)} if stacked else {}
        shaped = {
            f"core{k + 1}": core.reshape(core.shape[0], self.rows[k], self.columns[k], core.shape[2])
            for k, core in enumerate(cores)
        }
        return {**shaped, **middle}

    def _dense(self, parts: Factors) -> Tensor:
        """(sites, Π rows, Π columns) from cores and the stacked (sites, r, r') matrices."""
        state = parts["core1"].new_ones(1, 1, 1, 1)
        for k in range(len(self.rows)):
            if "site" in parts and k == len(self.rows) // 2:
                state = torch.einsum("zmnr,srt->smnt", state, parts["site"])
            state = torch.einsum("smnr,rijt->sminjt", state, parts[f"core{k + 1}"])
            state = state.flatten(1, 2).flatten(2, 3)
        return state.squeeze(3)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """x folded to (…, n₁ … n_d); cores from the last, each one matrix (r m, n r') times what is left."""
        out, lead = x, x.shape[:-1]
        for k in reversed(range(len(self.rows))):
            before, after = math.prod(self.columns[:k]), math.prod(self.rows[k + 1 :])
            core = _as_matrix(factors[f"core{k + 1}"])
            out = from_left(core, out.reshape(*lead, before, core.shape[1], after))
            if "site" in factors and k == len(self.rows) // 2:
                own = factors[of_site("site", site)]
                after *= self.rows[k]
                out = from_left(own, out.reshape(*lead, before, own.shape[1], after))
        return out.reshape(*lead, math.prod(self.rows))[..., : self._out]

    def lookup(self, ids: Tensor, factors: Factors) -> Tensor:
        """G₁[i₁] … G_d[i_d] for the digits i_k of each id in the mixed base of ``rows``.

        Reads the cores in the form that `apply` does, so that an exporter stores them once.
        """
        flat = ids.flatten()
        rows = factors["core1"].new_ones(1, 1, 1)
        for k, base in enumerate(self.rows):
            digit = torch.div(flat, math.prod(self.rows[k + 1 :]), rounding_mode="floor") % base
            core = factors[f"core{k + 1}"]
            places = torch.arange(core.shape[0], device=ids.device) * base + digit.unsqueeze(1)
            wide = math.prod(self.columns[: k + 1])
            rows = (rows @ _picked(core, places)).reshape(flat.shape[0], wide, core.shape[3])
        return rows.reshape(*ids.shape, math.prod(self.columns))

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """The cores contracted along their bonds, first to last."""
        parts = {name: part for name, part in factors.items() if name.startswith("core")}
        if "site" in factors:
            parts["site"] = factors[of_site("site", site)].unsqueeze(0)
        return self._dense(parts)[0, : self._out]

    def geometry(self, region: Region) -> GeometricForm:
        """One subspace per core; neighbours share an order of dimension r_k."""
        shapes = self.factor_shapes(region)
        spaces = tuple(
            Subspace(name, min(math.prod(shape[:-1]), shape[-1]), math.prod(shape[:-1]))
            for name, shape in shapes.items()
        )
        orders = groupby((space.name for space in spaces), key=lambda name: name.partition("@")[0])
        first, *others = (tuple(names) for _, names in orders)
        steps = []
        for bond, names in enumerate(others, 1):
            steps.append(Transformation("contract", (*first, *names), f"order {bond}"))
            first = (f"order {bond}",)
        return GeometricForm(spaces, tuple(steps))

    def _sizes(self, sites: int) -> list[int]:
        """m_k n_k of each core, with the number of sites of a stack in the middle."""
        sizes = [m * n for m, n in zip(self.rows, self.columns, strict=True)]
        if sites:
            sizes.insert(len(sizes) // 2, sites)
        return sizes

    @property
    def _out(self) -> int:
        return math.prod(self.rows) - self.padding


def tt_svd(tensor: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    """Cores (r, s_k, r') by truncation bond after bond (Oseledets 2011); all but the last orthonormal."""
    cores, left, rest = [], 1, tensor
    for size, rank in zip(tensor.shape, ranks, strict=False):
        basis, rest = _leading(rest.reshape(left * size, -1), rank)
        cores.append(basis.reshape(left, size, rank))
        left = rank
    return [*cores, rest.reshape(left, -1, 1)]


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal U and U^T M of the best approximation of M of rank r, from the smaller Gram matrix."""
    if matrix.shape[0] <= matrix.shape[1]:
        basis = leading_axes(matrix @ matrix.T, rank, "fold")
        return basis, basis.T @ matrix
    vectors = leading_axes(matrix.T @ matrix, rank, "fold")
    scaled = matrix @ vectors
    sizes = scaled.norm(dim=0)
    return scaled * torch.where(sizes > 0, 1.0 / sizes, 0.0), (vectors * sizes).T


def _folds(region: Region) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Folds of the rows, padded where they are a vocabulary, and of the columns."""
    out, columns = region.rows[0], region.shape[1]
    if region.kind == "stack":
        return (out, 1), (1, columns)
    for order in (3, 2):
        split = fold(columns, order)
        rows = padded_fold(out, order) if "embedding" in region.kind else fold(out, order)
        if rows and split:
            return rows, split
    return None


def _as_matrix(core: Tensor) -> Tensor:
    """(r_{k-1} m_k, n_k r_k)."""
    return core.flatten(2).flatten(0, 1)


def _picked(core: Tensor, places: Tensor) -> Tensor:
    """Rows ``places`` (tokens, r_{k-1}) of the core as a matrix; the last one transposed, for `from_left`."""
    if core.shape[3] > 1:
        return functional.embedding(places, _as_matrix(core))
    columns = _as_matrix(core).t().index_select(1, places.flatten())
    return columns.reshape(core.shape[2], *places.shape).permute(1, 2, 0)
