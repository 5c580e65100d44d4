"""Rows of a table that is stored as a tensor train, or each row as a matrix product state of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from geofx.ops.fused_op import FusedOp


def _tensor_train_chain(ids: Tensor, cores: Sequence[Tensor]) -> Tensor:
    flat, bases = ids.flatten(), [core.shape[1] for core in cores]
    rows = cores[0].new_ones(1, 1, 1)
    for k, core in enumerate(cores):
        digit = torch.div(flat, math.prod(bases[k + 1 :]), rounding_mode="floor") % bases[k]
        picked = core.index_select(1, digit).movedim(1, 0)
        state = rows @ picked.flatten(2)
        rows = state.reshape(flat.shape[0], -1, core.shape[3])
    return rows.reshape(*ids.shape, math.prod(core.shape[2] for core in cores))


def _token_mps_chain(
    ids: Tensor, table: Tensor, bonds: Sequence[int], modes: Sequence[int], columns: int
) -> Tensor:
    packed = functional.embedding(ids, table)
    state, start = packed.new_ones(*ids.shape, 1, 1), 0
    for left, mode, right in zip(bonds, modes, bonds[1:], strict=False):
        core = packed[..., start : start + left * mode * right].reshape(*ids.shape, left, mode * right)
        state = (state @ core).reshape(*ids.shape, -1, right)
        start += left * mode * right
    return state.flatten(-2)[..., :columns].contiguous()


LEAST = 16
"""Smallest side of a product of tiles."""
LARGEST = 2**14
"""Numbers of a tile that fit into the registers of a program."""


def padded(size: int, least: int = 1) -> int:
    """The next power of two, at least ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def tensor_train_tiles(shapes: Sequence[Sequence[int]]) -> dict[str, int] | None:
    """Sides of the kernel's tiles for cores of these shapes; None where it has none for them."""
    if len(shapes) == 2:
        (_, _, n1, r1), (_, _, n2, _) = shapes
        sides = {"N1": padded(n1, LEAST), "R1": padded(r1, LEAST), "N2": padded(n2, LEAST)}
        tiles = [sides["N1"] * sides["R1"], sides["R1"] * sides["N2"], sides["N1"] * sides["N2"]]
    elif len(shapes) == 3:
        (_, _, n1, r1), (_, _, n2, r2), (_, _, n3, _) = shapes
        sides = {"N1": padded(n1, LEAST), "R1": padded(r1, LEAST), "N2": padded(n2)}
        sides |= {"R2": padded(r2, LEAST), "N3": padded(n3, LEAST)}
        tiles = [
            sides["R1"] * sides["N2"] * sides["R2"],
            sides["N1"] * sides["N2"] * sides["R2"],
            sides["N1"] * sides["N2"] * sides["N3"],
        ]
    else:
        return None
    return sides if max(tiles) <= LARGEST else None


def token_mps_fits(bonds: Sequence[int], modes: Sequence[int]) -> bool:
    """Whether the kernel has a program for rows of such cores."""
    width = math.prod(modes)
    largest = width * max(padded(left) * padded(right) for left, right in pairwise(bonds))
    return largest <= LARGEST and not width & (width - 1)


TENSOR_TRAIN_LOOKUP = FusedOp(
    "tensor_train_lookup(Tensor ids, Tensor[] cores) -> Tensor",
    _tensor_train_chain,
    "geofx.ops.kernels.table_lookups:tensor_train_lookup",
)
TOKEN_MPS_LOOKUP = FusedOp(
    "token_mps_lookup(Tensor ids, Tensor table, int[] bonds, int[] modes, int columns) -> Tensor",
    _token_mps_chain,
    "geofx.ops.kernels.table_lookups:token_mps_lookup",
)


def tensor_train_lookup(ids: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """G₁[i₁] … G_d[i_d] for the digits i_k of each id in the mixed base m_k.

    ``ids`` int64 of any shape, cores (r_{k-1}, m_k, n_k, r_k) -> (..., Π n_k). Not checked: 0 <= id < Π m_k.
    """
    result: Tensor = TENSOR_TRAIN_LOOKUP(ids, list(cores))
    return result


def token_mps_lookup(
    ids: Tensor, table: Tensor, bonds: Sequence[int], modes: Sequence[int], columns: int
) -> Tensor:
    """G_1 G_2 .. G_K of the asked rows, from left to right.

    ``table`` (rows, Σ b_{k-1} m_k b_k) holds the cores of a row one after the other, ``bonds`` b_0 .. b_K
    with b_0 = b_K = 1 -> (..., columns), columns <= Π m_k.
    """
    result: Tensor = TOKEN_MPS_LOOKUP(ids, table, list(bonds), list(modes), columns)
    return result
