"""W_i ≈ W for every layer i of a stack: one weight for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor
from torch.nn import functional

from geofx.errors import PlanError
from geofx.factorizations.contract import Factors, measured_loss, stored
from geofx.factorizations.refine import refine
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

STEPS = 12
"""Conjugate gradient steps on Σ_i G_i W A_i = Σ_i G_i W_i A_i, which has no closed form for layers > 1."""


@dataclass(frozen=True)
class SharedWeight:
    """argmin over W of Σ_i tr(G_i (W_i - W) A_i (W_i - W)ᵀ); out · in numbers for all layers.

    ALBERT's sharing across layers (Lan et al., 2020), without its training: it starts from the mean.
    """

    name: ClassVar[str] = "shared_weight"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"stack"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """One: there is nothing to set."""
        yield cls()

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``weight`` (out, in), which all layers share."""
        if len(set(region.rows)) > 1:
            raise PlanError(
                "layers of several shapes cannot share a weight", where=region.name, fix="split it"
            )
        return {"weight": region.sites[0].shape}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """That of the weight that `fit` finds."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The mean of the weights, moved by conjugate gradients towards the weighted optimum."""
        target = analysis.stacked
        start = {"weight": target.mean(0)}
        refined = refine(
            lambda parts: parts["weight"].expand_as(target),
            start,
            target,
            analysis.stacked_gradient(),
            1,
            STEPS,
        )
        like = next(iter(weights.values()))
        return self, stored(refined, like)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """x Wᵀ."""
        return functional.linear(x, factors["weight"])

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """W."""
        return factors["weight"]

    def geometry(self, region: Region) -> GeometricForm:
        """One map between the whole input and the whole output space, the same in all layers."""
        rows, columns = region.sites[0].shape
        spaces = Subspace("input", columns, columns), Subspace("output", rows, rows)
        return GeometricForm(spaces, (Transformation("identity", ("input",), "output"),))
