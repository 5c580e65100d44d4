"""W[αβ, γδ] ≈ Σ_σ L[β, α, γσ] · R[γ, βσ, δ]: two batched block matmuls that share a bond of rank r."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from geofx.factorizations.blocks import Fold, compose, fit_blocks, require_fold
from geofx.factorizations.contract import SIZES, Factors, measured_loss, require_rank
from geofx.factorizations.folds import divisors
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import multiply_blocks
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights


@dataclass(frozen=True)
class BlockTensorTrain:
    """BTT (Qiu et al. 2024): out folded to m1 x m2, in to n1 x n2; r (out n1 + in m2) numbers.

    A tensor train of two cores would multiply R[β, σ, δ] and L[α, γ, σ]; here both cores keep both shared
    indices β and γ, so each of the m2 x n1 blocks (m1, n2) of W has a rank r of its own. `Monarch` is the
    case m2 = n1, written as two block-diagonal matrices; low rank the case m2 = n1 = 1.

    Attributes:
        rank: r, of the bond σ.
        rows: (m1, m2), whose product is out.
        columns: (n1, n2), whose product is in.
    """

    rank: int
    rows: Fold
    columns: Fold

    name: ClassVar[str] = "block_tensor_train"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """For each 64th of the weight's bytes the folds nearest to square, the paper's, that fill it."""
        out, width = region.shape
        best: dict[int, tuple[float, int, Self]] = {}
        for m1 in divisors(out)[1:-1]:
            for n1 in divisors(width)[1:-1]:
                rows, columns = (m1, out // m1), (n1, width // n1)
                size = out * n1 + width * rows[1]
                uneven = max(rows) / min(rows) * max(columns) / min(columns)
                for rank in range(1, -(-out * width // size)):
                    step = SIZES * rank * size // (out * width)
                    entry = uneven, rank * size, cls(rank, rows, columns)
                    best[step] = min(best.get(step, entry), entry, key=lambda item: item[:2])
        yield from (best[step][2] for step in sorted(best))

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``left`` (m2, m1, n1 r), ``right`` (n1, m2 r, n2)."""
        require_fold(self.rows, self.columns, region)
        (m1, m2), (n1, n2) = self.rows, self.columns
        require_rank(self.rank, min(m1, n2), region)
        return {"left": (m2, m1, n1 * self.rank), "right": (n1, m2 * self.rank, n2)}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Measured at the fit: blocks that share no factor still meet in the metric."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The truncation of every block, then both cores in turn moved in the metric."""
        self.factor_shapes(analysis.region)
        return self, fit_blocks(self.rank, self.rows, self.columns, analysis)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """Contract δ with R for each γ, then γσ with L for each β."""
        return multiply_blocks(x, factors["left"], factors["right"])

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """Σ_σ L[β, α, γσ] · R[γ, βσ, δ]."""
        return compose(factors["left"], factors["right"])

    def geometry(self, region: Region) -> GeometricForm:
        """One subspace per core; the two share the bond of dimension r, for each β and γ."""
        m1, n2 = self.rows[0], self.columns[1]
        spaces = Subspace("input core", self.rank, n2), Subspace("output core", self.rank, m1)
        steps = (
            Transformation("contract", ("input core",), "bond"),
            Transformation("permute", ("bond",), "bond"),
            Transformation("expand", ("bond", "output core"), "output"),
            Transformation("permute", ("output",), "output"),
        )
        return GeometricForm(spaces, steps)
