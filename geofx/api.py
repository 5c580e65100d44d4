"""The front door: analyze, optimize, load."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.export import ExportedProgram

from geofx.analysis import Analysis, config_of
from geofx.analysis_store import read_analysis
from geofx.annotations import SITE
from geofx.batches import Batch, longest_sequence, split, spread, warn_of_shared_rows
from geofx.budget import Budget
from geofx.digest import hash_tensors
from geofx.effort import Effort, Level, effort_named, loss_on
from geofx.errors import (
    ArtifactMismatchError,
    BudgetInfeasibleError,
    CalibrationError,
    ConfigError,
    NumericsError,
    ResourceError,
)
from geofx.generated_text import generated_text
from geofx.latency_budget import check_wanted
from geofx.model import OptimizedModel
from geofx.moments import UNITS, Mode, Moments, pooled
from geofx.objective import Custom, Objective, SquaredError, UserLoss, choose_objective
from geofx.optimization import optimize_analysis
from geofx.passes.analyse import Analyse, analyse
from geofx.passes.calibrate import calibrate
from geofx.passes.canonicalize import Canonicalize
from geofx.passes.contract import run_passes
from geofx.passes.find_regions import find_regions
from geofx.passes.find_sites import FindSites, find_sites, sites_of
from geofx.patterns import Patterns, matching
from geofx.program import Program
from geofx.progress import Progress, log_progress
from geofx.region import OWN
from geofx.region_analysis import RegionAnalysis
from geofx.site import Skip
from geofx.spectrum import Spectrum
from geofx.stages import Stages
from geofx.target import Target, targets_of
from geofx.text import batches_of
from geofx.trace import input_names, trace

logger = logging.getLogger(__name__)

PROBE_RATIO = 0.8
"""Of the linear parameters: a share as most people ask for."""


def analyze(
    model: nn.Module | ExportedProgram,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    loss: UserLoss | None = None,
    mode: Mode = "two_sided",
    holdout: Any = None,
    example: Any = None,
    seed: int = 0,
    progress: Progress = log_progress,
    files: Mapping[str, bytes] | None = None,
    directions: bool = False,
    effort: Level = "fast",
) -> Analysis:
    """Trace ``model``, run ``calibration`` through it, and measure what the loss sees of every weight.

    Args:
        model: any nn.Module, traced GraphModule or ExportedProgram; it is not changed.
        calibration: token ids, batches (dicts, tuples, a DataLoader, a generator), or text with
            ``tokenizer``.
        tokenizer: cuts text into windows of 512 tokens that begin as it begins a text.
        loss: ``loss(output, batch)``, a tensor of terms or the mean per token; by default next-token
            cross-entropy where the model predicts tokens, relative squared error of the outputs otherwise.
        mode: ``"two_sided"`` runs forward and backward; ``"forward"`` only forward, so losses are not
            comparable across sites in nats; ``"data_free"`` neither, from the weights alone.
        holdout: batches or text to verify on; by default the last eighth of the calibration batches.
        example: inputs to trace with; by default the first calibration batch.
        seed: of all that is drawn: the noise that squared error is sampled with, text that is written.
        directions: also take the moments of inputs scaled to norm 1, for ESPACE's normalised criteria.
        effort: what is done beyond one pass over the calibration data, at what cost: `geofx.effort`.

    Raises:
        CaptureError, CalibrationError, ConfigError: as their messages say.
    """
    level = effort_named(effort)
    if level.validated and mode != "two_sided":
        raise ConfigError(f"effort {effort!r} needs the gradients of the loss", fix="use mode='two_sided'")
    stages = Stages()
    names, config = input_names(model), config_of(model) if isinstance(model, nn.Module) else None
    longest = longest_sequence(config)
    batches = batches_of(calibration, tokenizer, names, "calibration data", longest)
    if mode != "data_free" and not batches:
        raise CalibrationError("there is no calibration data", fix="pass calibration=, or mode='data_free'")
    held = batches_of(holdout, tokenizer, names, "held-out data", longest)
    parts = _Parts.of(batches, held, level)
    batches = parts.calibration
    if example is None and not batches:
        raise ConfigError("data-free analysis needs inputs to trace with", fix="pass example=")
    with stages("trace"):
        original, program = _traced(model, batches[0] if example is None else example, progress)
    objective = choose_objective(original, batches[0], loss, seed) if batches else SquaredError(seed)
    moments = Moments(mode="data_free", unit=UNITS["data_free"])
    if mode != "data_free":
        with stages("calibrate"):
            moments = calibrate(program, batches, objective, mode, progress, directions)
    module = model if isinstance(model, nn.Module) else None
    with stages("analyse"):
        seen = _Seen.of(program, moments, progress)
    written: list[Batch] = []
    if parts.validation and level.rounds:
        with stages("write text"):
            written = generated_text(module, program, batches, objective, level.rounds, seed, progress)
    if written:
        with stages("calibrate on written text"):
            further = calibrate(
                program, written[: len(written) // level.rounds], objective, mode, progress, directions
            )
            unseen = calibrate(program, parts.validation, objective, mode, progress)
        with stages("analyse with written text"):
            seen = _better(seen, _Seen.of(program, pooled(moments, further), progress), unseen)
    analysis = _assemble(
        original, program, seen, objective, parts.holdout, module, stages, progress, files or {}
    )
    analysis.holdout_is_calibration, analysis.validation = parts.leaking, parts.validation
    if parts.validation:
        analysis.calibration, analysis.written, analysis.refines = batches, written, level.refines
        _probe(analysis)
    return analysis


def _probe(analysis: Analysis) -> None:
    """Scale all predicted losses to what the plan of `PROBE_RATIO` loses on the validation batches."""
    with analysis.stages("probe predictions"):
        try:
            plan = analysis.plan(Budget(parameters=PROBE_RATIO, scope="factorizable"))
            rewrites, failures = analysis.fit(plan)
            if not failures:
                analysis.probe(plan, rewrites, analysis.loss_of)
        except BudgetInfeasibleError:
            logger.info("predictions are not probed: no plan keeps %.3g", PROBE_RATIO)
        except (NumericsError, ResourceError) as error:
            logger.warning("predictions are not probed: %s", error)


@dataclass(frozen=True)
class _Parts:
    """The batches that moments are taken of, those for choices, and those to verify on, by then unseen."""

    calibration: list[Batch]
    validation: list[Batch]
    holdout: list[Batch]
    leaking: bool

    @classmethod
    def of(cls, batches: list[Batch], held: list[Batch], level: Effort) -> _Parts:
        """Parts of the batches that are given, where none are given for them."""
        leaking, validation = not held and len(batches) == 1, list[Batch]()
        if leaking:
            logger.warning("one batch is both calibration and held-out data: the measured loss is too good")
        warn_of_shared_rows(batches, held)
        if not held and batches:
            batches, held = split(batches)
        if level.validated and len(batches) > 1:
            batches, validation = spread(batches)
        elif level.validated:
            logger.warning("too few batches to set some apart for choices: no more is done than with 'fast'")
        return cls(batches, validation, held, leaking)


@dataclass(frozen=True, eq=False)
class _Seen:
    """Moments, what they say of every region, and why they say nothing of some."""

    moments: Moments
    regions: dict[str, RegionAnalysis]
    skips: list[Skip]

    @classmethod
    def of(
        cls,
        program: Program,
        moments: Moments,
        progress: Progress,
        known: Mapping[str, Spectrum] | None = None,
    ) -> _Seen:
        """The regions of ``program`` under ``moments``."""
        sites, skips = find_sites(program)
        regions, failed = analyse(program, find_regions(program, sites), moments, known, progress)
        return cls(moments, regions, [*skips, *failed])


Analysed = TypeVar("Analysed", _Seen, Analysis)


def _better(first: Analysed, second: Analysed, unseen: Moments) -> Analysed:
    """The one whose truncations lose less by the moments of data that neither has seen."""
    names = first.regions.keys() & second.regions.keys()
    losses = [loss_on(unseen, {name: one.regions[name] for name in sorted(names)}) for one in (first, second)]
    logger.info("predicted on validation: %.4g without text of the model's own, %.4g with it", *losses)
    return second if losses[1] < losses[0] else first


def load_analysis(
    path: str | Path,
    model: nn.Module,
    *,
    loss: UserLoss | None = None,
    files: Mapping[str, bytes] | None = None,
    progress: Progress = log_progress,
) -> Analysis:
    """The analysis that `Analysis.save` wrote, for the same ``model``, which is traced again.

    Raises:
        ArtifactCorruptError: the folder is damaged.
        ArtifactMismatchError: it belongs to a model with other weights.
        ConfigError: it was made with a loss of the user's own, and ``loss`` is missing.
    """
    stored = read_analysis(path)
    objective = stored.objective if loss is None else Custom(loss)
    if objective is None:
        raise ConfigError("the analysis was made with a loss of its own", where=str(path), fix="pass loss=")
    stages = Stages()
    with stages("trace"):
        original, program = _traced(model, stored.example, progress)
    if hash_tensors(original.tensors()) != stored.model_hash:
        raise ArtifactMismatchError(
            "the analysis belongs to other weights", where=str(path), fix="analyze this model"
        )
    with stages("analyse"):
        seen = _Seen.of(program, stored.moments, progress, stored.spectra)
    analysis = _assemble(
        original, program, seen, objective, stored.holdout, model, stages, progress, files or {}
    )
    analysis.holdout_is_calibration = stored.holdout_is_calibration
    analysis.validation, analysis.calibration = stored.validation, stored.calibration
    analysis.written, analysis.refines = stored.written, stored.refines
    analysis.loss_ratio = stored.loss_ratio
    return analysis


def _traced(model: nn.Module | ExportedProgram, example: Any, progress: Progress) -> tuple[Program, Program]:
    """The graph of a model, and the clone that everything works on."""
    progress("trace", 0, 1)
    original = trace(model, example)
    program = _canonical(original)
    progress("trace", 1, 1)
    return original, program


def _canonical(original: Program) -> Program:
    """The annotated clone that everything works on.

    Raises:
        ConfigError: it multiplies by no constant weight that geofx could factorize.
    """
    program = original.clone()
    run_passes(program, [Canonicalize(), FindSites()])
    if not sites_of(program):
        reasons = "; ".join(f"{skip.weight}: {skip.reason}" for skip in find_sites(program)[1][:5])
        raise ConfigError(f"the model has no matmul to factorize ({reasons or 'no constant weights'})")
    return program


def _assemble(
    original: Program,
    program: Program,
    seen: _Seen,
    objective: Objective,
    holdout: list[Batch],
    module: nn.Module | None,
    stages: Stages,
    progress: Progress,
    files: Mapping[str, bytes],
) -> Analysis:
    own = {name: item.spectrum for name, item in seen.regions.items() if item.region.kind in OWN}
    run_passes(program, [Analyse(own)], written=[SITE])
    regions, skips, moments = seen.regions, seen.skips, seen.moments
    return Analysis(
        original, program, regions, skips, moments, objective, holdout, module, stages, progress, files
    )


def optimize(
    model: nn.Module | ExportedProgram,
    budget: Budget,
    *,
    calibration: Any = None,
    include: Patterns | None = None,
    ignore: Patterns = (),
    tokenizer: Any = None,
    loss: UserLoss | None = None,
    mode: Mode = "two_sided",
    holdout: Any = None,
    example: Any = None,
    seed: int = 0,
    progress: Progress = log_progress,
    files: Mapping[str, bytes] | None = None,
    effort: Level = "fast",
    target: Target | Iterable[Target] | None = None,
) -> OptimizedModel:
    """Compress ``model`` to ``budget`` with the least predicted loss; the other arguments are `analyze`'s.

    A factorization that turns out not to fit is refused and the plan made again without it.

    Args:
        include: patterns of the weights that may be rewritten; by default all but tables (`Analysis.plan`).
        ignore: patterns of weights that may not; a pattern that matches nothing is an error.
        target: what a budget for the latency is of; several are weighed by their ``weight``.

    Raises:
        BudgetInfeasibleError: no plan meets the budget; carries the smallest. Or none was measured to be as
            fast as asked; carries the best result.
    """
    target = None if target is None else targets_of(target)
    check_wanted(budget, target)
    if isinstance(model, nn.Module):
        matching([name for name, _ in model.named_parameters(remove_duplicate=False)], include or (), ignore)
    analysis = analyze(
        model,
        calibration,
        tokenizer=tokenizer,
        loss=loss,
        mode=mode,
        holdout=holdout,
        example=example,
        seed=seed,
        progress=progress,
        files=files,
        effort=effort,
    )
    return optimize_analysis(analysis, budget, include=include, ignore=ignore, target=target)
