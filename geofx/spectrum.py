"""The loss-weighted singular values of a site: what truncating it at any rank would cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Spectrum:
    """σ_i² of G^{1/2} W A^{1/2}, descending: tail(k) is the predicted loss of rank k.

    Attributes:
        squares: σ_i², length min(out, in), in units of the loss.
    """

    squares: NDArray[np.float64]

    @cached_property
    def _tails(self) -> NDArray[np.float64]:
        return np.concatenate([np.cumsum(self.squares[::-1])[::-1], [0.0]])

    @property
    def total(self) -> float:
        """Σ σ_i²: the predicted loss of removing the site altogether (its sensitivity)."""
        return float(self._tails[0])

    def tail(self, rank: int) -> float:
        """Σ_{i > rank} σ_i²."""
        return float(self._tails[min(rank, len(self.squares))])

    def rank_at(self, energy: float) -> int:
        """Least rank that keeps the share ``energy`` in [0, 1] of Σ σ_i²."""
        allowed = (1.0 - energy) * self.total
        return int(np.argmax(self._tails <= allowed))

    @property
    def numerical_rank(self) -> int:
        """Number of σ_i above max(shape) · eps · σ_1, eps of float32."""
        if self.total == 0.0:
            return 0
        floor = (len(self.squares) * np.finfo(np.float32).eps) ** 2 * self.squares[0]
        return int((self.squares > floor).sum())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ_i / Σ σ (Roy and Vetterli, 2007)."""
        sigma = np.sqrt(self.squares)
        if sigma.sum() == 0.0:
            return 0.0
        share = sigma[sigma > 0] / sigma.sum()
        return float(np.exp(-(share * np.log(share)).sum()))

    @property
    def stable_rank(self) -> float:
        """Σ σ_i² / σ_1²."""
        return self.total / float(self.squares[0]) if self.total > 0.0 else 0.0
