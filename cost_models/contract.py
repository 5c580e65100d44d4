"""The contract of a cost model, and what it prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from geofx.factorizations import Factorization
from geofx.region import Region
from geofx.workload import Workload


@dataclass(frozen=True)
class Device:
    """What a piece of hardware does at best.

    Attributes:
        flops_per_s: peak arithmetic rate of matmuls by dtype, a multiply-add being 2.
        bytes_per_s: memory bandwidth.
        launch_s: time of the smallest call.
        processors: streaming multiprocessors, or cores.
        cache_bytes_per_s: bandwidth of the cache that all processors share; None where no figure is known,
            and then it counts as no faster than memory.
        has_kernels: whether those of `geofx.ops` run there.
        source: where the figures are from.
    """

    name: str
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    launch_s: float
    processors: int = 1
    cache_bytes_per_s: float | None = None
    has_kernels: bool = True
    source: str = ""


class Priced(Protocol):
    """What a price is of: a region written in some form; `geofx.options.Option` is one.

    ``workload`` is per token of the model, ``rows_per_token`` how often the region is used by it.
    """

    @property
    def region(self) -> Region: ...  # noqa: D102

    @property
    def factorization(self) -> Factorization: ...  # noqa: D102

    @property
    def workload(self) -> Workload: ...  # noqa: D102

    @property
    def rows_per_token(self) -> float: ...  # noqa: D102


class CostModel(Protocol):
    """What an option costs the model, in ``unit``."""

    name: ClassVar[str]
    unit: ClassVar[str]

    def cost(self, item: Priced) -> float:
        """The cost of ``item``, >= 0: costs of all regions add up to that of the model."""
        ...
