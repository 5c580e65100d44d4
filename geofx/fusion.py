"""A program as a target runs it: chains are fused operations where the target's price says so."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from geofx.cost_models import DEVICES, Device
from geofx.cost_models.kernels import Shape, Work, block_diagonal, block_diagonal_chain, fastest_s, total_s
from geofx.errors import ConfigError
from geofx.latency import interleaved_medians
from geofx.ops import (
    BLOCK_DIAGONAL_LINEAR,
    GAUGE_FIXED_LINEAR,
    TENSOR_TRAIN_LOOKUP,
    TOKEN_MPS_LOOKUP,
    FusedOp,
)
from geofx.ops.table_lookups import tensor_train_tiles, token_mps_fits
from geofx.passes.cleanup import Cleanup
from geofx.passes.contract import run_passes
from geofx.passes.fuse import Fuse, Pays
from geofx.patterns import nearest
from geofx.program import Program
from geofx.target import Target
from geofx.workload import counted

ROUNDS = 11


def rows_of(program: Program, target: Target) -> int:
    """Tokens of a call of ``program`` on ``target``; where it takes no sequences, its rows."""
    return target.batch * (target.tokens if program.takes_sequences else 1)


def fused(program: Program, target: Target, rows: int) -> Program:
    """``program`` with the operations of `geofx.ops` that pay on ``target``; itself where none does.

    On CUDA each is timed against its chain, on a paper device both are computed
    (`geofx.cost_models.kernels`), for ``rows`` tokens; a CPU has no kernels. Maps that share R are compared
    as one stacked chain. The result is there to be run, on CUDA if that is the target: what is saved and, by
    default, exported is ``program``.

    Raises:
        ConfigError: there is no CUDA device, or the paper device is not known.
    """
    if target.device == "cpu" or target.runtime == "onnxruntime":
        return program
    require_device(target)
    pays = _price(target, rows)
    if pays is None:
        return program
    there = program.moved("cuda") if target.device == "cuda" else program
    clone = there.clone()
    changed = run_passes(clone, [Fuse(pays), Cleanup()])
    return clone if changed else there


def require_device(target: Target) -> None:
    """Check that a target's device is here, or known on paper.

    Raises:
        ConfigError: it is not.
    """
    if target.device == "cuda" and not torch.cuda.is_available():
        fix = "use device='cpu', or a paper device"
        raise ConfigError("no CUDA device is there", where=str(target), fix=fix)
    if not target.is_measured and target.device not in DEVICES:
        fix = f"the nearest are {nearest(target.device, ['cpu', 'cuda', *DEVICES])}"
        raise ConfigError(f"no device {target.device!r}", where="target", fix=fix)


def _price(target: Target, rows: int) -> Pays | None:
    if target.is_measured:
        return partial(timed_to_pay, rows)
    device = DEVICES[target.device]
    return partial(computed_to_pay, device, rows, target.dtype) if device.has_kernels else None


def computed_to_pay(
    device: Device, tokens: int, dtype: str | None, op: FusedOp, arguments: tuple[Any, ...]
) -> bool:
    """Whether the operation takes less than its chain on paper, in ``dtype`` or that of the factors."""
    factors = [part for part in pytree.tree_leaves(arguments[1:]) if isinstance(part, Tensor)]
    dtype = dtype or str(factors[0].dtype).removeprefix("torch.")
    if dtype not in device.flops_per_s:
        return False
    if op in (TENSOR_TRAIN_LOOKUP, TOKEN_MPS_LOOKUP):
        kernel, chain = _lookup(op, arguments, tokens)
        return _has_kernel(op, arguments) and kernel.seconds(device, dtype) < chain.seconds(device, dtype)
    first, second = (tuple(part.shape) for part in factors[:2])
    if op is BLOCK_DIAGONAL_LINEAR:
        kernel_s = fastest_s(device, dtype, partial(block_diagonal, tokens, first, second, dtype))
        return kernel_s < total_s(device, dtype, block_diagonal_chain(tokens, first, second, dtype))
    if op is GAUGE_FIXED_LINEAR:
        shape = Shape(tokens, first[1], first[0] + second[0], first[0])
        kernel_s = fastest_s(device, dtype, partial(shape.gauge_fixed, dtype))
        return kernel_s < total_s(device, dtype, shape.gauge_fixed_chain(dtype))
    shape = Shape(tokens, second[1], first[0], first[1])
    kernel_s = fastest_s(device, dtype, partial(shape.low_rank, dtype))
    return kernel_s < total_s(device, dtype, shape.chain(dtype))


@torch.no_grad()
def timed_to_pay(tokens: int, op: FusedOp, arguments: tuple[Any, ...]) -> bool:
    """Whether the operation is faster than its chain, timed in turns on ``tokens`` rows: noise, or row 0."""
    like = next(part for part in pytree.tree_leaves(arguments[1:]) if isinstance(part, Tensor))
    if arguments[0].is_floating_point():
        x = torch.randn(tokens, arguments[0].shape[-1], device=like.device).to(like.dtype)
    else:
        x = torch.zeros(tokens, dtype=torch.int64, device=like.device)

    def call(run: Any) -> Any:
        run(x, *arguments[1:])
        torch.cuda.synchronize(like.device)

    seconds = interleaved_medians({"op": partial(call, op), "chain": partial(call, op.chain)}, ROUNDS)
    return seconds["op"] < seconds["chain"]


def _has_kernel(op: FusedOp, arguments: tuple[Any, ...]) -> bool:
    """Whether a lookup runs as a kernel, or its chain in place of one."""
    if op is TOKEN_MPS_LOOKUP:
        return token_mps_fits(*arguments[2:4])
    return tensor_train_tiles([tuple(core.shape) for core in arguments[1]]) is not None


def _lookup(op: FusedOp, arguments: tuple[Any, ...], tokens: int) -> tuple[Work, Work]:
    """A program per token, which reads a row's cores; and the chain's calls, one after the other."""
    ids = torch.empty(tokens, dtype=torch.int64, device="meta")
    others = pytree.tree_map_only(Tensor, lambda part: torch.empty_like(part, device="meta"), arguments[1:])
    done = counted(lambda: op.chain(ids, *others))
    tensors = [part for part in pytree.tree_leaves(others) if isinstance(part, Tensor)]
    item = tensors[0].element_size()
    if op is TOKEN_MPS_LOOKUP:
        read, width = tensors[0].shape[1], others[-1]
    else:
        read = sum(core.numel() // core.shape[1] for core in tensors)
        width = math.prod(core.shape[2] for core in tensors)
    kernel = Work(float(done.flops), float(item * tokens * (read + width)), programs=tokens)
    return kernel, Work(float(done.flops), 2.0 * done.written_bytes, launches=done.launches)
