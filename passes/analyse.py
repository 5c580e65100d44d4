"""Spectra of all regions from their moments, and what the eye wants to know of each on its node."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from geofx.annotations import SENSITIVITY, SITE, Key, Sensitivity
from geofx.errors import NumericsError
from geofx.moments import Moments
from geofx.program import Program
from geofx.progress import Progress, log_progress
from geofx.region import OWN, Region
from geofx.region_analysis import MomentMetrics, RegionAnalysis
from geofx.site import Site, Skip
from geofx.spectrum import Spectrum

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Analyse:
    """Leaves a `Sensitivity` on every matmul that has a spectrum."""

    spectra: Mapping[str, Spectrum] = field(default_factory=dict)

    name: ClassVar[str] = "analyse"
    reads: ClassVar[tuple[Key[Any], ...]] = (SITE,)
    writes: ClassVar[tuple[Key[Any], ...]] = (SENSITIVITY,)

    def run(self, program: Program) -> bool:
        """Annotate; the graph itself stays as it is."""
        for node in program.graph.nodes:
            spectrum = self.spectra.get(SITE.get(node).weight) if SITE.name in node.meta else None
            if spectrum is not None:
                SENSITIVITY.set(node, sensitivity(spectrum))
        return False


def analyse(
    program: Program,
    regions: Iterable[Region],
    moments: Moments,
    known: Mapping[str, Spectrum] | None = None,
    progress: Progress = log_progress,
) -> tuple[dict[str, RegionAnalysis], list[Skip]]:
    """The analysis of every region; a region whose decomposition fails is skipped with the reason.

    ``known`` spectra, of a saved analysis, are taken instead of being computed again.
    """
    found: dict[str, RegionAnalysis] = {}
    skips: list[Skip] = []
    todo = tuple(regions)
    progress("analyse", 0, len(todo))
    for done, region in enumerate(todo):
        unseen = _unseen(region, moments)
        if unseen is not None:
            if region.kind in OWN:
                logger.warning("%s stays dense: %s", region.name, unseen.detail)
                skips.append(unseen)
        else:
            try:
                found[region.name] = _analysed(program, region, moments, (known or {}).get(region.name))
            except NumericsError as error:
                logger.warning("%s stays dense: %s", region.name, error)
                skips.append(Skip(region.name, "SVD_FAILED", str(error)))
        progress("analyse", done + 1, len(todo))
    return found, skips


def _analysed(program: Program, region: Region, moments: Moments, known: Spectrum | None) -> RegionAnalysis:
    """The analysis, its spectrum found; raises NumericsError where it cannot be."""
    weights = {site.weight: canonical_weight(program, site) for site in region.sites}
    metrics = MomentMetrics(weights, moments)
    analysis = RegionAnalysis(region, weights, metrics, known, _directions(region, moments))
    if region.has_spectrum:
        _ = analysis.spectrum
    return analysis


def _unseen(region: Region, moments: Moments) -> Skip | None:
    """A region that no token or no gradient reached: nothing says what the loss would lose by it."""
    for site in region.sites:
        if moments.mode != "data_free" and moments.tokens_at(site.weight) == 0:
            return Skip(region.name, "NO_CALIBRATION", "no calibration token reached it")
        inputs = moments.input_moment(site.weight)
        if inputs is not None and not inputs.any():
            return Skip(region.name, "NO_SIGNAL", "its input is always zero")
        gradients = [
            part[site.weight] for part in (moments.outputs, moments.lookup_outputs) if site.weight in part
        ]
        if gradients and not any(gradient.any() for gradient in gradients):
            return Skip(region.name, "NO_SIGNAL", "the loss has no gradient at its output")
    return None


def _directions(region: Region, moments: Moments) -> Tensor | None:
    """E[x̄ x̄ᵀ] at the region's inputs, the mean where they differ; None where it was not asked for.

    Nor where the inputs are of several spaces, as those of an MLP's maps are.
    """
    if len({site.shape[1] for site in region.sites}) > 1:
        return None
    keys = {moments.input_of.get(name, "") for name in region.weights}
    found = [moments.directions[key] for key in sorted(keys) if key in moments.directions]
    return torch.stack(found).mean(0) if len(found) > 1 else next(iter(found), None)


def canonical_weight(program: Program, site: Site) -> Tensor:
    """The weight of ``site`` as (out, in), whatever the stored orientation; a view, without gradient."""
    stored = program.weight(site.weight).detach()
    return stored.t() if site.transposed else stored


def sensitivity(spectrum: Spectrum) -> Sensitivity:
    """The figures of a spectrum that `inspect` and graph tools show."""
    return Sensitivity(
        rank=spectrum.numerical_rank,
        effective_rank=spectrum.effective_rank,
        stable_rank=spectrum.stable_rank,
        rank_99=spectrum.rank_at(0.99),
        loss=spectrum.total,
        spectrum=tuple(float(value) for value in spectrum.squares),
    )
