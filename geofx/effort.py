"""How much work an analysis is worth: what each level does beyond one pass over the calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from geofx.errors import ConfigError
from geofx.moments import Moments
from geofx.region_analysis import RegionAnalysis, region_metric

Level = Literal["fast", "balanced", "best"]


@dataclass(frozen=True)
class Effort:
    """What a level adds.

    Attributes:
        validated: an eighth of the calibration batches is kept out of the moments, for choices to be made
            on and for the predicted loss to be set by.
        rounds: windows that the model writes itself for each one it was given; as many as were given join
            the moments.
        refines: the factors are trained for a while, after the plan, on all of these.
    """

    validated: bool
    rounds: int
    refines: bool = False


EFFORTS: Mapping[Level, Effort] = {
    "fast": Effort(validated=False, rounds=0),
    "balanced": Effort(validated=True, rounds=1),
    "best": Effort(validated=True, rounds=2, refines=True),
}
"""By name. Beside ``"fast"``, ``"balanced"`` takes about 3 times as long, ``"best"`` 6 to 9 times."""


def effort_named(level: str) -> Effort:
    """Raises ConfigError where there is no such level."""
    for name, effort in EFFORTS.items():
        if name == level:
            return effort
    raise ConfigError(f"no effort {level!r}", fix=f"use {', '.join(EFFORTS)}")


def loss_on(seen: Moments, regions: Mapping[str, RegionAnalysis]) -> float:
    """Σ tr(G ΔW A ΔWᵀ) with A and G of ``seen``, ΔW what truncating to half the ranks by ``regions`` changes.

    With moments of other data than those of ``regions`` it says which of several analyses holds better.
    """
    total = 0.0
    for name, analysis in regions.items():
        if analysis.region.kind != "single":
            continue
        cut, rank = analysis.truncation, max(1, min(analysis.region.shape) // 2)
        change = analysis.weight.double() - (cut.left[:, :rank] @ cut.right[:rank]).double()
        metric = region_metric(analysis.weight, seen.input_moment(name), seen.output_moment(name))
        total += metric.loss(change)
    return total
