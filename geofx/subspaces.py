"""Subspaces as numbers: bases to project onto and expand from, and the composition of vectors.

Source: Geometry is All You Need (arXiv 2410.03040), Definitions 7 and 8, equation 11 and Table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from geofx.errors import NumericsError
from geofx.linalg import eigh_psd

RESOLVED = torch.finfo(torch.float64).eps ** 0.5
"""Share of the largest scale below which squares are lost in the rounding of WᵀW."""


@dataclass(frozen=True, eq=False)
class Basis:
    """The subspace of ℝᵃ that the orthonormal columns of ``vectors`` (a, d) span."""

    vectors: Tensor

    @property
    def dim(self) -> int:
        """d."""
        return self.vectors.shape[1]

    def project(self, x: Tensor) -> Tensor:
        """Coordinates ⟨x, b_i⟩ (..., d) of x (..., a)."""
        return x @ self.vectors

    def expand(self, coordinates: Tensor) -> Tensor:
        """Σ c_i b_i (..., a) of coordinates (..., d)."""
        return coordinates @ self.vectors.T


def compose(*vectors: Tensor) -> Tensor:
    """a × b × ...: the entry [x, y, ...] is a_x b_y ...; orders add up, so tensors compose as well."""
    return reduce(lambda one, other: torch.tensordot(one, other, dims=0), vectors)


def contract(one: Tensor, other: Tensor) -> Tensor:
    """Absorb the order that both share: the last of ``one``, the first of ``other``."""
    absorbed: Tensor = torch.tensordot(one, other, dims=1)
    return absorbed


def resize(tensor: Tensor, order: int, matrix: Tensor) -> Tensor:
    """One order of ``tensor`` carried to another size by contraction with ``matrix`` (new, old)."""
    resized: Tensor = torch.tensordot(matrix, tensor, dims=([1], [order]))
    return resized.movedim(0, order)


def principal_axes(weight: Tensor, dim: int) -> tuple[Basis, Tensor, Basis]:
    """(v_i), s_i, (w_i) with W v_i = s_i w_i (eq. 11): the ``dim`` axes of the input that W stretches most.

    The v_i are orthonormal and stay orthogonal under W, so that w_i = W v_i / s_i are orthonormal too, and
    x ↦ Σ s_i ⟨x, v_i⟩ w_i is W, or its best approximation by ``dim`` axes. In the dtype of ``weight``.

    Raises:
        NumericsError: W maps one of the axes to zero, or to less of its largest s than WᵀW can tell from it.
    """
    wide = weight.double()
    _, vectors = eigh_psd(wide.T @ wide, "weight")
    axes = vectors[:, :dim]
    images = wide @ axes
    scales = images.norm(dim=0)
    if axes.shape[1] < dim or not bool((scales > RESOLVED * scales.max()).all()):
        raise NumericsError(f"the weight has fewer than {dim} axes", fix="take a smaller dim")
    return Basis(axes.to(weight)), scales.to(weight), Basis((images / scales).to(weight))
