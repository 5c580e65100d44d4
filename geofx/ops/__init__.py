"""Operations that stand for a factorized matmul and run as one kernel where there is one.

Importing this registers them as ``torch.ops.geofx``. On a CPU, and on CUDA without Triton, each runs the aten
operations that it stands for.
"""

from __future__ import annotations

from geofx.ops.block_diagonal_linear import BLOCK_DIAGONAL_LINEAR, block_diagonal_linear
from geofx.ops.fused_op import FusedOp
from geofx.ops.gauge_fixed_linear import GAUGE_FIXED_LINEAR, gauge_fixed_linear
from geofx.ops.low_rank_linear import LOW_RANK_LINEAR, low_rank_linear
from geofx.ops.table_lookups import (
    TENSOR_TRAIN_LOOKUP,
    TOKEN_MPS_LOOKUP,
    tensor_train_lookup,
    token_mps_lookup,
)

FUSED_OPS: tuple[FusedOp, ...] = (
    LOW_RANK_LINEAR,
    GAUGE_FIXED_LINEAR,
    BLOCK_DIAGONAL_LINEAR,
    TENSOR_TRAIN_LOOKUP,
    TOKEN_MPS_LOOKUP,
)

__all__ = [
    "BLOCK_DIAGONAL_LINEAR",
    "FUSED_OPS",
    "GAUGE_FIXED_LINEAR",
    "LOW_RANK_LINEAR",
    "TENSOR_TRAIN_LOOKUP",
    "TOKEN_MPS_LOOKUP",
    "FusedOp",
    "block_diagonal_linear",
    "gauge_fixed_linear",
    "low_rank_linear",
    "tensor_train_lookup",
    "token_mps_lookup",
]
