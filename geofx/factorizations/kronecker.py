"""W ≈ Σ_k A_k ⊗ B_k: a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from geofx.factorizations.blocks import Fold, inverses, refine_best, require_fold, truncate_blocks, whole
from geofx.factorizations.contract import Factors, measured_loss, rank_grid, require_rank
from geofx.factorizations.folds import fold
from geofx.factorizations.refine import Operator
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import require_finite, root_and_inverse
from geofx.region import Region, RegionKind
from geofx.region_analysis import Metric, RegionAnalysis, Weights

SWEEPS, STEPS = 1, 8
"""One long update per factor: the terms are many, and overlap more than blocks do."""


class _Side(NamedTuple):
    """Roots and inverse roots of G_i and A_i, the moments that one of the two factors meets."""

    outputs: tuple[Tensor, Tensor]
    inputs: tuple[Tensor, Tensor]

    def lift(self, matrices: Tensor) -> Tensor:
        """G^{1/2} M A^{1/2} for every matrix of a batch."""
        return self.outputs[0].to(matrices) @ matrices @ self.inputs[0].to(matrices)

    def drop(self, matrices: Tensor) -> Tensor:
        """G^{-1/2} M A^{-1/2}."""
        return self.outputs[1].to(matrices) @ matrices @ self.inputs[1].to(matrices)


@dataclass(frozen=True)
class Kronecker:
    """A_k (m1, n1) and B_k (m2, n2); k (m1 n1 + m2 n2) numbers (KnGPT2, Edalati et al. 2022).

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

        One is unweighted; the other is optimal for the separable metric that has G's and A's partial traces.
        """
        region, metric = analysis.region, analysis.metric
        self.factor_shapes(region)
        weight = require_finite(analysis.weight, region.name)
        plain, weighted = (_sides(given, self.rows, self.columns) for given in (Metric(), metric))
        starts = [self._truncation(weight, *sides) for sides in (plain, weighted)]
        inverse = partial(_inverse, weighted)
        return self, refine_best(self.to_dense, starts, analysis, inverse, sweeps=SWEEPS, steps=STEPS)

    def _truncation(self, weight: Tensor, first: _Side, second: _Side) -> Factors:
        """Van Loan and Pitsianis' optimum in the separable metric, whose roots are taken out again."""
        (m1, m2), (n1, n2) = self.rows, self.columns
        folded = weight.double().reshape(m1, m2, n1, n2).permute(0, 2, 1, 3)
        lifted = first.lift(second.lift(folded).permute(2, 3, 0, 1)).permute(2, 3, 0, 1)
        left, right = truncate_blocks(lifted.reshape(m1 * n1, m2 * n2), self.terms)
        terms = first.drop(left.T.reshape(-1, m1, n1)), second.drop(right.reshape(-1, m2, n2))
        return {"left": terms[0].transpose(0, 1), "right": terms[1]}

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


def _sides(metric: Metric, rows: Fold, columns: Fold) -> tuple[_Side, _Side]:
    """The separable metric (G₁ ⊗ G₂) ΔW (A₁ ⊗ A₂) of the partial traces of G and A, as its two sides."""
    first, second = zip(_roots(metric.output, rows), _roots(metric.input, columns), strict=True)
    return _Side(*first), _Side(*second)


def _roots(moment: Tensor | None, parts: Fold) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    folded = whole(moment, parts[0] * parts[1]).reshape(*parts, *parts)
    traces = torch.einsum("abcb->ac", folded), torch.einsum("abac->bc", folded)
    first, second = (root_and_inverse(trace, "partial trace of a moment") for trace in traces)
    return first, second


def _inverse(sides: tuple[_Side, _Side], name: str, factors: Factors) -> Operator:
    """The exact inverse where the metric is separable: that of both moments and of the terms' Gram matrix."""
    parts = factors["left"].transpose(0, 1), factors["right"]
    (own, other), fixed = (sides, parts[1]) if name == "left" else (sides[::-1], parts[0])
    lifted = other.lift(fixed).flatten(1)
    bond = inverses(lifted @ lifted.T)

    def inverse(slope: Tensor) -> Tensor:
        terms = slope.transpose(0, 1) if name == "left" else slope
        solved = (bond @ own.drop(own.drop(terms)).flatten(1)).reshape(terms.shape)
        return solved.transpose(0, 1) if name == "left" else solved

    return inverse
