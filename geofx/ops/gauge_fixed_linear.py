"""y_P = x Bᵀ, the other outputs y_P Cᵀ, each at its place (PIFA, Zhao et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from geofx.ops.fused_op import FusedOp


def _chain(
    x: Tensor,
    basis: Tensor,
    mix: Tensor,
    bias: Tensor | None = None,
    places: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    spanned = functional.linear(x, basis)
    others = functional.linear(spanned, mix)
    if places is None:
        before, after = others[..., :start], others[..., start:]
        y = torch.cat([before, spanned, after], -1)
    else:
        found = torch.cat([spanned, others], -1)
        y = torch.zeros_like(found).index_copy(-1, places.long(), found)
    return y if bias is None else y + bias


GAUGE_FIXED_LINEAR = FusedOp(
    "gauge_fixed_linear(Tensor x, Tensor basis, Tensor mix, Tensor? bias=None, Tensor? places=None, "
    "int start=0) -> Tensor",
    _chain,
    "geofx.ops.kernels.project_expand:gauge_fixed_linear",
)


def gauge_fixed_linear(
    x: Tensor,
    basis: Tensor,
    mix: Tensor,
    bias: Tensor | None = None,
    places: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """x (..., in), B (r, in), C (out - r, r), b (out,) -> y (..., out).

    ``places`` (out,) int32 tells the output of each row of B and then of C; without it the rows of B are the
    outputs from ``start`` on and those of C the others, in order.
    """
    result: Tensor = GAUGE_FIXED_LINEAR(x, basis, mix, bias, places, start)
    return result
