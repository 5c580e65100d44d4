"""y[α m2 + β] = Σ_γσ L[β, α, γσ] (R[γ, βσ, :] · x[γ]): two block-diagonal products and a transposition."""

from __future__ import annotations

import torch
from torch import Tensor

from geofx.ops.fused_op import FusedOp


def multiply(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """It as two batched matmuls with a transposition between and after."""
    (m2, m1, _), (n1, _, n2) = left.shape, right.shape
    slices = x.reshape(-1, n1, n2).transpose(0, 1)
    inner = torch.bmm(slices, right.transpose(1, 2))
    crossed = inner.reshape(n1, -1, m2, right.shape[1] // m2).permute(2, 1, 0, 3).flatten(2)
    blocks = torch.bmm(crossed, left.transpose(1, 2))
    return blocks.permute(1, 2, 0).reshape(*x.shape[:-1], m1 * m2)


def _chain(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    y = multiply(x, left, right)
    return y if bias is None else y + bias


BLOCK_DIAGONAL_LINEAR = FusedOp(
    "block_diagonal_linear(Tensor x, Tensor left, Tensor right, Tensor? bias=None) -> Tensor",
    _chain,
    "geofx.ops.kernels.block_diagonal:block_diagonal_linear",
)


def block_diagonal_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., n1 n2), L (m2, m1, n1 r), R (n1, m2 r, n2), b (m1 m2,) -> y (..., m1 m2)."""
    result: Tensor = BLOCK_DIAGONAL_LINEAR(x, left, right, bias)
    return result
