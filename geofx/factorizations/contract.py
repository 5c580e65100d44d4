"""The contract of a factorization; the formats live one per file beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol, Self, runtime_checkable

from torch import Tensor

from geofx.errors import PlanError
from geofx.geometry import GeometricForm
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

Factors = Mapping[str, Tensor]


@runtime_checkable
class Factorization(Protocol):
    """A named way to write the weights of a region as smaller factors: a frozen dataclass of settings.

    Laws, tested for every format: ``apply(x, F) == x @ to_dense(F)ᵀ``; a weight that has the structure
    is recovered exactly; ``fit`` gives the shapes that ``factor_shapes`` declares.
    """

    name: ClassVar[str]
    regions: ClassVar[frozenset[RegionKind]]

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Settings worth pricing for ``region``; none where the shape does not fit."""
        ...

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """Shape of each factor."""
        ...

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Increase of the model's loss, tr(G ΔW A ΔWᵀ), in the analysis' unit."""
        ...

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The factors, and this format with the settings that depend on the data filled in.

        Raises:
            NumericsError: the factors would not be finite or not accurate in the weight's dtype.
        """
        ...

    def apply(self, x: Tensor, factors: Factors) -> Tensor:
        """y from x (..., in) in aten operations; what graph, flops and exports derive from."""
        ...

    def to_dense(self, factors: Factors) -> Tensor:
        """The (out, in) weight that the factors stand for, written independently of `apply`."""
        ...

    def geometry(self, region: Region) -> GeometricForm:
        """The subspaces of this format and the transformations among them."""
        ...


def rank_grid(limit: int, size: int) -> range:
    """Ranks below ``limit``, in steps that are a power of two and near ``size`` / 64."""
    step = 1 << max(0, (size // 64).bit_length() - 1)
    return range(step, limit, step)


def require_rank(rank: int, limit: int, region: Region) -> None:
    """Raises PlanError unless 1 <= rank <= limit."""
    if not 1 <= rank <= limit:
        raise PlanError(
            f"rank {rank} is outside 1..{limit}",
            where=f"{region.name}, shape {region.site.shape}",
            fix="mend the rank",
        )
