"""t = max(flops / peak, bytes / bandwidth) + launches · overhead (Williams, Waterman and Patterson, 2009)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from geofx.cost_models.contract import Device, Priced
from geofx.errors import ConfigError
from geofx.workload import Workload


@dataclass(frozen=True)
class Roofline:
    """The time that no schedule can beat: arithmetic or memory, whichever binds, and the launches.

    Attributes:
        device: its peaks.
        tokens: how many tokens a call processes; weights are read once per call.
        dtype: whose peak counts.

    Raises:
        ConfigError: the device has no peak of that dtype.
    """

    device: Device
    tokens: int = 1
    dtype: str = "float32"

    name: ClassVar[str] = "roofline"
    unit: ClassVar[str] = "seconds"

    def __post_init__(self) -> None:
        if self.dtype not in self.device.flops_per_s:
            known = ", ".join(self.device.flops_per_s)
            raise ConfigError(f"{self.device.name} has no peak of {self.dtype}", fix=f"use one of {known}")

    def cost(self, item: Priced) -> float:
        """Seconds of one call on ``tokens`` tokens, numbers being stored as ``dtype``."""
        stored: torch.dtype = getattr(torch, item.region.sites[0].dtype)
        wanted: torch.dtype = getattr(torch, self.dtype)
        return self.latency_s(item.workload, wanted.itemsize / stored.itemsize)

    def latency_s(self, work: Workload, bytes_ratio: float = 1.0) -> float:
        """Seconds of one call; ``bytes_ratio`` scales the bytes of ``work``."""
        arithmetic = work.flops * self.tokens / self.device.flops_per_s[self.dtype]
        traffic = bytes_ratio * (work.weight_bytes + work.activation_bytes * self.tokens)
        return max(arithmetic, traffic / self.device.bytes_per_s) + work.launches * self.device.launch_s
