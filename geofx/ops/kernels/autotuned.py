"""How kernels are launched: with the tile that is fastest on this GPU, or the first under the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from geofx.ops.tiles import EXACT_TILES, TILES, Tile, tiles_for

Grid = Callable[[dict[str, Any]], tuple[int, ...]]


class Autotuned:
    """A kernel whose constants ``BT``, ``BM``, ``BR`` and ``BK`` are chosen per shape.

    Tokens count by their bit length: one token, a few, many are tuned apart, every number is not.

    Attributes:
        kernel: of `triton.jit`.
        untuned: the tile where nothing is tuned: under the interpreter, and where tuning runs out of memory.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.untuned = kernel, TILES[0]
        self.tuned = {tiles: _tuned(kernel, tiles) for tiles in (TILES, EXACT_TILES)}

    def __call__(self, grid: Grid, x: Tensor, *arguments: Any, **constants: Any) -> None:
        """Launch on the device of ``x``."""
        if not x.is_cuda:
            self.kernel[grid](x, *arguments, **constants, **self.untuned.numbers())
            return
        with torch.cuda.device(x.device):
            try:
                self.tuned[tiles_for(constants["PRECISION"])][grid](x, *arguments, **constants)
            except torch.OutOfMemoryError:  # tuning takes memory, the kernel none
                torch.cuda.empty_cache()
                self.kernel[grid](x, *arguments, **constants, **self.untuned.numbers())


def token_bits(tokens: int) -> int:
    """What numbers of tokens are tuned together by."""
    return tokens.bit_length()


def precision(x: Tensor) -> str:
    """Of products: float32 as three products of TF32, or one where torch was told that it will do.

    Three are as exact as float32 to a few units in the last place, and run on tensor cores: sums of single
    products would spill registers. GPUs without TF32 have those alone. Half precision has one kind, "tf32".
    """
    if x.dtype != torch.float32:
        return "tf32"
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def of_length(bias: Tensor | None, outputs: int, other: Tensor) -> Tensor:
    """A bias in one run of memory, one number broadcast; ``other`` stands in where there is none."""
    return other if bias is None else bias.expand(outputs).contiguous()


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


def _tuned(kernel: Any, tiles: Sequence[Tile]) -> Any:
    configs = [triton.Config(tile.numbers(), num_warps=tile.warps, num_stages=tile.stages) for tile in tiles]
    return triton.autotune(configs, key=["token_bits", "N", "R", "M", "PRECISION"])(kernel)
