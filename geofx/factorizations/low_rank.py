"""W ≈ L R with L (out, r) and R (r, in): project onto r axes, expand again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from geofx.factorizations.contract import Factors, of_site, pair_ranks, require_rank, stored
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weighting, Weights


@dataclass(frozen=True)
class LowRank:
    """argmin over rank r of tr(G (W - L R) A (W - L R)ᵀ); r (out + in) numbers.

    Sites of a ``shared_input`` region share R and have rows of L of their own.

    ``weighting`` says what stands for A and G, with p = ``power``, which the diagonal one alone reads:

    * ``"input"``: A and I (DRONE, Chen et al. 2021; SVD-LLM, Wang et al. 2025).
    * ``"input_diagonal"``: diag(A)^p and I. ASVD (Yuan et al. 2023) scales inputs by mean|x_j|^α; here by
      the root mean square, (A_jj)^{α/2}, so p = α. FWSVD (Hsu et al. 2022) weights each input by its
      Fisher information Σ_i E[(∂ℓ/∂W_ij)²]; with x and g independent that is A_jj tr G, so p = 1.
    * ``"none"``: I and I (truncated SVD, Eckart and Young 1936).
    """

    rank: int
    weighting: Weighting = "two_sided"
    power: float = 1.0

    name: ClassVar[str] = "low_rank"
    regions: ClassVar[frozenset[RegionKind]] = frozenset(
        {"single", "shared_input", "embedding", "tied_embedding"}
    )
    closed_form: ClassVar[bool] = True

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Ranks below out · in / (out + in), where the pair would be as big as the weight."""
        yield from (cls(rank) for rank in pair_ranks(region))

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``right`` (r, in), which all sites share, and ``left`` (out, r) of each."""
        require_rank(self.rank, min(region.shape), region)
        lefts = {of_site("left", index): (rows, self.rank) for index, rows in enumerate(region.rows)}
        return {**lefts, "right": (self.rank, region.shape[1])}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Σ_{i > r} σ_i² of G^{1/2} W A^{1/2}; for other weightings, what their optimum loses in A and G."""
        if self.weighting == "two_sided":
            return analysis.spectrum.tail(self.rank)
        losses = analysis.losses_under(self.weighting, self.power)
        return losses[min(self.rank, len(losses) - 1)]

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The leading r columns and rows of the truncation, in the weight's dtype."""
        whole = analysis.truncation_under(self.weighting, self.power)
        lefts = torch.split(whole.left[:, : self.rank], list(analysis.region.rows))
        parts = {of_site("left", index): left for index, left in enumerate(lefts)}
        parts["right"] = whole.right[: self.rank]
        like = next(iter(weights.values()))
        return self, stored(parts, like)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """(x Rᵀ) Lᵀ."""
        return functional.linear(functional.linear(x, factors["right"]), factors[of_site("left", site)])

    def lookup(self, ids: Tensor, factors: Factors) -> Tensor:
        """L[ids] R."""
        return functional.embedding(ids, factors["left"]) @ factors["right"]

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """L R."""
        return factors[of_site("left", site)] @ factors["right"]

    def geometry(self, region: Region) -> GeometricForm:
        """Two subspaces of dimension r: project onto one, expand from the other."""
        rows, columns = region.shape
        spaces = Subspace("input", self.rank, columns), Subspace("output", self.rank, rows)
        steps = (
            Transformation("project", ("input",), "latent"),
            Transformation("scale", ("latent",), "latent"),
            Transformation("expand", ("latent",), "output"),
        )
        return GeometricForm(spaces, steps)
