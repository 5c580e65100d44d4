"""Where fused kernels win on a GPU and where ranks must stop: computed from peaks, nothing is measured.

    python benchmarks/gpu_paper.py > docs/gpu.md

`geofx.cost_models.kernels` has the formulas, `geofx.cost_models.devices` the peaks and their sources.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

from geofx.cost_models import DEVICES, Device
from geofx.cost_models.kernels import Shape, Work, block_diagonal, block_diagonal_chain, fastest, total_s

DTYPE = "bfloat16"
SHAPES = {
    "7B q, o": (4096, 4096),
    "7B gate, up": (4096, 11008),
    "7B down": (11008, 4096),
    "70B q, o": (8192, 8192),
    "70B k, v": (8192, 1024),
    "70B gate, up": (8192, 28672),
    "70B down": (28672, 8192),
}
"""Inputs and outputs of the matmuls of such models."""
TOKENS = (1, 16, 128, 2048)
BLOCKS = 16
INTRODUCTION = """# Fused kernels on a GPU, on paper

Computed, not measured: `python benchmarks/gpu_paper.py > docs/gpu.md`. Times are max(arithmetic, memory, L2)
and a launch per kernel, from the peaks in `cost_models/devices.py`. Matmuls of the library are priced at
their roofline, which they do not reach; kernels of `geofx.ops` with all that they compute and read twice.
`benchmarks/gpu.py` checks and times the same on a GPU that is there.

* **dense**: y = x Wᵀ. **chain**: the factorized form as the library runs it, z = x Rᵀ going through memory.
  **kernel**: one launch, z stays on the chip, at the best of its tiles.
* **fuse to**: ranks up to this one are faster by the kernel than by the chain. Beyond it, what each program
  reads and computes to have a z of its own costs more than the launch that is saved. 0: at no rank.
* **stop at**: ranks up to this one beat dense by the better of both. A low-rank pair is smaller than the
  weight below out · in / (out + in): where ranks must stop earlier, saving memory does not save time.

Cells of the middle columns: µs (MB through memory, MB through L2 for kernels, GF), at the rank of the row: a
quarter of that at which a low-rank pair is as large as the weight. Ranks go in steps of 16, blocks' by 1.

What follows from it: `OptimizedModel.fused` takes the kernels for few tokens at small ranks,
and for blocks at few tokens, whose chain copies z and y; elsewhere the chain stays.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", nargs="+", default=["h100-sxm", "a100-sxm"], choices=list(DEVICES))
    for line in page([DEVICES[name] for name in parser.parse_args().device]):
        sys.stdout.write(line + "\n")


def page(devices: list[Device]) -> list[str]:
    """The lines of docs/gpu.md."""
    lines = INTRODUCTION.splitlines()
    for device in devices:
        for title, chain, kernel in (
            ("low_rank_linear", Shape.chain, Shape.low_rank),
            ("gauge_fixed_linear", Shape.gauge_fixed_chain, Shape.gauge_fixed),
        ):
            lines += ["", f"## {title}, {device.name}, {DTYPE}", ""]
            lines += ["| matmul | tokens | rank | dense | chain | kernel | fuse to | stop at |"]
            lines += ["|---|---|---|---|---|---|---|---|"]
            lines += [ranked_row(device, name, tokens, chain, kernel) for name in SHAPES for tokens in TOKENS]
        lines += ["", f"## block_diagonal_linear, {device.name}, {DTYPE}, {BLOCKS} blocks each way", ""]
        lines += ["| matmul | tokens | rank of a block | dense | chain | kernel | fuse to | stop at |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [blocks_row(device, name, tokens) for name in SHAPES for tokens in TOKENS]
    return lines


def ranked_row(
    device: Device,
    name: str,
    tokens: int,
    chain: Callable[[Shape, str], list[Work]],
    kernel: Callable[..., Work],
) -> str:
    inputs, outputs = SHAPES[name]

    def ways(rank: int) -> tuple[list[Work], Work]:
        shape = Shape(tokens, inputs, outputs, rank)
        return chain(shape, DTYPE), fastest(device, DTYPE, partial(kernel, shape, DTYPE))

    most = min(inputs, outputs) - 1
    rank = inputs * outputs // (inputs + outputs) // 4
    return row(device, name, tokens, rank, range(16, most, 16), ways)


def blocks_row(device: Device, name: str, tokens: int) -> str:
    inputs, outputs = SHAPES[name]

    def ways(rank: int) -> tuple[list[Work], Work]:
        left = BLOCKS, outputs // BLOCKS, BLOCKS * rank
        right = BLOCKS, BLOCKS * rank, inputs // BLOCKS
        sides = tokens, left, right, DTYPE
        return block_diagonal_chain(*sides), fastest(device, DTYPE, partial(block_diagonal, *sides))

    rank = max(1, inputs * outputs // (inputs + outputs) // BLOCKS // 4)
    return row(device, name, tokens, rank, range(1, min(inputs, outputs) // BLOCKS), ways)


def row(
    device: Device,
    name: str,
    tokens: int,
    rank: int,
    ranks: range,
    ways: Callable[[int], tuple[list[Work], Work]],
) -> str:
    dense = Shape(tokens, *SHAPES[name], 1).dense(DTYPE)
    dense_s = total_s(device, DTYPE, dense)

    def fuses(rank: int) -> bool:
        chain, kernel = ways(rank)
        return kernel.seconds(device, DTYPE) < total_s(device, DTYPE, chain)

    def pays(rank: int) -> bool:
        chain, kernel = ways(rank)
        return min(kernel.seconds(device, DTYPE), total_s(device, DTYPE, chain)) < dense_s

    chain, kernel = ways(rank)
    cells = [figures(device, works) for works in (dense, chain, [kernel])]
    limits = [str(last(test, ranks)) for test in (fuses, pays)]
    return f"| {name} | {tokens} | {rank} | {' | '.join(cells)} | {' | '.join(limits)} |"


def last(test: Callable[[int], bool], ranks: range) -> int:
    """The rank before the first one of which ``test`` is not true; 0 where that is the first."""
    found = 0
    for rank in ranks:
        if not test(rank):
            break
        found = rank
    return found


def figures(device: Device, works: list[Work]) -> str:
    memory, cache = (
        sum(work.memory_bytes for work in works) / 1e6,
        sum(work.cache_bytes for work in works) / 1e6,
    )
    read = f", {cache:.0f} L2" if cache else ""
    flops = sum(work.flops for work in works) / 1e9
    return f"{1e6 * total_s(device, DTYPE, works):.1f} ({memory:.1f}{read}, {flops:.2f})"


if __name__ == "__main__":
    main()
