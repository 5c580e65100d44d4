"""Options: what each factorization proposes for each region, priced and with its predicted loss."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from geofx.errors import NumericsError
from geofx.factorizations import FACTORIZATIONS, Dense, Factorization
from geofx.progress import Progress, log_progress
from geofx.region import OWN, Region
from geofx.region_analysis import RegionAnalysis
from geofx.screening import Screen
from geofx.site import Skip
from geofx.workload import Workload, measure

logger = logging.getLogger(__name__)

SIZES = 6
"""Settings per region that a format without a closed form is fitted at to learn its losses."""


@dataclass(frozen=True)
class Option:
    """One way to write one region: its price and the loss that it is predicted to add.

    Attributes:
        loss: predicted increase in the analysis' unit, >= 0.
        rows_per_token: how often the region is used by a token.
        latency_s: of a call on the targets; 0 where none was asked.
    """

    region: Region
    factorization: Factorization
    workload: Workload
    loss: float
    rows_per_token: float = 1.0
    latency_s: float = 0.0

    @property
    def is_dense(self) -> bool:
        """Whether this option leaves the region as it is."""
        return isinstance(self.factorization, Dense)


def list_options(
    analyses: Iterable[RegionAnalysis],
    formats: Iterable[type[Factorization]] | None = None,
    rows_per_token: Mapping[str, float] | None = None,
    progress: Progress = log_progress,
) -> tuple[list[Option], list[Skip]]:
    """Every option of every region, `Dense` among those of every single site, and why formats proposed none.

    Formats without a closed form are priced at `SIZES` settings a region, each by a fit.

    Args:
        analyses: of the regions.
        formats: those to price; by default all, without a closed form only where `geofx.screening` lets them.
        rows_per_token: how often a weight is used per token of the model (2 for a layer called twice, less
            than 1 for one that sees a sequence once); 1 where it says nothing.
        progress: is told the regions that are priced and the formats that are tried.
    """
    every, named = list(analyses), FACTORIZATIONS if formats is None else tuple(formats)
    asked: tuple[type[Factorization], ...] = tuple(dict.fromkeys((Dense, *named)))
    rows = rows_per_token or {}
    options: list[Option] = []
    skips: list[Skip] = []

    def add(stage: str, members: Sequence[type[Factorization]], among: Sequence[RegionAnalysis]) -> None:
        progress(stage, 0, len(among))
        for done, analysis in enumerate(among):
            for member in members:
                found, skip = _options_of(member, analysis, uses_per_token(analysis.region, rows))
                options.extend(found)
                skips.extend(skip)
            progress(stage, done + 1, len(among))

    add("price options", [member for member in asked if member.closed_form], every)
    open_forms = [member for member in asked if not member.closed_form]
    if formats is not None:
        for member in open_forms:
            add(f"price {member.name}", [member], every)
        return options, skips
    screen = _screen(every, options)
    trials = [pair for pair in product(open_forms, screen.smallest) if pair[1] in pair[0].regions]
    progress("try formats", 0, len(trials))
    for done, (member, kind) in enumerate(trials):
        refusal = screen.refusal(member, kind)
        progress("try formats", done + 1, len(trials))
        if refusal is None:
            logger.info("%s joins the plan in %s regions", member.name, kind)
            covered = [item for item in every if screen.covers(item.region)]
            add(f"price {member.name} in {kind} regions", [member], covered)
        else:
            skips.append(Skip(f"{kind} regions", "SCREENED", f"{member.name} {refusal}"))
    return options, skips


def _screen(analyses: list[RegionAnalysis], closed: list[Option]) -> Screen:
    frontier: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for option in closed:
        share = option.workload.weight_bytes / measure(Dense(), option.region).weight_bytes
        frontier[option.region.name].append((share, option.loss))
    return Screen.of(analyses, frontier)


def _options_of(
    member: type[Factorization], analysis: RegionAnalysis, rows: float
) -> tuple[list[Option], list[Skip]]:
    region = analysis.region
    if region.kind not in member.regions:
        return [], []
    dense = measure(Dense(), region).weight_bytes
    settings = [(item, measure(item, region)) for item in member.candidates(region, analysis)]
    gaining = [(item, work) for item, work in settings if member is Dense or work.weight_bytes < dense]
    if not gaining and region.kind in OWN:
        reason = "NO_GAIN" if settings else "TOO_SMALL"
        return [], [Skip(region.name, reason, f"{member.name} proposes nothing smaller")]
    try:
        return [
            Option(region, item, work.times(rows), item.predicted_loss(region, analysis), rows)
            for item, work in (gaining if member.closed_form else _thinned(gaining))
        ], []
    except NumericsError as error:
        return [], [Skip(region.name, "SVD_FAILED", str(error))]


def _thinned(settings: list[tuple[Factorization, Workload]]) -> list[tuple[Factorization, Workload]]:
    """At most `SIZES` of them, evenly spaced in bytes, the largest among them."""
    largest = settings[-1][1].weight_bytes if settings else 0
    wanted = [largest * (step + 1) / SIZES for step in range(SIZES)]
    nearest = [
        min(settings, key=lambda pair: abs(pair[1].weight_bytes - size)) for size in wanted if settings
    ]
    return list(dict.fromkeys(nearest))


def uses_per_token(region: Region, rows_per_token: Mapping[str, float]) -> float:
    """How often a region is used per token: the mean over its weights, exact where all are used as often."""
    return sum(rows_per_token.get(weight, 1.0) for weight in region.weights) / len(region.weights)
