"""The taxonomy: a factorization is a set of subspaces and the transformations among them.

Source: Geometry is All You Need (arXiv 2410.03040), Definitions 7 and 8 and Section 4: how many subspaces
are involved and which, and what geometric transformations occur among them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

Operation = Literal[
    "project",
    "scale",
    "expand",
    "contract",
    "add",
    "direct_product",
    "direct_sum",
    "permute",
    "select",
    "identity",
]


LONGEST_REPEAT = 8
"""Transformations that repeat in groups of at most so many are written once."""


@dataclass(frozen=True)
class Subspace:
    """A subspace of dimension ``dim`` inside an ambient space of dimension ``ambient``."""

    name: str
    dim: int
    ambient: int

    def __str__(self) -> str:
        inside = "" if self.dim == self.ambient else f" of {self.ambient}"
        return f"{self.name} {self.dim}{inside}"


@dataclass(frozen=True)
class Transformation:
    """``operation`` that carries ``source`` subspaces to ``target``."""

    operation: Operation
    source: tuple[str, ...]
    target: str


@dataclass(frozen=True)
class GeometricForm:
    """How many subspaces a format has, which, and what happens among them, in order.

    ``print(LowRank(64).geometry(region))``:
    ``2 subspaces (input 64 of 576, output 64 of 576): project, scale, expand``.
    """

    subspaces: tuple[Subspace, ...]
    transformations: tuple[Transformation, ...]

    @property
    def count(self) -> int:
        """How many subspaces."""
        return len(self.subspaces)

    @property
    def basis_numbers(self) -> int:
        """Σ dim · ambient: what a basis of every subspace takes.

        It is what a format stores that keeps one basis per subspace, with any scale folded in (low rank, CP).
        """
        return sum(space.dim * space.ambient for space in self.subspaces)

    @property
    def which(self) -> str:
        """The subspaces in words, those alike but for a number in the name counted."""
        kinds = Counter(str(replace(space, name=_kind(space.name))) for space in self.subspaces)
        return ", ".join(kind if number == 1 else f"{number} x {kind}" for kind, number in kinds.items())

    @property
    def operations(self) -> str:
        """The transformations in words, in order, what repeats counted: ``(scale x 24, permute) x 2``."""
        return ", ".join(_counted([step.operation.replace("_", " ") for step in self.transformations]))

    def __str__(self) -> str:
        plural = "" if self.count == 1 else "s"
        return f"{self.count} subspace{plural} ({self.which}): {self.operations}"


def _kind(name: str) -> str:
    """``name`` without the number that tells one from the next: ``block input`` of ``block 3 input``."""
    return re.sub(r"[\s.@\[]*\d+\]?", "", name).strip() or name


def _counted(words: list[str]) -> list[str]:
    """Neighbours that repeat, of one word and then of more, written once with their number."""
    period = 1
    while period <= min(len(words) // 2, LONGEST_REPEAT):
        shorter, start = [], 0
        while start < len(words):
            group, times = words[start : start + period], 1
            while words[start + times * period : start + (times + 1) * period] == group:
                times += 1
            once = ", ".join(group) if period == 1 else f"({', '.join(group)})"
            shorter.append(f"{once} x {times}" if times > 1 else words[start])
            start += times * period if times > 1 else 1
        words, period = shorter, period + 1
    return words
