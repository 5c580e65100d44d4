"""Sizes written as products: how a matrix is folded into a tensor."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=4096)
def fold(size: int, parts: int) -> tuple[int, ...] | None:
    """``parts`` factors > 1 whose product is ``size``, as equal as possible, descending; None where none are.

    ``fold(576, 2) == (24, 24)``, ``fold(1536, 3) == (16, 12, 8)``, ``fold(13, 2)`` is None.
    """
    if parts == 1:
        return (size,) if size > 1 else None
    best: tuple[int, ...] | None = None
    for first in divisors(size):
        rest = fold(size // first, parts - 1) if first > 1 else None
        if rest is not None and (best is None or _spread((first, *rest)) < _spread(best)):
            best = tuple(sorted((first, *rest), reverse=True))
    return best


def divisors(size: int) -> tuple[int, ...]:
    """All divisors of ``size``, ascending."""
    low = [part for part in range(1, math.isqrt(size) + 1) if size % part == 0]
    return (*low, *(size // part for part in reversed(low) if part * part != size))


def _spread(parts: tuple[int, ...]) -> float:
    return max(parts) / min(parts)
