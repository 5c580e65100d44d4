"""W ≈ (W P) Pᵀ with P (in, r) orthonormal and static: the input's subspace, chosen by its activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn import functional

from geofx.errors import ConfigError
from geofx.factorizations.blocks import whole
from geofx.factorizations.contract import Factorization, Factors, of_site, pair_ranks, require_rank, stored
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import eigh_psd
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights, on_left

Criterion = Literal["best", "mse", "nmse", "go_mse", "go_nmse", "nl_mse", "nl_nmse"]

PLAIN: tuple[Criterion, ...] = ("mse", "go_mse", "nl_mse")
NORMALISED: tuple[Criterion, ...] = ("nmse", "go_nmse", "nl_nmse")
"""Criteria over x, and the same over x / ‖x‖, which need an analysis that recorded directions."""

_LOSSES: WeakKeyDictionary[RegionAnalysis, dict[Criterion, list[float]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ActivationSubspace:
    """P = the leading r eigenvectors of one of six matrices; r (out + in) numbers (Sakr and Khailany, 2024).

    With A = E[x xᵀ], C_W = Wᵀ W / out and C_∇ = E[∇ₓ ∇ₓᵀ] = Wᵀ G W they are ``mse``: A; ``go_mse`` (output of
    the product): A C_W + C_W A; ``nl_mse`` (loss of the network): A C_∇ + C_∇ A. ``nmse``, ``go_nmse`` and
    ``nl_nmse`` take the A of x / ‖x‖. The products are not definite: where one direction carries most of A,
    half of it goes to their last eigenvector, which is dropped, so that ``go_*`` and ``nl_*`` can lose far
    more than ``mse``. ``best`` is the one predicted to lose least here; `fit` names it.

    Sites of a ``shared_input`` region share P. At equal rank it is never better than `LowRank`, which is not
    held to W P and one P; its point is that W stays whole and trainable while P is applied.
    """

    rank: int
    criterion: Criterion = "best"

    name: ClassVar[str] = "activation_subspace"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single", "shared_input"})
    closed_form: ClassVar[bool] = False
    static: ClassVar[frozenset[str]] = frozenset({"projection"})

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Ranks below out · in / (out + in), where the pair would be as big as the weight."""
        yield from (cls(rank) for rank in pair_ranks(region))

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``projection`` Pᵀ (r, in), which all sites share, and ``weight`` W P (out, r) of each."""
        require_rank(self.rank, region.shape[1], region)
        weights = {of_site("weight", index): (rows, self.rank) for index, rows in enumerate(region.rows)}
        return {**weights, "projection": (self.rank, region.shape[1])}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """tr(G W Q A Q Wᵀ) with Q = I - P Pᵀ, for every rank from one eigenproblem."""
        return losses(analysis, self._resolved(analysis))[self.rank]

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """P by the criterion, and W P of each site, in the weight's dtype."""
        criterion = self._resolved(analysis)
        basis = eigenbasis(analysis, criterion)[:, : self.rank]
        parts = {
            of_site("weight", index): weight.double() @ basis for index, weight in enumerate(weights.values())
        }
        parts["projection"] = basis.T
        like = next(iter(weights.values()))
        return replace(self, criterion=criterion), stored(parts, like)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """(x P) (W P)ᵀ."""
        return functional.linear(
            functional.linear(x, factors["projection"]), factors[of_site("weight", site)]
        )

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """(W P) Pᵀ."""
        return factors[of_site("weight", site)] @ factors["projection"]

    def unfold(self, factors: Factors, dense: Tensor) -> tuple[Factorization, dict[str, Tensor]]:
        """W whole, behind P: (x P Pᵀ) Wᵀ."""
        return Projected(self.rank), {**factors, "weight": dense}

    def fold(self, trained: Factors) -> dict[str, Tensor]:
        """W P."""
        return {**trained, "weight": trained["weight"] @ trained["projection"].T}

    def geometry(self, region: Region) -> GeometricForm:
        """One subspace, of the input: an orthogonal projection onto it, and back."""
        spaces = (Subspace("input", self.rank, region.shape[1]),)
        steps = (
            Transformation("project", ("input",), "latent"),
            Transformation("expand", ("latent",), "input"),
        )
        return GeometricForm(spaces, steps)

    def _resolved(self, analysis: RegionAnalysis) -> Criterion:
        if self.criterion != "best":
            return self.criterion
        usable = PLAIN if analysis.directions is None else PLAIN + NORMALISED
        return min(usable, key=lambda criterion: losses(analysis, criterion)[self.rank])


class Projected(ActivationSubspace):
    """`ActivationSubspace` as it is trained: ``weight`` is W (out, in)."""

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """(x P Pᵀ) Wᵀ."""
        projected = functional.linear(x, factors["projection"]) @ factors["projection"]
        return functional.linear(projected, factors["weight"])

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """W P Pᵀ."""
        return factors["weight"] @ factors["projection"].T @ factors["projection"]


def eigenbasis(analysis: RegionAnalysis, criterion: Criterion) -> Tensor:
    """The eigenvectors (in, in) of a criterion's matrix, leading first, in float64.

    Raises:
        ConfigError: the criterion is over x / ‖x‖, of which the analysis has no second moment.
    """
    weight, metric, columns = analysis.weight.double(), analysis.metric, analysis.region.shape[1]
    moment = analysis.directions if criterion in NORMALISED else metric.input
    if moment is None and criterion in NORMALISED:
        raise ConfigError(
            f"criterion {criterion!r} needs the second moment of normalised inputs",
            where=analysis.region.name,
            fix="analyze(..., directions=True)",
        )
    matrix = whole(moment, columns)
    if criterion.startswith(("go", "nl")):
        rows = metric.left(weight) if criterion.startswith("nl") else weight
        product = matrix @ (weight.T @ rows)
        matrix = product + product.T
    return eigh_psd(matrix, f"{criterion} at {analysis.region.name}")[1]


def losses(analysis: RegionAnalysis, criterion: Criterion) -> list[float]:
    """What each rank 0 .. in loses: with eigenvectors E, Σ_{i, j >= r} (Eᵀ Wᵀ G W E)_ij (Eᵀ A E)_ij."""
    known = _LOSSES.setdefault(analysis, {})
    if criterion not in known:
        basis, metric = eigenbasis(analysis, criterion), analysis.metric
        mapped = analysis.weight.double() @ basis
        terms = (mapped.T @ metric.left(mapped)) * (basis.T @ on_left(metric.input, basis))
        tails = terms.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        known[criterion] = [*(metric.scale * tails.clamp_min(0.0)).tolist(), 0.0]
    return known[criterion]
