"""t = max(flops / peak, bytes / bandwidth) + launches · overhead (Williams, Waterman and Patterson, 2009)."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from geofx.cost_models.contract import Device
from geofx.workload import Workload

_REPEATS = 9


@dataclass(frozen=True)
class Roofline:
    """The time that no schedule can beat: arithmetic or memory, whichever binds, and the launches.

    Attributes:
        device: its peaks, from a data sheet or from `measured_device`.
        tokens: how many tokens a call processes; weights are read once per call.
    """

    device: Device
    tokens: int = 1

    name: ClassVar[str] = "roofline"

    def latency_s(self, work: Workload) -> float:
        """Seconds of one call on ``tokens`` tokens."""
        arithmetic = work.flops * self.tokens / self.device.flops_per_s
        traffic = (work.weight_bytes + work.activation_bytes * self.tokens) / self.device.bytes_per_s
        return max(arithmetic, traffic) + work.launches * self.device.launch_s


def measured_device(size: int = 1024) -> Device:
    """This machine's CPU, by medians: a square matmul, a copy larger than any cache, and a tiny addition."""
    square, small = torch.rand(size, size), torch.rand(1)
    source = torch.rand(32 * 2**20 // 4)
    target = torch.empty_like(source)
    matmul_s = _median_s(lambda: square @ square)
    copy_s = _median_s(lambda: target.copy_(source))
    launch_s = _median_s(lambda: small + small)
    copied_bytes = 2 * source.numel() * source.element_size()
    return Device(
        platform.processor() or platform.machine(), 2 * size**3 / matmul_s, copied_bytes / copy_s, launch_s
    )


def _median_s(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
