"""The contract of a cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from geofx.workload import Workload


@dataclass(frozen=True)
class Device:
    """What a piece of hardware does at best.

    Attributes:
        flops_per_s: peak arithmetic rate, a multiply-add being 2.
        bytes_per_s: sustained memory bandwidth.
        launch_s: time of the smallest call.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    launch_s: float


class CostModel(Protocol):
    """Workload -> seconds per call, for one device."""

    name: ClassVar[str]

    def latency_s(self, work: Workload) -> float:
        """Predicted seconds of one call."""
        ...
