"""y = W x, as it was: leaving a weight whole is an option like any other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor
from torch.nn import functional

from geofx.factorizations.contract import Factors
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights


@dataclass(frozen=True)
class Dense:
    """W itself, out · in numbers; the lowering leaves such a region untouched."""

    name: ClassVar[str] = "dense"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """One: itself."""
        yield cls()

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``weight`` (out, in)."""
        return {"weight": region.site.shape}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Zero."""
        return 0.0

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The weight."""
        return self, {"weight": weights[analysis.region.site.weight]}

    def apply(self, x: Tensor, factors: Factors) -> Tensor:
        """x Wᵀ."""
        return functional.linear(x, factors["weight"])

    def to_dense(self, factors: Factors) -> Tensor:
        """W."""
        return factors["weight"]

    def geometry(self, region: Region) -> GeometricForm:
        """One map between the whole input and the whole output space."""
        rows, columns = region.site.shape
        spaces = Subspace("input", columns, columns), Subspace("output", rows, rows)
        return GeometricForm(spaces, (Transformation("identity", ("input",), "output"),))
