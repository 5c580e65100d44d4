"""y = (x Rᵀ) Lᵀ + b."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from geofx.ops.fused_op import FusedOp


def _chain(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(functional.linear(x, right), left, bias)


LOW_RANK_LINEAR = FusedOp(
    "low_rank_linear(Tensor x, Tensor left, Tensor right, Tensor? bias=None) -> Tensor",
    _chain,
    "geofx.ops.kernels.project_expand:low_rank_linear",
)


def low_rank_linear(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), L (out, r), R (r, in), b (out,) -> y (..., out).

    Sites of one input that share R are one such map, their L stacked and y split.
    """
    result: Tensor = LOW_RANK_LINEAR(x, left, right, bias)
    return result
