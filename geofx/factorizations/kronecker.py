"""W ≈ Σ_k A_k ⊗ B_k: a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from geofx.factorizations.blocks import Fold, refine_best, require_fold, truncate_blocks, whole
from geofx.factorizations.contract import Factors, measured_loss, rank_grid, require_rank
from geofx.factorizations.folds import fold
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import require_finite, root_and_inverse
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

Parts = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kronecker:
    """A_k (m1, n1) and B_k (m2, n2); k (m1 n1 + m2 n2) numbers (KronA of GPT-2, Edalati et al. 2022).

    Without a metric the optimum is a truncated SVD of W with its entries rearranged so that a row holds one
    block of W (Van Loan and Pitsianis 1993).

    Attributes:
        terms: how many products are summed.
        rows: (m1, m2), whose product is out.
        columns: (n1, n2), whose product is in.
    """

    terms: int
    rows: Fold
    columns: Fold

    name: ClassVar[str] = "kronecker"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Sums of products over the folds nearest to square; none where a side is prime."""
        rows, columns = (fold(size, 2) for size in region.shape)
        if rows is None or columns is None:
            return
        (m1, m2), (n1, n2) = rows, columns
        limit = -(-m1 * m2 * n1 * n2 // (m1 * n1 + m2 * n2))
        yield from (cls(terms, (m1, m2), (n1, n2)) for terms in rank_grid(limit, limit))

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``left`` (m1, k, n1), the A_k; ``right`` (k, m2, n2), the B_k."""
        require_fold(self.rows, self.columns, region)
        (m1, m2), (n1, n2) = self.rows, self.columns
        require_rank(self.terms, min(m1 * n1, m2 * n2), region)
        return {"left": (m1, self.terms, n1), "right": (self.terms, m2, n2)}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Measured at the fit: the metric is no Kronecker product."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The better of two truncations of the rearranged weight, then A and B in turn moved in the metric.

        One is unweighted; the other is optimal for the metric (G₁ ⊗ G₂) ΔW (A₁ ⊗ A₂), of which the four are
        the partial traces of G and A.
        """
        region, metric = analysis.region, analysis.metric
        self.factor_shapes(region)
        weight = require_finite(analysis.weight, region.name)
        weighted = _parts(metric.output, self.rows), _parts(metric.input, self.columns)
        plain = _parts(None, self.rows), _parts(None, self.columns)
        starts = [self._truncation(weight, *parts) for parts in (plain, weighted)]
        return self, refine_best(self.to_dense, starts, analysis)

    def _truncation(self, weight: Tensor, outputs: Parts, inputs: Parts) -> Factors:
        """Van Loan and Pitsianis' optimum in the separable metric, whose parts' roots are taken out again."""
        (m1, m2), (n1, n2) = self.rows, self.columns
        (g1, h1), (g2, h2) = (root_and_inverse(part, "partial trace of an output moment") for part in outputs)
        (a1, b1), (a2, b2) = (root_and_inverse(part, "partial trace of an input moment") for part in inputs)
        folded = weight.double().reshape(m1, m2, n1, n2)
        lifted = torch.einsum("abcd,ea,fb,gc,hd->egfh", folded, g1, g2, a1, a2).reshape(m1 * n1, m2 * n2)
        left, right = truncate_blocks(lifted, self.terms)
        return {
            "left": torch.einsum("egk,ea,gc->akc", left.reshape(m1, n1, -1), h1, b1),
            "right": torch.einsum("kfh,fb,hd->kbd", right.reshape(-1, m2, n2), h2, b2),
        }

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """Y = Σ_k A_k X B_kᵀ with x and y folded to X (n1, n2) and Y (m1, m2)."""
        left, right = factors["left"], factors["right"]
        (_, terms, n1), (_, m2, n2) = left.shape, right.shape
        inner = functional.linear(x.reshape(*x.shape[:-1], n1, n2), right.flatten(0, 1))
        crossed = inner.reshape(*x.shape[:-1], n1, terms, m2).transpose(-3, -1).flatten(-2)
        return functional.linear(crossed, left.flatten(1)).transpose(-2, -1).flatten(-2)

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """Σ_k A_k ⊗ B_k."""
        return torch.einsum("akc,kbd->abcd", factors["left"], factors["right"]).flatten(2).flatten(0, 1)

    def geometry(self, region: Region) -> GeometricForm:
        """Parents v x w = A_k and, at each of their places, children e x f = B_k (the taxonomy's eq. 14)."""
        (m1, m2), (n1, n2) = self.rows, self.columns
        spaces = Subspace("v", m1, m1), Subspace("w", n1, n1), Subspace("e", m2, m2), Subspace("f", n2, n2)
        steps = (
            Transformation("direct_product", ("v", "w"), "parents"),
            Transformation("direct_product", ("e", "f"), "children"),
            Transformation("direct_product", ("parents", "children"), "term"),
            Transformation("add", ("term",), "weight"),
        )
        return GeometricForm(spaces, steps)


def _parts(moment: Tensor | None, fold: Fold) -> Parts:
    """Partial traces of a moment over either index of its fold: the factors of the nearest separable one."""
    matrix = torch.eye(fold[0] * fold[1], dtype=torch.float64) if moment is None else whole(moment)
    folded = matrix.reshape(*fold, *fold)
    return torch.einsum("abcb->ac", folded), torch.einsum("abac->bc", folded)
