"""What the kernels of `geofx.ops` take of a GPU, beside two matmuls and the dense one: computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from geofx.cost_models.contract import Device
from geofx.ops.tiles import Tile, tiles_for

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """What one call does.

    Attributes:
        flops: a multiply-add is 2; what a kernel computes twice counts twice, and padding counts.
        memory_bytes: read and written once.
        cache_bytes: what all programs read, most of it from the shared cache.
        programs: that run side by side; None where a library spreads the work as it likes.
        launches: of kernels.
    """

    flops: float
    memory_bytes: float
    cache_bytes: float = 0.0
    programs: int | None = None
    launches: int = 1

    def seconds(self, device: Device, dtype: str) -> float:
        """max(arithmetic, memory, cache) and the launches; programs fewer than processors leave some idle."""
        busy = 1.0
        if self.programs is not None:
            rounds = math.ceil(self.programs / device.processors)
            busy = self.programs / (rounds * device.processors)
        cache = device.cache_bytes_per_s or device.bytes_per_s
        return (
            max(
                self.flops / (busy * device.flops_per_s[dtype]),
                self.memory_bytes / device.bytes_per_s,
                self.cache_bytes / (busy * cache),
            )
            + self.launches * device.launch_s
        )


@dataclass(frozen=True)
class Shape:
    """Of y = (x Rᵀ) Lᵀ: x (tokens, inputs), R (rank, inputs), L (outputs, rank)."""

    tokens: int
    inputs: int
    outputs: int
    rank: int

    def dense(self, dtype: str) -> list[Work]:
        """y = x Wᵀ."""
        return [_matmul(self.tokens, self.inputs, self.outputs, ITEM_BYTES[dtype])]

    def chain(self, dtype: str) -> list[Work]:
        """z = x Rᵀ to memory, and y = z Lᵀ from there."""
        item = ITEM_BYTES[dtype]
        return [
            _matmul(self.tokens, self.inputs, self.rank, item),
            _matmul(self.tokens, self.rank, self.outputs, item),
        ]

    def low_rank(self, dtype: str, tile: Tile) -> Work:
        """`geofx.ops.low_rank_linear`: each program computes its rows of z anew, a block of ranks at a time.

        A program of bt tokens and bm outputs reads x once for each of the ⌈r / br⌉ blocks, and R and its
        rows of L once.
        """
        item, t, m = ITEM_BYTES[dtype], _blocks(self.tokens, tile.tokens), _blocks(self.outputs, tile.outputs)
        r = _blocks(self.rank, tile.rank)
        inputs = _blocks(self.inputs, tile.inputs) * tile.inputs
        flops = 2.0 * tile.tokens * tile.rank * (inputs + tile.outputs) * r * t * m
        read = r * min(tile.tokens, self.tokens) * self.inputs + self.rank * (
            self.inputs + min(tile.outputs, self.outputs)
        )
        return Work(flops, self._bytes(self.outputs, item), float(item * read * t * m), t * m)

    def gauge_fixed(self, dtype: str, tile: Tile) -> Work:
        """`geofx.ops.gauge_fixed_linear`: tiles of z itself, and of the outputs - rank others."""
        others = self.outputs - self.rank
        expanded = Shape(self.tokens, self.inputs, others, self.rank).low_rank(dtype, tile)
        item, t, z = ITEM_BYTES[dtype], _blocks(self.tokens, tile.tokens), _blocks(self.rank, tile.outputs)
        inputs = _blocks(self.inputs, tile.inputs) * tile.inputs
        flops = 2.0 * tile.tokens * tile.outputs * inputs * t * z
        read = (min(tile.tokens, self.tokens) + min(tile.outputs, self.rank)) * self.inputs
        return Work(
            flops + expanded.flops,
            self._bytes(others, item) + item * self.tokens * self.rank,
            expanded.cache_bytes + item * read * t * z,
            (expanded.programs or 0) + t * z,
        )

    def gauge_fixed_chain(self, dtype: str) -> list[Work]:
        """z = x Bᵀ, the others z Cᵀ, and the copy that puts both in one tensor."""
        item, others = ITEM_BYTES[dtype], self.outputs - self.rank
        copied = float(2 * item * self.tokens * self.outputs)
        return [*Shape(self.tokens, self.inputs, others, self.rank).chain(dtype), Work(0.0, copied)]

    def _bytes(self, expanded: int, item: int) -> float:
        """x, R, the rows of L and the outputs that they give, once each."""
        return float(
            item * (self.tokens * self.inputs + self.rank * (self.inputs + expanded) + self.tokens * expanded)
        )


def block_diagonal(
    tokens: int, left: tuple[int, ...], right: tuple[int, ...], dtype: str, tile: Tile
) -> Work:
    """`geofx.ops.block_diagonal_linear` with L (m2, m1, n1 r) and R (n1, m2 r, n2)."""
    (m2, m1, _), (n1, inner, n2) = left, right
    one = Shape(tokens, n2, m1, inner // m2).low_rank(dtype, tile)
    item = ITEM_BYTES[dtype]
    stored = math.prod(left) + math.prod(right) + tokens * (n1 * n2 + m1 * m2)
    return Work(
        one.flops * n1 * m2, float(item * stored), one.cache_bytes * n1 * m2, (one.programs or 0) * m2
    )


def block_diagonal_chain(
    tokens: int, left: tuple[int, ...], right: tuple[int, ...], dtype: str
) -> list[Work]:
    """Two batched matmuls, and the copies that the transposition before and after the second takes."""
    (m2, m1, columns), (n1, inner, n2) = left, right
    item = ITEM_BYTES[dtype]
    first, second = tokens * n1 * inner, tokens * m1 * m2
    return [
        Work(2.0 * first * n2, float(item * (tokens * n1 * n2 + math.prod(right) + first))),
        Work(0.0, float(2 * item * first)),
        Work(2.0 * second * columns, float(item * (first + math.prod(left) + second))),
        Work(0.0, float(2 * item * second)),
    ]


def total_s(device: Device, dtype: str, works: Iterable[Work]) -> float:
    """Seconds of calls one after the other."""
    return math.fsum(work.seconds(device, dtype) for work in works)


def fastest(device: Device, dtype: str, work_of: Callable[[Tile], Work]) -> Work:
    """What a kernel does at the best of its tiles."""
    tiles = tiles_for("tf32x3" if dtype == "float32" else "tf32")
    return min(map(work_of, tiles), key=lambda work: work.seconds(device, dtype))


def fastest_s(device: Device, dtype: str, work_of: Callable[[Tile], Work]) -> float:
    """Seconds of a kernel at the best of its tiles."""
    return fastest(device, dtype, work_of).seconds(device, dtype)


def _matmul(tokens: int, inputs: int, outputs: int, item: int) -> Work:
    """At its roofline: every number is read or written once, whatever the library does."""
    flops = 2.0 * tokens * inputs * outputs
    return Work(flops, float(item * (tokens * inputs + inputs * outputs + tokens * outputs)))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
