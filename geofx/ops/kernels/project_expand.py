"""z = x Rᵀ and y = z Lᵀ in one kernel: z is computed a tile at a time and never leaves the chip.

Each program owns a tile of y and runs through the rank; it computes its rows of z anew, so that z costs
flops as often as there are tiles of outputs, and no memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from geofx.ops.kernels.autotuned import Autotuned, blocks, of_length, precision, token_bits


@triton.jit
def _projected(x, right, t, r, T, N, R, sxt, sxn, srr, srn, BT: tl.constexpr, BR: tl.constexpr,
               BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(BT, BR) of x Rᵀ, in float32."""
    z = tl.zeros((BT, BR), dtype=tl.float32)
    for start in range(0, N, BK):
        k = (start + tl.arange(0, BK)).to(tl.int64)
        rows = tl.load(
            x + t[:, None] * sxt + k[None, :] * sxn, mask=(t[:, None] < T) & (k[None, :] < N), other=0.0
        )
        axes = tl.load(
            right + r[None, :] * srr + k[:, None] * srn, mask=(r[None, :] < R) & (k[:, None] < N), other=0.0
        )
        z = tl.dot(rows, axes, z, input_precision=PRECISION)
    return z


@triton.jit
def _expanded(x, right, left, t, m, T, N, R, M, sxt, sxn, srr, srn, slm, slr, BT: tl.constexpr,
              BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(BT, BM) of (x Rᵀ) Lᵀ, in float32; z is rounded to the dtype of x, as between two matmuls."""
    y = tl.zeros((BT, BM), dtype=tl.float32)
    for start in range(0, R, BR):
        r = (start + tl.arange(0, BR)).to(tl.int64)
        z = _projected(x, right, t, r, T, N, R, sxt, sxn, srr, srn, BT, BR, BK, PRECISION)
        columns = tl.load(
            left + m[None, :] * slm + r[:, None] * slr, mask=(m[None, :] < M) & (r[:, None] < R), other=0.0
        )
        y = tl.dot(z.to(columns.dtype), columns, y, input_precision=PRECISION)
    return y


@triton.jit
def low_rank_kernel(x, right, left, bias, y, token_bits, T, N, R, M, sxt, sxn, srr, srn, slm, slr,
                    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
                    BR: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One tile of y = (x Rᵀ) Lᵀ + b."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    tile = _expanded(
        x, right, left, t, m, T, N, R, M, sxt, sxn, srr, srn, slm, slr, BT, BM, BR, BK, PRECISION
    )
    if HAS_BIAS:
        tile += tl.load(bias + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
    mask = (t[:, None] < T) & (m[None, :] < M)
    tl.store(y + t[:, None] * M + m[None, :], tile.to(y.dtype.element_ty), mask=mask)


@triton.jit
def gauge_fixed_kernel(x, right, left, bias, y, places, token_bits, T, N, R, M, begin, sxt, sxn, srr, srn,
                       slm, slr, HAS_BIAS: tl.constexpr, HAS_PLACES: tl.constexpr, PRECISION: tl.constexpr,
                       BT: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
                       BK: tl.constexpr):  # fmt: skip
    """One tile of z = x Bᵀ or of z Cᵀ, M = out - r columns of it, each column stored at its place."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    spanning = tl.cdiv(R, BM)
    if tl.program_id(1) < spanning:
        c = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
        held = c < R
        tile = _projected(x, right, t, c, T, N, R, sxt, sxn, srr, srn, BT, BM, BK, PRECISION)
        place = begin + c
    else:
        m = (tl.program_id(1) - spanning).to(tl.int64) * BM + tl.arange(0, BM)
        c, held = R + m, m < M
        tile = _expanded(
            x, right, left, t, m, T, N, R, M, sxt, sxn, srr, srn, slm, slr, BT, BM, BR, BK, PRECISION
        )
        place = tl.where(m < begin, m, m + R)
    if HAS_PLACES:
        place = tl.load(places + c, mask=held, other=0).to(tl.int64)
    if HAS_BIAS:
        tile += tl.load(bias + place, mask=held, other=0.0).to(tl.float32)[None, :]
    mask = (t[:, None] < T) & held[None, :]
    tl.store(y + t[:, None] * (R + M) + place[None, :], tile.to(y.dtype.element_ty), mask=mask)


LOW_RANK, GAUGE_FIXED = Autotuned(low_rank_kernel), Autotuned(gauge_fixed_kernel)


def low_rank_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernel of `geofx.ops.low_rank_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    (tokens, inputs), rank, outputs = rows.shape, right.shape[0], left.shape[0]
    y = x.new_empty(tokens, outputs)

    def grid(tile: dict[str, Any]) -> tuple[int, ...]:
        return blocks(tokens, tile["BT"]), blocks(outputs, tile["BM"])

    if y.numel():
        LOW_RANK(
            grid, rows, right, left, of_length(bias, outputs, x), y, token_bits(tokens), tokens,
            inputs, rank, outputs, *rows.stride(), *right.stride(), *left.stride(),
            HAS_BIAS=bias is not None, PRECISION=precision(x),
        )  # fmt: skip
    return y.view(*x.shape[:-1], outputs)


def gauge_fixed_linear(
    x: Tensor,
    basis: Tensor,
    mix: Tensor,
    bias: Tensor | None = None,
    places: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """The kernel of `geofx.ops.gauge_fixed_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    (tokens, inputs), rank, others = rows.shape, basis.shape[0], mix.shape[0]
    y = x.new_empty(tokens, rank + others)

    def grid(tile: dict[str, Any]) -> tuple[int, ...]:
        return blocks(tokens, tile["BT"]), blocks(rank, tile["BM"]) + blocks(others, tile["BM"])

    if y.numel():
        GAUGE_FIXED(
            grid, rows, basis, mix, of_length(bias, rank + others, x), y,
            torch.empty(0, dtype=torch.int32, device=x.device) if places is None else places.contiguous(),
            token_bits(tokens), tokens, inputs, rank, others, start, *rows.stride(), *basis.stride(),
            *mix.stride(), HAS_BIAS=bias is not None, HAS_PLACES=places is not None, PRECISION=precision(x),
        )  # fmt: skip
    return y.view(*x.shape[:-1], rank + others)
