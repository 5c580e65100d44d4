"""The report of a result, from its analysis, plan and measurements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import nn

from geofx.artifact import bytes_on_disk
from geofx.choice import Choice
from geofx.graph_block import block_of
from geofx.moments import Moments
from geofx.plan import Plan
from geofx.program import Program
from geofx.region import TABLES
from geofx.region_analysis import RegionAnalysis
from geofx.report import CalibrationCard, Measured, RegionRow, Report
from geofx.site import Skip
from geofx.sources import Source
from geofx.spectrum import Spectrum
from geofx.stages import Stages
from geofx.verify import Fidelity

SPECTRUM_POINTS = 64
"""A spectrum in a report is thinned to at most so many values."""


class Analysed(Protocol):
    """What a report takes from an analysis."""

    original: Program
    regions: dict[str, RegionAnalysis]
    skips: list[Skip]
    moments: Moments
    module: nn.Module | None
    stages: Stages
    holdout_is_calibration: bool


def summarize(analysis: Analysed, plan: Plan, program: Program, fidelity: Fidelity | None) -> Report:
    """Original against optimized: bytes, parameters, flops, losses, and a row per region."""
    linear = [choice for choice in plan.choices if choice.kind not in TABLES]
    moments = analysis.moments
    return Report(
        model=type(analysis.module).__name__ if analysis.module is not None else "exported program",
        budget=_in_words(plan),
        counting=f"scope {plan.budget.scope}: tied weights once, tensors as stored, indices included",
        original=Measured(
            size_bytes=analysis.original.size_bytes(),
            parameters=analysis.original.parameter_count(),
            linear_parameters=sum(choice.dense_parameters for choice in linear),
            flops_per_token=plan.dense.flops,
            loss=fidelity.loss_original if fidelity else None,
        ),
        optimized=Measured(
            size_bytes=program.size_bytes(),
            parameters=program.parameter_count(),
            linear_parameters=sum(choice.parameters for choice in linear),
            flops_per_token=plan.predicted.flops,
            loss=fidelity.loss_optimized if fidelity else None,
        ),
        predicted_loss=plan.loss,
        fidelity=asdict(fidelity) if fidelity else {},
        stages=tuple(analysis.stages.done),
        calibration=CalibrationCard(
            moments.mode,
            moments.unit,
            max(moments.tokens.values(), default=0),
            moments.loss_terms,
            dict(moments.dropped),
        ),
        regions=tuple(_rows(analysis, plan)),
        notes=tuple(_notes(analysis)),
        block=block_of(analysis.original, program),
    )


def with_source(report: Report, source: Source, original: Program, optimized: Program, near: Path) -> Report:
    """``report`` with the source's name and note, and the bytes on disk of both, measured beside ``near``.

    Raises:
        ResourceError: the disk is too small.
    """
    named = replace(report, model=source.description, notes=(*filter(None, [source.note]), *report.notes))
    return named.with_measured(
        original={"disk_bytes": bytes_on_disk(original, near)},
        optimized={"disk_bytes": bytes_on_disk(optimized, near)},
    )


def _notes(analysis: Analysed) -> Iterator[str]:
    if analysis.holdout_is_calibration:
        yield "held-out batches are calibration batches: what is measured on them looks better than it is"
    for skip in analysis.skips:
        yield f"{skip.weight}: {skip.reason}: {skip.detail}"


def _rows(analysis: Analysed, plan: Plan) -> Iterable[RegionRow]:
    refused: dict[str, list[str]] = defaultdict(list)
    for rejection in plan.rejections:
        refused[rejection.region].append(
            f"{rejection.reason}: {rejection.factorization} {rejection.detail}".strip()
        )
    for choice in plan.choices:
        found = analysis.regions.get(choice.region)
        spectrum = found.spectrum if found is not None and found.region.has_spectrum else None
        yield _row(choice, tuple(refused[choice.region]), spectrum)


def _row(choice: Choice, refused: tuple[str, ...], spectrum: Spectrum | None) -> RegionRow:
    form = choice.factorization.geometry(choice.as_region())
    return RegionRow(
        name=choice.region,
        kind=choice.kind,
        shape=choice.shapes[0],
        factorization=choice.factorization.name,
        rank=getattr(choice.factorization, "rank", None),
        kept_ratio=choice.parameters / max(1, choice.dense_parameters),
        loss=choice.loss,
        refused=refused,
        sensitivity=None if spectrum is None else spectrum.total,
        effective_rank=None if spectrum is None else spectrum.effective_rank,
        rank_99=None if spectrum is None else spectrum.rank_at(0.99),
        spectrum=() if spectrum is None else _thinned(spectrum),
        subspaces=f"{form.count}: {form.which}",
        transformations=form.operations,
    )


def _thinned(spectrum: Spectrum) -> tuple[float, ...]:
    count = len(spectrum.squares)
    picked = np.unique(np.linspace(0, count - 1, min(count, SPECTRUM_POINTS)).round().astype(int))
    return tuple(float(spectrum.squares[index]) for index in picked)


def _in_words(plan: Plan) -> str:
    limits = {
        key: value for key, value in asdict(plan.budget).items() if value is not None and key != "scope"
    }
    return ", ".join(f"{key} {value}" for key, value in limits.items())
