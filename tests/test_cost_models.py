"""The roofline: which side binds, and figures of a real device that make sense."""

from __future__ import annotations

import pytest

from geofx.cost_models.contract import Device
from geofx.cost_models.roofline import Roofline, measured_device
from geofx.workload import Workload

WORK = Workload(flops=2e6, parameters=10**6, weight_bytes=4 * 10**6, activation_bytes=4000.0, launches=2)
DEVICE = Device("paper", flops_per_s=1e12, bytes_per_s=1e11, launch_s=1e-6)


def test_one_token_is_bound_by_memory_and_many_by_arithmetic() -> None:
    assert Roofline(DEVICE, 1).latency_s(WORK) == pytest.approx(4.004e6 / 1e11 + 2e-6)
    assert Roofline(DEVICE, 4096).latency_s(WORK) == pytest.approx(4096 * 2e6 / 1e12 + 2e-6)


def test_a_real_device_has_sane_peaks() -> None:
    device = measured_device(256)
    assert 1e8 < device.flops_per_s < 1e15
    assert 1e8 < device.bytes_per_s < 1e13
    assert 0.0 < device.launch_s < 1e-2
