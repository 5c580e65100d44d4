"""Triton kernels compiled ahead of time for GPUs that are not here: what the binaries take of them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from geofx.ops.kernels import resources
from geofx.ops.kernels.resources import LOOKUPS, SHARED_LIMITS, TILED, Resources, compiled, tiled_resources
from geofx.ops.tiles import Tile, tiles_for

KINDS = {"fp32": "tf32x3", "tf32": "tf32", "fp16": "tf32", "bf16": "tf32"}
"""Numbers -> precision of their products."""


def require_fits(found: Resources, label: str) -> None:
    assert found.stack_bytes == 0, f"{label} spills registers: {found}"
    assert found.registers <= 255
    assert found.shared_bytes <= SHARED_LIMITS[found.capability], f"{label}: {found}"
    assert 0.0 < found.occupancy <= 1.0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TILED)
def test_no_tile_spills_registers(name: str, kind: str, capability: int) -> None:
    dtype = "fp32" if kind == "tf32" else kind
    for tile in tiles_for(KINDS[kind]):
        require_fits(tiled_resources(name, tile, dtype, capability, KINDS[kind]), f"{name}, {tile}")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", LOOKUPS)
def test_no_lookup_spills_registers(name: str, dtype: str, capability: int) -> None:
    kernel, constants = LOOKUPS[name]
    require_fits(compiled(kernel, constants, dtype, capability), name)


def test_a_tile_that_is_too_large_is_found_out() -> None:
    found = tiled_resources("low_rank_linear", Tile(128, 128, 128, 64), "fp32", 80, "tf32x3")
    with pytest.raises(AssertionError, match="spills registers"):
        require_fits(found, "too large")


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "occupancy"),
    [
        (32, 0, 4, 1.0),  # 2048 threads hold 65536 registers
        (64, 0, 4, 0.5),
        (65, 0, 4, 7 / 16),  # in steps of 256 a warp: 72 a thread, 7 programs of 128 threads
        (32, 80 * 1024, 4, 2 / 16),  # 164 KiB hold two of 81
    ],
)
def test_occupancy_is_the_guides(registers: int, shared: int, warps: int, occupancy: float) -> None:
    assert Resources(registers, 0, shared, warps, 80).occupancy == pytest.approx(occupancy)


def test_what_a_binary_takes_is_read_from_the_compilers_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_REPORT", resources.re.compile("never"))
    with pytest.raises(RuntimeError, match="cuobjdump does not report"):
        tiled_resources("low_rank_linear", Tile(16, 64, 64, 32), "fp16", 80)
