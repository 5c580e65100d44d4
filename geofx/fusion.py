"""A program as a target runs it: chains are fused operations where the target's price says so."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from geofx.cost_models import DEVICES, Device
from geofx.cost_models.kernels import Shape, block_diagonal, block_diagonal_chain, fastest_s, total_s
from geofx.errors import ConfigError
from geofx.latency import interleaved_medians
from geofx.ops import BLOCK_DIAGONAL_LINEAR, GAUGE_FIXED_LINEAR, FusedOp
from geofx.passes.cleanup import Cleanup
from geofx.passes.contract import run_passes
from geofx.passes.fuse import Fuse, Pays
from geofx.program import Program
from geofx.target import Target

ROUNDS = 11


def fused(program: Program, target: Target) -> Program:
    """``program`` with the operations of `geofx.ops` that pay on ``target``; itself where none does.

    On CUDA each is timed against its chain, on a paper device both are computed
    (`geofx.cost_models.kernels`), and a CPU has no kernels. The result is there to be run, on CUDA if that is
    the target: what is saved and exported is ``program``.

    Raises:
        ConfigError: there is no CUDA device, or the paper device is not known.
    """
    if target.device == "cpu" or target.runtime == "onnxruntime":
        return program
    pays = _price(target)
    there = program.moved("cuda") if target.device == "cuda" else program
    clone = there.clone()
    changed = run_passes(clone, [Fuse(pays), Cleanup()])
    return clone if changed else there


def _price(target: Target) -> Pays:
    tokens = target.batch * target.tokens
    if target.is_measured:
        if not torch.cuda.is_available():
            raise ConfigError("no CUDA device is there", where=str(target), fix="use a paper device")
        return partial(timed_to_pay, tokens)
    if target.device not in DEVICES:
        fix = f"use one of {', '.join(DEVICES)}"
        raise ConfigError(f"unknown device {target.device!r}", where=str(target), fix=fix)
    return partial(computed_to_pay, DEVICES[target.device], tokens, target.dtype)


def computed_to_pay(
    device: Device, tokens: int, dtype: str | None, op: FusedOp, arguments: tuple[Any, ...]
) -> bool:
    """Whether the operation takes less than its chain on paper, in ``dtype`` or that of the factors."""
    _, first, second = arguments[:3]
    dtype = dtype or str(first.dtype).removeprefix("torch.")
    if dtype not in device.flops_per_s:
        return False
    if op is BLOCK_DIAGONAL_LINEAR:
        sides = tokens, tuple(first.shape), tuple(second.shape), dtype
        kernel_s = fastest_s(device, dtype, partial(block_diagonal, *sides))
        return kernel_s < total_s(device, dtype, block_diagonal_chain(*sides))
    if op is GAUGE_FIXED_LINEAR:
        (rank, inputs), others = first.shape, second.shape[0]
        shape = Shape(tokens, inputs, rank + others, rank)
        kernel_s = fastest_s(device, dtype, partial(shape.gauge_fixed, dtype))
        return kernel_s < total_s(device, dtype, shape.gauge_fixed_chain(dtype))
    (outputs, rank), inputs = first.shape, second.shape[1]
    shape = Shape(tokens, inputs, outputs, rank)
    return fastest_s(device, dtype, partial(shape.low_rank, dtype)) < total_s(
        device, dtype, shape.chain(dtype)
    )


@torch.no_grad()
def timed_to_pay(tokens: int, op: FusedOp, arguments: tuple[Any, ...]) -> bool:
    """Whether the operation is faster than its chain, timed in turns on ``tokens`` rows of noise."""
    like = next(part for part in arguments[1:] if isinstance(part, Tensor))
    x = torch.randn(tokens, arguments[0].shape[-1], device=like.device).to(like.dtype)

    def call(run: Any) -> Any:
        run(x, *arguments[1:])
        torch.cuda.synchronize(like.device)

    seconds = interleaved_medians({"op": partial(call, op), "chain": partial(call, op.chain)}, ROUNDS)
    return seconds["op"] < seconds["chain"]
