"""Two block-diagonal products in one kernel: the transposition between them is a matter of addresses."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from geofx.ops.kernels.autotuned import Autotuned, blocks, of_length, precision, token_bits


@triton.jit
def block_diagonal_kernel(x, right, left, bias, y, token_bits, T, N, R, M, n1, m2, sxt, sxn, srg, srr, srn,
                          slb, slm, slr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr,
                          BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """One tile of y[:, :, β] = Σ_γ (x[γ] R[γ, β]ᵀ) L[β, :, γ]ᵀ; N = n2, M = m1, R = r of a block."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    b = tl.program_id(2).to(tl.int64)
    tile = tl.zeros((BT, BM), dtype=tl.float32)
    for g in range(0, n1):
        block = tl.cast(g, tl.int64)
        for first in range(0, R, BR):
            r = (first + tl.arange(0, BR)).to(tl.int64)
            z = tl.zeros((BT, BR), dtype=tl.float32)
            for start in range(0, N, BK):
                k = (start + tl.arange(0, BK)).to(tl.int64)
                rows = tl.load(
                    x + t[:, None] * sxt + (block * N + k[None, :]) * sxn,
                    mask=(t[:, None] < T) & (k[None, :] < N),
                    other=0.0,
                )
                axes = tl.load(
                    right + block * srg + (b * R + r[None, :]) * srr + k[:, None] * srn,
                    mask=(r[None, :] < R) & (k[:, None] < N),
                    other=0.0,
                )
                z = tl.dot(rows, axes, z, input_precision=PRECISION)
            columns = tl.load(
                left + b * slb + m[None, :] * slm + (block * R + r[:, None]) * slr,
                mask=(m[None, :] < M) & (r[:, None] < R),
                other=0.0,
            )
            tile = tl.dot(z.to(columns.dtype), columns, tile, input_precision=PRECISION)
    place = m * m2 + b
    if HAS_BIAS:
        tile += tl.load(bias + place, mask=m < M, other=0.0).to(tl.float32)[None, :]
    mask = (t[:, None] < T) & (m[None, :] < M)
    tl.store(y + t[:, None] * M * m2 + place[None, :], tile.to(y.dtype.element_ty), mask=mask)


BLOCK_DIAGONAL = Autotuned(block_diagonal_kernel)


def block_diagonal_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernel of `geofx.ops.block_diagonal_linear`."""
    (m2, m1, _), (n1, inner, n2) = left.shape, right.shape
    rows = x.reshape(-1, x.shape[-1])
    tokens = rows.shape[0]
    y = x.new_empty(tokens, m1 * m2)

    def grid(tile: dict[str, Any]) -> tuple[int, ...]:
        return blocks(tokens, tile["BT"]), blocks(m1, tile["BM"]), m2

    if y.numel():
        BLOCK_DIAGONAL(
            grid, rows, right, left, of_length(bias, m1 * m2, x), y, token_bits(tokens), tokens,
            n2, inner // m2, m1, n1, m2, *rows.stride(), *right.stride(), *left.stride(),
            HAS_BIAS=bias is not None, PRECISION=precision(x),
        )  # fmt: skip
    return y.view(*x.shape[:-1], m1 * m2)
