"""y = W x, as it was: leaving a weight whole is an option like any other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self, get_args

from torch import Tensor
from torch.nn import functional

from geofx.factorizations.contract import Factors, of_site
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.region import OWN, Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights


@dataclass(frozen=True)
class Dense:
    """W itself, out · in numbers; the lowering leaves such a region untouched."""

    name: ClassVar[str] = "dense"
    regions: ClassVar[frozenset[RegionKind]] = frozenset(get_args(RegionKind))
    closed_form: ClassVar[bool] = True

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """One: itself, where the region is one site; several stay dense each on its own."""
        if region.kind in OWN:
            yield cls()

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``weight`` (out, in) of each site."""
        return {of_site("weight", index): site.shape for index, site in enumerate(region.sites)}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Zero."""
        return 0.0

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The weight."""
        return self, {of_site("weight", index): weight for index, weight in enumerate(weights.values())}

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """x Wᵀ."""
        return functional.linear(x, factors[of_site("weight", site)])

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """W."""
        return factors[of_site("weight", site)]

    def lookup(self, ids: Tensor, factors: Factors) -> Tensor:
        """W[ids]."""
        return functional.embedding(ids, factors["weight"])

    def geometry(self, region: Region) -> GeometricForm:
        """One map between the whole input and the whole output space."""
        rows, columns = region.shape
        spaces = Subspace("input", columns, columns), Subspace("output", rows, rows)
        return GeometricForm(spaces, (Transformation("identity", ("input",), "output"),))
