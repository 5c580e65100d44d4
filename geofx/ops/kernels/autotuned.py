"""How kernels are launched: with the tile that is fastest on this GPU, or the first under the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from geofx.ops.tiles import TILES

Grid = Callable[[dict[str, Any]], tuple[int, ...]]


class Autotuned:
    """A kernel whose constants ``BT``, ``BM``, ``BR`` and ``BK`` are chosen per shape.

    Tokens count by their bit length: one token, a few, many are tuned apart, every number is not.
    """

    def __init__(self, kernel: Any) -> None:
        configs = [
            triton.Config(tile.numbers(), num_warps=tile.warps, num_stages=tile.stages) for tile in TILES
        ]
        self.kernel = kernel
        self.tuned = triton.autotune(configs, key=["token_bits", "N", "R", "M", "PRECISION"])(kernel)

    def __call__(self, grid: Grid, x: Tensor, *arguments: Any, **constants: Any) -> None:
        """Launch on the device of ``x``."""
        if not x.is_cuda:
            self.kernel[grid](x, *arguments, **constants, **TILES[0].numbers())
            return
        with torch.cuda.device(x.device):
            self.tuned[grid](x, *arguments, **constants)


def token_bits(tokens: int) -> int:
    """What numbers of tokens are tuned together by."""
    return tokens.bit_length()


def precision(x: Tensor) -> str:
    """Of products of float32: exact, unless torch was told that TF32 will do."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)
