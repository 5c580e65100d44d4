"""Options: what each factorization proposes for each region, priced and with its predicted loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from geofx.errors import NumericsError
from geofx.factorizations import FACTORIZATIONS, Dense, Factorization
from geofx.region import Region
from geofx.region_analysis import RegionAnalysis
from geofx.site import Skip
from geofx.workload import Workload, measure


@dataclass(frozen=True)
class Option:
    """One way to write one region: its price and the loss that it is predicted to add.

    Attributes:
        loss: predicted increase in the analysis' unit, >= 0.
    """

    region: Region
    factorization: Factorization
    workload: Workload
    loss: float

    @property
    def is_dense(self) -> bool:
        """Whether this option leaves the region as it is."""
        return isinstance(self.factorization, Dense)


def list_options(
    analyses: Iterable[RegionAnalysis],
    formats: Iterable[type[Factorization]] = FACTORIZATIONS,
    rows_per_token: Mapping[str, float] | None = None,
) -> tuple[list[Option], list[Skip]]:
    """Every option of every region, `Dense` among those of every single site, and why formats proposed none.

    ``rows_per_token`` says how often a weight is used per token of the model (2 for a layer called twice, less
    than 1 for one that sees a sequence once); 1 where it says nothing.
    """
    chosen: tuple[type[Factorization], ...] = tuple(dict.fromkeys((Dense, *formats)))
    options: list[Option] = []
    skips: list[Skip] = []
    for analysis in analyses:
        for member in chosen:
            found, skip = _options_of(member, analysis, _rows(analysis.region, rows_per_token or {}))
            options += found
            skips += skip
    return options, skips


def _options_of(
    member: type[Factorization], analysis: RegionAnalysis, rows: float
) -> tuple[list[Option], list[Skip]]:
    region = analysis.region
    if region.kind not in member.regions:
        return [], []
    try:
        priced = [
            Option(
                region,
                candidate,
                measure(candidate, region).times(rows),
                candidate.predicted_loss(region, analysis),
            )
            for candidate in member.candidates(region, analysis)
        ]
    except NumericsError as error:
        return [], [Skip(region.name, "SVD_FAILED", str(error))]
    if member is Dense:
        return priced, []
    dense = measure(Dense(), region)
    gaining = [option for option in priced if _gains(option.workload, dense)]
    if priced and gaining:
        return gaining, []
    return [], [
        Skip(region.name, "NO_GAIN" if priced else "TOO_SMALL", f"{member.name} proposes nothing smaller")
    ]


def _rows(region: Region, rows_per_token: Mapping[str, float]) -> float:
    """Mean over the sites: they are of one shape, or read one tensor."""
    return sum(rows_per_token.get(weight, 1.0) for weight in region.weights) / len(region.weights)


def _gains(work: Workload, dense: Workload) -> bool:
    return work.weight_bytes < dense.weight_bytes
