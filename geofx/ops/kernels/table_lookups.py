"""Rows of factorized tables: one program multiplies out the small cores of one row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from geofx.ops.table_lookups import (
    TENSOR_TRAIN_LOOKUP,
    TOKEN_MPS_LOOKUP,
    padded,
    tensor_train_tiles,
    token_mps_fits,
)


@triton.jit
def _core(core, digit, base, left, mode, right, P: tl.constexpr, Q: tl.constexpr, S: tl.constexpr):
    """(P, Q S) of G[:, digit]: zeros beyond (left, mode, right)."""
    p = tl.arange(0, P)[:, None].to(tl.int64)
    column = tl.arange(0, Q * S)[None, :]
    q, s = column // S, column % S
    mask = (p < left) & (q < mode) & (s < right)
    return tl.load(core + ((p * base + digit) * mode + q) * right + s, mask=mask, other=0.0)


@triton.jit
def three_cores_kernel(ids, first, second, third, y, m1, m2, m3, n1, n2, n3, r1, r2, N1: tl.constexpr,
                       R1: tl.constexpr, N2: tl.constexpr, R2: tl.constexpr,
                       N3: tl.constexpr):  # fmt: skip
    """A row of G₁[i₁] G₂[i₂] G₃[i₃]."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token)
    d3, rest = row % m3, row // m3
    d2, d1 = rest % m2, rest // m2
    a = tl.arange(0, N1)[:, None].to(tl.int64)
    p = tl.arange(0, R1)[None, :]
    head = tl.load(first + (d1 * n1 + a) * r1 + p, mask=(a < n1) & (p < r1), other=0.0)
    middle = tl.dot(head, _core(second, d2, m2, r1, n2, r2, R1, N2, R2), input_precision="ieee")
    middle = tl.reshape(middle.to(head.dtype), (N1 * N2, R2))
    tail = tl.dot(middle, _core(third, d3, m3, r2, n3, 1, R2, N3, 1), input_precision="ieee")
    line = tl.arange(0, N1 * N2)[:, None]
    b, c = line % N2, tl.arange(0, N3)[None, :]
    i = line // N2
    mask = (i < n1) & (b < n2) & (c < n3)
    tl.store(y + token * n1 * n2 * n3 + (i * n2 + b) * n3 + c, tail.to(y.dtype.element_ty), mask=mask)


@triton.jit
def two_cores_kernel(ids, first, second, y, m1, m2, n1, n2, r1, N1: tl.constexpr, R1: tl.constexpr,
                     N2: tl.constexpr):  # fmt: skip
    """A row of G₁[i₁] G₂[i₂]."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token)
    d2, d1 = row % m2, row // m2
    a = tl.arange(0, N1)[:, None].to(tl.int64)
    p = tl.arange(0, R1)[None, :]
    head = tl.load(first + (d1 * n1 + a) * r1 + p, mask=(a < n1) & (p < r1), other=0.0)
    tail = tl.dot(head, _core(second, d2, m2, r1, n2, 1, R1, N2, 1), input_precision="ieee")
    c = tl.arange(0, N2)[None, :]
    tl.store(y + token * n1 * n2 + a * n2 + c, tail.to(y.dtype.element_ty), mask=(a < n1) & (c < n2))


@triton.jit
def token_mps_kernel(ids, table, y, numbers, columns, BONDS: tl.constexpr, PADDED: tl.constexpr,
                     MODES: tl.constexpr, OFFSETS: tl.constexpr, CORES: tl.constexpr,
                     WIDTH: tl.constexpr):  # fmt: skip
    """A row of G_1 .. G_K: Σ over the states of the bonds, each entry by itself; WIDTH = Π m_k."""
    token = tl.program_id(0).to(tl.int64)
    base = table + tl.load(ids + token) * numbers
    place = tl.arange(0, WIDTH)
    rest = place
    state = tl.full((WIDTH, 1), 1.0, dtype=tl.float32)
    for step in tl.static_range(CORES):
        digit = (rest % MODES[CORES - 1 - step])[:, None, None]
        rest = rest // MODES[CORES - 1 - step]
        p = tl.arange(0, PADDED[CORES - 1 - step])[None, :, None]
        r = tl.arange(0, PADDED[CORES - step])[None, None, :]
        lines = p * MODES[CORES - 1 - step] + digit
        offsets = OFFSETS[CORES - 1 - step] + lines * BONDS[CORES - step] + r
        mask = (p < BONDS[CORES - 1 - step]) & (r < BONDS[CORES - step])
        values = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
        state = tl.sum(values * state[:, None, :], axis=2)
    row = tl.reshape(state, (WIDTH,))
    tl.store(y + token * columns + place, row.to(y.dtype.element_ty), mask=place < columns)


def tensor_train_lookup(ids: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """The kernel of `geofx.ops.tensor_train_lookup`, for two or three cores that fit; else the chain."""
    shapes = [tuple(core.shape) for core in cores]
    sides = tensor_train_tiles(shapes)
    if sides is None:
        result: Tensor = TENSOR_TRAIN_LOOKUP.chain(ids, cores)
        return result
    y = cores[0].new_empty(ids.numel(), math.prod(shape[2] for shape in shapes))
    flat, held = ids.reshape(-1), [core.contiguous() for core in cores]
    if y.numel():
        modes, columns = [shape[1] for shape in shapes], [shape[2] for shape in shapes]
        bonds = [shape[3] for shape in shapes[:-1]]
        kernel = two_cores_kernel if len(cores) == 2 else three_cores_kernel
        kernel[(len(flat),)](flat, *held, y, *modes, *columns, *bonds, **sides)
    return y.view(*ids.shape, y.shape[1])


def token_mps_lookup(
    ids: Tensor, table: Tensor, bonds: Sequence[int], modes: Sequence[int], columns: int
) -> Tensor:
    """The kernel of `geofx.ops.token_mps_lookup`, for rows that fit; else the chain."""
    if not token_mps_fits(bonds, modes):
        result: Tensor = TOKEN_MPS_LOOKUP.chain(ids, table, bonds, modes, columns)
        return result
    offsets = [0]
    for left, mode, right in zip(bonds, modes, bonds[1:], strict=False):
        offsets.append(offsets[-1] + left * mode * right)
    y = table.new_empty(ids.numel(), columns)
    if y.numel():
        token_mps_kernel[(ids.numel(),)](
            ids.reshape(-1), table.contiguous(), y, offsets[-1], columns, BONDS=tuple(bonds),
            PADDED=tuple(map(padded, bonds)), MODES=tuple(modes), OFFSETS=tuple(offsets), CORES=len(modes),
            WIDTH=math.prod(modes),
        )  # fmt: skip
    return y.view(*ids.shape, columns)
