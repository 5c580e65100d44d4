"""Tiles that kernels are tried at: plain numbers, known without Triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel holds at once.

    Attributes:
        tokens: rows of x.
        outputs: columns of y.
        rank: columns of z = x Rᵀ.
        inputs: columns of x per step.
        warps: of 32 threads.
        stages: loads in flight.
    """

    tokens: int
    outputs: int
    rank: int
    inputs: int
    warps: int = 4
    stages: int = 3

    def numbers(self) -> dict[str, int]:
        """As the kernels' constants."""
        return {"BT": self.tokens, "BM": self.outputs, "BR": self.rank, "BK": self.inputs}


TILES: tuple[Tile, ...] = (
    Tile(16, 64, 64, 32),
    Tile(16, 128, 64, 32),
    Tile(32, 64, 64, 32),
    Tile(64, 64, 64, 32),
    Tile(64, 128, 64, 32, warps=8),
    Tile(128, 64, 64, 32, warps=8),
)
"""For `geofx.ops.kernels`: few tokens first. None spills a register on an sm_80 or sm_90, for
float16, bfloat16 and TF32."""

EXACT_TILES: tuple[Tile, ...] = (
    Tile(16, 64, 64, 32),
    Tile(16, 128, 32, 32),
    Tile(32, 64, 64, 32),
    Tile(64, 64, 32, 32, warps=8),
    Tile(64, 128, 32, 32, warps=8),
)
"""For products of float32 that are not rounded to TF32, which take three times the registers."""


def tiles_for(precision: str) -> tuple[Tile, ...]:
    """Those to try, by what `geofx.ops.kernels.autotuned.precision` says."""
    return EXACT_TILES if precision in ("tf32x3", "ieee") else TILES
