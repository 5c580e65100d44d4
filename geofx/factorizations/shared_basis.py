"""W_i ≈ L_i R for every layer i of a stack: one input basis R (r, in), a mixture L_i (out, r) per layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from geofx.factorizations.contract import Factors, measured_loss, of_site, rank_grid, require_rank, stored
from geofx.factorizations.refine import refine
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weighting, Weights

WEIGHTINGS: tuple[Weighting, ...] = ("two_sided", "none")
"""Truncations that a fit starts from."""


@dataclass(frozen=True)
class SharedBasis:
    """argmin over R and all L_i of Σ_i tr(G_i (W_i - L_i R) A_i (W_i - L_i R)ᵀ); r (in + Σ out) numbers.

    Basis Sharing (Wang et al., 2025), which takes one A for all layers and no G; here both are each
    layer's own. Starts from the truncation of the weights one below the other.
    """

    rank: int

    name: ClassVar[str] = "shared_basis"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"stack"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Ranks at which basis and mixtures are smaller than the weights."""
        rows, columns = region.shape
        limit = min(columns, -(-rows * columns // (rows + columns)))
        yield from (cls(rank) for rank in rank_grid(limit, columns))

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``right`` (r, in), which all layers share, and ``left`` (out, r) of each."""
        require_rank(self.rank, min(region.shape), region)
        lefts = {of_site("left", index): (rows, self.rank) for index, rows in enumerate(region.rows)}
        return {**lefts, "right": (self.rank, region.shape[1])}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """That of the factors that `fit` finds: layers have inputs of their own, so no spectrum has it."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The truncation under the mean A, or under none where that is nearer, refined under each layer's."""
        target = analysis.stacked
        starts = [self._start(analysis, weighting, target.dtype) for weighting in WEIGHTINGS]
        best = min(starts, key=lambda parts: analysis.stacked_loss(target - _dense(parts)))
        refined = refine(_dense, best, target, analysis.stacked_gradient())
        factors = {of_site("left", site): left for site, left in enumerate(refined["left"])}
        factors["right"] = refined["right"]
        like = next(iter(weights.values()))
        return self, stored(factors, like)

    def _start(self, analysis: RegionAnalysis, weighting: Weighting, dtype: torch.dtype) -> dict[str, Tensor]:
        whole = analysis.truncation_under(weighting)
        lefts = whole.left[:, : self.rank].reshape(len(analysis.weights), -1, self.rank)
        return {"left": lefts.to(dtype), "right": whole.right[: self.rank].to(dtype)}

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """(x Rᵀ) L_iᵀ."""
        return functional.linear(functional.linear(x, factors["right"]), factors[of_site("left", site)])

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """L_i R."""
        return factors[of_site("left", site)] @ factors["right"]

    def geometry(self, region: Region) -> GeometricForm:
        """One input subspace of dimension r for all layers, one output subspace for each."""
        outputs = tuple(
            Subspace(of_site("output", index), min(self.rank, rows), rows)
            for index, rows in enumerate(region.rows)
        )
        steps = tuple(Transformation("expand", ("latent",), space.name) for space in outputs)
        return GeometricForm(
            (Subspace("input", self.rank, region.shape[1]), *outputs),
            (Transformation("project", ("input",), "latent"), *steps),
        )


def _dense(parts: Factors) -> Tensor:
    return torch.matmul(parts["left"], parts["right"])
