"""W ≈ P L Pᵀ R: two block-diagonal matrices with a permutation after each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from geofx.errors import PlanError
from geofx.factorizations.blocks import Fold, compose, fit_blocks
from geofx.factorizations.contract import Factors, measured_loss, rank_grid, require_rank
from geofx.factorizations.folds import divisors
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import multiply_blocks
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

BLOCKS = 4
"""Number of blocks that is proposed, or the divisor nearest to it: few, so that ranks are fine steps."""


@dataclass(frozen=True)
class Monarch:
    """W = P L Pᵀ R with R and L of b diagonal blocks (Monarch, Dao et al. 2022); b r (out + in) numbers.

    R has blocks (b r, in / b) and L blocks (out / b, b r); Pᵀ deals r outputs of every block of R to every
    block of L, and P interleaves the outputs. So W, its outputs grouped by their remainder modulo b and its
    inputs cut into b runs, is a grid of b x b blocks of rank r each. The paper's projection has r = 1 and a
    square grid of √n; here r is a setting, so that a few large blocks reach any size. `BlockTensorTrain` is
    the same product over a grid of any two folds.
    """

    rank: int
    blocks: int

    name: ClassVar[str] = "monarch"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Ranks per block at one number of blocks, near 4, that divides both sides; none where none does."""
        rows, columns = region.shape
        common = [b for b in divisors(rows) if b > 1 and columns % b == 0]
        if not common:
            return
        blocks = min(common, key=lambda b: (max(b, BLOCKS) / min(b, BLOCKS), b))
        limit = -(-rows * columns // (blocks * (rows + columns)))
        yield from (cls(rank, blocks) for rank in rank_grid(limit, limit))

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``left`` (b, out / b, b r), ``right`` (b, b r, in / b)."""
        rows, columns = region.shape
        if self.blocks < 1 or rows % self.blocks or columns % self.blocks:
            raise PlanError(
                f"{self.blocks} blocks do not divide {region.shape}",
                where=region.name,
                fix="mend the number of blocks",
            )
        require_rank(self.rank, min(region.shape) // self.blocks, region)
        inner = self.blocks * self.rank
        return {
            "left": (self.blocks, rows // self.blocks, inner),
            "right": (self.blocks, inner, columns // self.blocks),
        }

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Measured at the fit: blocks that share no factor still meet in the metric."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The blocks' truncations, the paper's projection, then moved in the metric."""
        self.factor_shapes(analysis.region)
        return self, fit_blocks(self.rank, *self._grid(analysis.region), analysis)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """P L Pᵀ (R x)."""
        return multiply_blocks(x, factors["left"], factors["right"])

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """The grid of products of blocks."""
        return compose(factors["left"], factors["right"])

    def geometry(self, region: Region) -> GeometricForm:
        """Two subspaces for each of the 2 b diagonal blocks: what it reads and what it writes."""
        inner = self.blocks * self.rank
        within = ("R", region.shape[1], self.blocks * inner), ("L", self.blocks * inner, region.shape[0])
        spaces = tuple(
            Subspace(f"{side} of {factor}{block}", min(before, after) // self.blocks, ambient)
            for factor, before, after in within
            for block in range(self.blocks)
            for side, ambient in (("input", before), ("output", after))
        )
        read, passed, taken, written = (
            tuple(f"{side} of {factor}{block}" for block in range(self.blocks))
            for factor in "RL"
            for side in ("input", "output")
        )
        steps = (
            *map(_scale, read, passed),
            Transformation("permute", passed, "inputs of L"),
            *map(_scale, taken, written),
            Transformation("direct_sum", written, "interleaved output"),
            Transformation("permute", ("interleaved output",), "output"),
        )
        return GeometricForm(spaces, steps)

    def _grid(self, region: Region) -> tuple[Fold, Fold]:
        """The folds of out and in whose grid of blocks is b x b."""
        rows, columns = region.shape
        return (rows // self.blocks, self.blocks), (self.blocks, columns // self.blocks)


def _scale(source: str, target: str) -> Transformation:
    return Transformation("scale", (source,), target)
