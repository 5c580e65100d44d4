"""Flops, bytes and launches of a piece of graph, measured by running it on tensors without storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from geofx.factorizations import Factorization
from geofx.piece import Piece
from geofx.region import Region

PROBE_TOKENS = 16
"""Tokens that a workload is measured at; per-token figures divide by it."""


@dataclass(frozen=True)
class Workload:
    """What one piece of graph does.

    Attributes:
        flops: per token; a multiply-add is 2.
        parameters: floating-point numbers stored.
        weight_bytes: bytes of all factors, indices included.
        activation_bytes: bytes written per token.
        launches: kernels per call.
    """

    flops: float
    parameters: int
    weight_bytes: int
    activation_bytes: float
    launches: int

    def times(self, rows: float) -> Workload:
        """The same weights used ``rows`` times per token."""
        return replace(self, flops=self.flops * rows, activation_bytes=self.activation_bytes * rows)


class _OutputCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls that write memory (views do not) and the bytes that they write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches, self.written = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.launches += 1
            self.written += result.numel() * result.element_size()
        return result


def measure(factorization: Factorization, region: Region) -> Workload:
    """Workload of all sites of ``region``, by FlopCounterMode on meta tensors at the region's shapes.

    What the sites of a ``shared_input`` region compute alike, such as a projection onto a shared basis, is
    counted once, as the lowered graph runs it.
    """
    return _measure(Piece.of(factorization, region))


@lru_cache(maxsize=65536)
def _measure(piece: Piece) -> Workload:
    factors, inputs = piece.factors(), piece.inputs((PROBE_TOKENS,))
    graph = piece.traced((PROBE_TOKENS,)) if piece.kind == "shared_input" else None
    done = counted(lambda: piece(inputs, factors) if graph is None else graph(*inputs, *factors.values()))
    return Workload(
        flops=done.flops / PROBE_TOKENS,
        parameters=sum(part.numel() for part in factors.values() if part.is_floating_point()),
        weight_bytes=sum(part.numel() * part.element_size() for part in factors.values()),
        activation_bytes=done.written_bytes / PROBE_TOKENS,
        launches=done.launches,
    )


@dataclass(frozen=True)
class Counted:
    """What a run did: operations, calls that write memory and the bytes that they write."""

    flops: int
    launches: int
    written_bytes: int


@torch.no_grad()
def counted(run: Callable[[], Any]) -> Counted:
    """What ``run`` does, on tensors with or without storage."""
    outputs, flops = _OutputCounter(), FlopCounterMode(display=False)
    with outputs, flops:
        run()
    return Counted(flops.get_total_flops(), outputs.launches, outputs.written)
