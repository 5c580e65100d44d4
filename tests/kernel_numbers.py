"""Run in a process of its own under Triton's interpreter: every kernel against float64, over odd shapes."""

from __future__ import annotations

import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

import geofx.ops as ops
from geofx.ops.kernels import block_diagonal, project_expand, table_lookups
from geofx.ops.tiles import EXACT_TILES, TILES

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the root mean square error, relative to that of the result: a few roundings."""


def dot_of_bfloat16(builder, a, b, d, *settings):
    """The interpreter keeps bfloat16 as uint16 and would multiply those."""
    wide = [
        interpreter.TensorHandle(
            interpreter._convert_float(part.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32
        )
        if part.dtype.scalar == tl.bfloat16
        else part
        for part in (a, b)
    ]
    return DOT(builder, *wide, d, *settings)


DOT = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = dot_of_bfloat16


def check(label: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape, (label, found.shape, wanted.shape)
    if not wanted.numel():
        return
    error = (found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300)
    assert error < TOLERANCES[found.dtype], (label, found.dtype, float(error))


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) / max(1, shape[-1]) ** 0.5).to(dtype)


def linear(dtype: torch.dtype) -> None:
    for tokens, inputs, outputs, rank in (
        (1, 1, 2, 1),
        (5, 7, 13, 1),
        (17, 67, 131, 33),
        (0, 8, 8, 2),
        (33, 96, 70, 65),
    ):
        x = numbers(tokens, inputs, dtype=dtype) * inputs**0.5
        strided = numbers(inputs, tokens + 3, dtype=dtype).T[1 : tokens + 1]
        left, right = numbers(outputs, rank, dtype=dtype), numbers(rank, inputs, dtype=dtype)
        bias = numbers(outputs, dtype=dtype)
        across = numbers(rank, outputs, dtype=dtype).T
        for label, arguments in {
            "plain": (x, left, right),
            "bias": (x, left, right, bias),
            "strided": (strided, across, right, bias),
            "batch": (x.reshape(1, tokens, 1, inputs), left, right, bias),
        }.items():
            found = project_expand.low_rank_linear(*arguments)
            check(f"low rank {label}", found, ops.LOW_RANK_LINEAR.chain(*_wide(arguments)))
        if rank < outputs:
            gauge(x, right, numbers(outputs - rank, rank, dtype=dtype), bias)


def gauge(x: torch.Tensor, basis: torch.Tensor, mix: torch.Tensor, bias: torch.Tensor) -> None:
    places = torch.randperm(len(bias)).to(torch.int32)
    for label, rest in {
        "first": (None, None, 0),
        "last": (bias, None, len(mix)),
        "within": (bias, None, len(mix) // 2),
        "places": (bias, places, 0),
    }.items():
        found = project_expand.gauge_fixed_linear(x, basis, mix, *rest)
        wanted = ops.GAUGE_FIXED_LINEAR.chain(*_wide((x, basis, mix, *rest)))
        check(f"gauge fixed {label}", found, wanted)


def blocks(dtype: torch.dtype) -> None:
    for tokens, m1, m2, n1, n2, rank in ((3, 5, 4, 4, 6, 1), (19, 33, 2, 3, 40, 37), (0, 2, 2, 2, 2, 1)):
        x = numbers(tokens, n1 * n2, dtype=dtype) * (n1 * n2) ** 0.5
        left, right = numbers(m2, m1, n1 * rank, dtype=dtype), numbers(n1, m2 * rank, n2, dtype=dtype)
        bias = numbers(m1 * m2, dtype=dtype)
        for arguments in ((x, left, right), (x.unsqueeze(0), left, right, bias)):
            found = block_diagonal.block_diagonal_linear(*arguments)
            check("block diagonal", found, ops.BLOCK_DIAGONAL_LINEAR.chain(*_wide(arguments)))


def tiles(dtype: torch.dtype) -> None:
    """Every tile that is tried on a GPU, at sizes that fill none of them whole."""
    for tile in {*TILES, *EXACT_TILES}:
        for autotuned in (project_expand.LOW_RANK, project_expand.GAUGE_FIXED, block_diagonal.BLOCK_DIAGONAL):
            autotuned.untuned = tile
        x, bias = numbers(tile.tokens + 1, 70, dtype=dtype) * 70**0.5, numbers(134, dtype=dtype)
        left, right = numbers(134, 66, dtype=dtype), numbers(66, 70, dtype=dtype)
        found = project_expand.low_rank_linear(x, left, right, bias)
        check(f"low rank, {tile}", found, ops.LOW_RANK_LINEAR.chain(*_wide((x, left, right, bias))))
        gauge(x, right, left[:68], bias)
        left, right = numbers(1, 134, 2 * 66, dtype=dtype), numbers(2, 66, 35, dtype=dtype)
        found = block_diagonal.block_diagonal_linear(x, left, right)
        check(f"block diagonal, {tile}", found, ops.BLOCK_DIAGONAL_LINEAR.chain(*_wide((x, left, right))))


def tables(dtype: torch.dtype) -> None:
    for modes, columns, bonds in (
        ((5, 7), (3, 4), (1, 2, 1)),
        ((3, 4, 5), (9, 8, 8), (1, 5, 6, 1)),
        ((2, 2, 2, 2), (2, 2, 2, 3), (1, 2, 2, 2, 1)),
    ):
        cores = [
            numbers(bonds[k], modes[k], columns[k], bonds[k + 1], dtype=dtype) for k in range(len(modes))
        ]
        ids = torch.randint(torch.tensor(modes).prod(), (3, 5))
        wanted = ops.TENSOR_TRAIN_LOOKUP.chain(ids, [core.double() for core in cores])
        check("tensor train", table_lookups.tensor_train_lookup(ids, cores), wanted)
    for bonds, modes, columns in (((1, 1, 1), (2, 2), 3), ((1, 3, 3, 3, 1), (4, 2, 2, 4), 50)):
        size = sum(a * m * b for a, m, b in zip(bonds, modes, bonds[1:], strict=False))
        table, ids = numbers(11, size, dtype=dtype), torch.randint(11, (2, 4))
        found = table_lookups.token_mps_lookup(ids, table, bonds, modes, columns)
        check("token mps", found, ops.TOKEN_MPS_LOOKUP.chain(ids, table.double(), bonds, modes, columns))


def _wide(arguments: tuple) -> tuple:
    return tuple(
        part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part
        for part in arguments
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in TOLERANCES:
        for check_all in (linear, blocks, tables):
            check_all(dtype)
    tiles(torch.float32)
    sys.stdout.write("all kernels agree\n")
