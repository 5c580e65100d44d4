"""One row per format: adding a format means adding a row here, and every law below it is inherited."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geofx.factorizations import Dense, Factorization, GaugeFixed, LowRank


@dataclass(frozen=True)
class Case:
    """How to test one format.

    Attributes:
        small, large: two settings for a 24 x 20 weight, large being the bigger.
        structured: a (24, 20) float64 weight that ``large`` writes exactly.
        tolerance: relative, of a float32 round trip through `fit` and `to_dense`.
    """

    small: Factorization
    large: Factorization
    structured: Tensor
    tolerance: float


def _rank(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(24, rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, 20, generator=generator, dtype=torch.float64)


CASES: dict[str, Case] = {
    "dense": Case(Dense(), Dense(), _rank(20), 0.0),
    "low_rank": Case(LowRank(3), LowRank(9), _rank(9), 1e-6),
    "gauge_fixed": Case(GaugeFixed(3), GaugeFixed(11), _rank(11), 5e-5),
}
"""Keyed by the format's name; a second row of a format adds a suffix after a dash."""

CASES["low_rank-input"] = Case(LowRank(3, "input"), LowRank(9, "input"), _rank(9), 1e-6)
CASES["low_rank-none"] = Case(LowRank(3, "none"), LowRank(9, "none"), _rank(9), 1e-6)
CASES["gauge_fixed-pivoted"] = Case(GaugeFixed(3, "pivoted"), GaugeFixed(11, "pivoted"), _rank(11), 1e-6)
