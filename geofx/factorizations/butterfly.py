"""W = B_1 B_2 ... B_L: factor l mixes bit l of the index alone, in 2 x 2 blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Self

import torch
from torch import Tensor

from geofx.errors import PlanError
from geofx.factorizations.blocks import inverses, refine_best, whole
from geofx.factorizations.contract import Factors, measured_loss, rank_grid, require_rank
from geofx.factorizations.folded import balanced
from geofx.factorizations.refine import Operator
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import cholesky, leading_axes, require_finite, working_dtype
from geofx.region import Region, RegionKind
from geofx.region_analysis import Metric, RegionAnalysis, Weights

PRODUCTS, STEPS = 20, 2
"""Products with the metric that the refinement of one fit may take, and those of one update of a factor."""

USUAL_LEVELS = (3, 2)
"""Depths to propose, the first that fits: at equal bytes a deeper product loses more, two are Monarch's."""


@dataclass(frozen=True)
class Butterfly:
    """Product of L = ``levels`` block butterfly factors, its splits of ``rank`` r.

    With out = 2^L p and in = 2^L q, a row is (i_1, ..., i_L, α) in bits i and α < p, a column likewise
    (j_1, ..., j_L, β) with β < q. B_l turns bit j_l into i_l: one 2 x 2 block matrix for each value of the
    bits that it leaves alone, j_1 .. j_{l-1} and i_{l+1} .. i_L; its blocks are p x r in B_1, r x q in B_L
    and r x r between. So every submatrix of W with j_1 .. j_l and i_{l+1} .. i_L given has rank r.
    r = p = q = 1 is the butterfly of Dao et al. (2019, 2020), r = p = q the block butterfly of Chen et al.
    (2022).
    """

    levels: int
    rank: int

    name: ClassVar[str] = "butterfly"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Ranks of one depth while the factors are smaller than the weight."""
        rows, columns = region.site.shape
        levels = next((depth for depth in USUAL_LEVELS if not (rows | columns) % 2**depth), None)
        if levels is None:
            return
        most = 2 * min(rows, columns) // 2**levels
        forms = (cls(levels, rank) for rank in range(1, most + 1))
        ranks = [
            form.rank
            for form in forms
            if sum(map(math.prod, form.factor_shapes(region).values())) < rows * columns
        ]
        yield from (cls(levels, rank) for rank in rank_grid(len(ranks) + 1, len(ranks)))

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``factor1`` .. ``factorL``, each (2^{L-1}, rows, columns): the 2 x 2 block matrices."""
        widths = self._widths(region)
        half = 2 ** (self.levels - 1)
        return {
            f"factor{level}": (half, 2 * above, 2 * below)
            for level, (above, below) in enumerate(pairwise(widths), start=1)
        }

    def _widths(self, region: Region) -> tuple[int, ...]:
        """Sides of the blocks: p, r, ..., r, q."""
        rows, columns = region.site.shape
        if not 2 <= self.levels < min(rows, columns).bit_length() or (rows | columns) % 2**self.levels:
            raise PlanError(
                f"{self.levels} levels do not fit {rows} x {columns}",
                where=region.name,
                fix="take at least 2, and sides that are multiples of 2 to that power",
            )
        top, bottom = rows >> self.levels, columns >> self.levels
        require_rank(self.rank, 2 * min(top, bottom), region)
        return (top, *[self.rank] * (self.levels - 1), bottom)

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """The loss of what `fit` gives."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """Hierarchical splits, whitened by blocks where that is better, then least squares in the metric."""
        weight = require_finite(weights[analysis.region.site.weight], analysis.region.name)
        starts = [self._split(weight, metric) for metric in (Metric(), analysis.metric)]
        dtype, (rows, columns) = working_dtype(weight), weight.shape
        metric = (
            whole(analysis.metric.output, rows).to(dtype),
            whole(analysis.metric.input, columns).to(dtype),
        )
        sweeps = max(1, PRODUCTS // (STEPS * self.levels))
        return self, refine_best(
            self.to_dense, starts, analysis, partial(self._inverse, *metric), sweeps=sweeps, steps=STEPS
        )

    def _split(self, weight: Tensor, metric: Metric) -> dict[str, Tensor]:
        """W = B_1 (B_2 (B_3 ...)), each split by batched singular value decompositions cut off at r.

        Hierarchical factorization (Le, Zheng, Riccietti and Gribonval, 2022). B_1 .. B_{L-1} have orthonormal
        columns, so that the squared errors of the splits add up. The metric counts as far as B_1 and B_L can
        take it in: by the blocks on the diagonals of G and A that these two multiply.
        """
        rows, columns = weight.shape
        half, size = 2 ** (self.levels - 1), 2**self.levels
        down = torch.arange(rows).view(2, half, -1).transpose(0, 1).flatten(1)
        left = _triangular(metric.output, down)
        right = _triangular(metric.input, torch.arange(columns).view(half, -1))
        lifted = (left.mT @ weight.double()[down]).view(half, -1, half, 2 * columns // size).transpose(1, 2)
        rest = (lifted @ right).transpose(1, 2).reshape(half, 2, rows // size, columns)
        rest = rest.transpose(0, 1).reshape(1, size, rows // size, columns)
        factors = {}
        for level in range(1, self.levels):
            before, after, above = 2 ** (level - 1), 2 ** (self.levels - level), rest.shape[2]
            blocks = rest.view(before, 2, after, above, 2, -1).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)
            basis = _leading(blocks, self.rank)
            factors[f"factor{level}"] = basis.transpose(2, 3).reshape(half, 2 * above, -1)
            rest = (basis.mT @ blocks).transpose(1, 2).flatten(0, 1)
        factors["factor1"] = torch.linalg.solve_triangular(left.mT, factors["factor1"], upper=True)
        factors[f"factor{self.levels}"] = torch.linalg.solve_triangular(
            right, rest.flatten(1, 2), upper=False, left=False
        )
        return balanced(factors)

    def _inverse(self, outputs: Tensor, inputs: Tensor, name: str, factors: Factors) -> Operator:
        """The blocks of Jᵀ M J at each block of B_l, inverted: Xᵀ G X and Y A Yᵀ of its rows and columns."""
        level = int(name.removeprefix("factor"))
        before, after = 2 ** (level - 1), 2 ** (self.levels - level)
        above = self._product(factors, 1, level - 1)
        above = above.view(2, after, before, len(outputs) >> self.levels, before, above.shape[-1] // before)
        below = self._product(factors, level + 1, self.levels)
        below = below.view(before, 2, after, below.shape[2] // after, len(inputs) >> level)
        rows = outputs.reshape(2 * (before, 2, after, len(outputs) >> self.levels))
        columns = inputs.reshape(2 * (before, 2, len(inputs) >> level))
        left = torch.einsum("idxuap,xiduykdv,kdyvaq->adipkq", above, rows, above)
        right = torch.einsum("ajdrc,ajcake,akdse->adjrks", below, columns, below)
        across, bond = (inverses(gram.flatten(4).flatten(2, 3).flatten(0, 1)) for gram in (left, right))
        return lambda slope: across @ slope @ bond

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """x B_Lᵀ ... B_1ᵀ: a batched product per level, the bits regrouped between."""
        half, tokens = 2 ** (self.levels - 1), x.reshape(-1, x.shape[-1])
        count = tokens.shape[0]
        state = tokens.reshape(count, half, x.shape[-1] // half).transpose(0, 1)
        for level in range(self.levels, 0, -1):
            factor = factors[f"factor{level}"]
            state, width = torch.bmm(state, factor.mT), factor.shape[1] // 2
            if level > 1:
                state = state.reshape(2 ** (level - 2), 2, 2 ** (self.levels - level), count, 2, width)
                state = state.permute(0, 4, 2, 3, 1, 5).reshape(half, count, 2 * width)
        state = state.reshape(half, count, 2, width).permute(1, 2, 0, 3)
        return state.reshape(*x.shape[:-1], 2 * half * width)

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """B_L, then B_{L-1} B_L and so on."""
        return self._product(factors, 1, self.levels)[0, 0]

    def _product(self, factors: Factors, first: int, last: int) -> Tensor:
        """B_first ... B_last without its zeros: (j_1 .. j_{first-1}, i_{last+1} .. i_L, rows, columns)."""
        width = factors[f"factor{last}"].shape[2] // 2 if last else factors["factor1"].shape[1] // 2
        after = 2 ** (self.levels - last)
        product = torch.eye(width).to(factors["factor1"]).expand(2**last, after, -1, -1)
        for level in range(last, first - 1, -1):
            before, within = 2 ** (level - 1), 2 ** (last - level)
            factor = factors[f"factor{level}"]
            above, below = (side // 2 for side in factor.shape[1:])
            factor = factor.view(before, within, after, 2, above, 2, below)
            product = product.reshape(before, 2, after, within, below, product.shape[-1])
            product = torch.einsum("aedipjr,ajderc->adiepjc", factor, product).flatten(5).flatten(2, 4)
        return product

    def geometry(self, region: Region) -> GeometricForm:
        """Two subspaces per block: scaled from one into the other, laid side by side, bits regrouped."""
        spaces: list[Subspace] = []
        steps: list[Transformation] = []
        for level, (count, above, below) in reversed(list(enumerate(self.factor_shapes(region).values(), 1))):
            for block in range(count):
                source, target = f"level {level} block {block} in", f"level {level} block {block} out"
                spaces += [Subspace(source, below, count * below), Subspace(target, above, count * above)]
                steps.append(Transformation("scale", (source,), target))
            blocks = tuple(f"level {level} block {block} out" for block in range(count))
            steps.append(Transformation("direct_sum", blocks, f"level {level}"))
            steps.append(Transformation("permute", (f"level {level}",), f"level {level}"))
        return GeometricForm(tuple(spaces), tuple(steps))


def _triangular(moment: Tensor | None, index: Tensor) -> Tensor:
    """Lower Cholesky factors (blocks, n, n) of the diagonal blocks of ``moment`` at ``index`` (blocks, n)."""
    wide = whole(moment, index.numel())
    blocks = wide[index[:, :, None], index[:, None, :]]
    least = 1e-10 * wide.diagonal().max() + torch.finfo(torch.float64).tiny
    ridge = least * torch.eye(index.shape[1], dtype=torch.float64)
    return cholesky(blocks + ridge, "second moment of a block")


def _leading(blocks: Tensor, rank: int) -> Tensor:
    """Orthonormal (..., m, r) that span the leading left singular vectors of ``blocks`` (..., m, n)."""
    wide = blocks.shape[-2] <= blocks.shape[-1]
    axes = leading_axes(blocks @ blocks.mT if wide else blocks.mT @ blocks, rank, "split")
    basis: Tensor = axes if wide else torch.linalg.qr(blocks @ axes)[0]
    return basis
