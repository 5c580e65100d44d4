"""y[α m2 + β] = Σ_γσ L[β, α, γσ] (R[γ, βσ, :] · x[γ]): two block-diagonal products and a transposition."""

from __future__ import annotations

from torch import Tensor

from geofx.linalg import multiply_blocks
from geofx.ops.fused_op import FusedOp


def _chain(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    y = multiply_blocks(x, left, right)
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
