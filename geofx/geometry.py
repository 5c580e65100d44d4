"""The taxonomy: a factorization is a set of subspaces and the transformations among them.

Source: Geometry is All You Need (arXiv 2410.03040), Definitions 7 and 8 and Section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Operation = Literal[
    "project", "scale", "expand", "contract", "direct_product", "direct_sum", "permute", "identity"
]


@dataclass(frozen=True)
class Subspace:
    """A subspace of dimension ``dim`` inside an ambient space of dimension ``ambient``."""

    name: str
    dim: int
    ambient: int


@dataclass(frozen=True)
class Transformation:
    """``operation`` that carries ``source`` subspaces to ``target``."""

    operation: Operation
    source: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class GeometricForm:
    """How many subspaces a format has, which, and what happens among them, in order."""

    subspaces: tuple[Subspace, ...]
    transformations: tuple[Transformation, ...]
