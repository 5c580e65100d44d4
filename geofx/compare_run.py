"""Every method at every share: list, fit, choose, rewrite, measure; one row's factors in memory at a time."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from geofx.batches import Batch
from geofx.budget import Budget
from geofx.cache import Cache, default_folder
from geofx.choice import Totals
from geofx.compare_choice import Chooser, Notes
from geofx.compare_fits import Fit, Fits, code_of, reason, seconds_of
from geofx.compare_latency import Stopwatch, not_installed
from geofx.compare_prices import Prices
from geofx.compare_subjects import Names, Subject, subjects
from geofx.comparison import Comparison, Engine, Figures, Row, finite
from geofx.compression import compression_ratio, parameter_count, parameter_mae
from geofx.digest import digest
from geofx.errors import ConfigError, PlanError, lasting, out_of_memory
from geofx.factorizations import Dense, Factored
from geofx.method import Allocation
from geofx.moments import Moments
from geofx.objective import Objective
from geofx.options import Option
from geofx.parameter_space import ParameterSpace
from geofx.plan import Plan
from geofx.planner import choose
from geofx.program import Program
from geofx.progress import Progress
from geofx.recipes import Recipe
from geofx.region_analysis import RegionAnalysis
from geofx.verify import Reference, verify
from geofx.workload import measure

logger = logging.getLogger(__name__)

Record = TypeVar("Record", Row, Figures)

Rewrites = dict[str, Factored]

ROUNDS = 7
"""Calls that a median latency is of."""


class Comparable(Protocol):
    """What a comparison takes from an analysis."""

    original: Program
    program: Program
    regions: dict[str, RegionAnalysis]
    moments: Moments
    objective: Objective
    holdout: list[Batch]
    module: Any
    model_hash: str
    loss_ratio: float
    progress: Progress

    def lower(self, plan: Plan, rewrites: Rewrites) -> Program:
        """The rewritten graph."""
        ...


def compare_analysis(
    analysis: Comparable,
    keep: float | Iterable[float] = 0.8,
    *,
    formats: Names = "all",
    recipes: Names | Iterable[Recipe] = "all",
    latency: Iterable[Engine] = ("torch",),
    cache: str | Path | None = None,
    rounds: int = ROUNDS,
    name: str = "",
) -> Comparison:
    """Each format and recipe at each share of the bytes of what it rewrites, on the same data.

    A format has two rows per share: the same share of every region, and the planner's choice within the
    same total. What was done is kept in ``cache`` and not done again.

    Raises:
        ConfigError: there is no held-out data, or a share, format, recipe or engine is not known.
    """
    if not analysis.holdout:
        raise ConfigError("there is no held-out data to compare on", fix="analyze with holdout=")
    keeps = _shares(keep)
    entrants = subjects(formats, recipes, analysis.regions)
    if not entrants:
        raise ConfigError("there is nothing to compare", fix="name formats or recipes")
    wanted = _engines(latency)
    missing = not_installed(wanted)
    engines = tuple(engine for engine in wanted if engine not in missing)
    folder = Cache(default_folder() if cache is None else Path(cache))
    run = _Run(analysis, folder, keeps, rounds, engines, missing)
    return run.comparison(entrants, name or type(analysis.module).__name__)


@dataclass
class _Run:
    analysis: Comparable
    cache: Cache
    keeps: tuple[float, ...]
    rounds: int
    engines: tuple[Engine, ...]
    missing: Mapping[Engine, str]

    def __post_init__(self) -> None:
        moments, holdout = self.analysis.moments, self.analysis.holdout
        tables = [value for value in vars(moments).values() if isinstance(value, Mapping)]
        seen = [item for table in tables for _, item in sorted(table.items()) if isinstance(item, Tensor)]
        self.base = digest(self.analysis.model_hash, moments.mode, moments.loss_terms, *seen)
        self.fits = Fits(self.cache, self.base)
        self.prices = Prices.of(self.analysis.original, self.analysis.program, self.analysis.regions)
        regions, progress = self.analysis.regions, self.analysis.progress
        self.chooser = Chooser(regions, self.fits, self.prices, self.keeps, progress)
        self.stopwatch = Stopwatch(self.analysis.original, self.cache.folder, self.rounds)
        self.reference = Reference(self.analysis.original)
        self.before = parameter_count(ParameterSpace.of(self.analysis.original))
        self.original, self.tokens = self._original()
        # a function has no hash, so its value tells losses apart; rounded, as threads change the last digits
        loss = self.analysis.objective.unit, f"{self.original.loss or 0.0:.5g}"
        self.measured_on = digest(loss, *(value for batch in holdout for _, value in sorted(batch.items())))

    def comparison(self, entrants: Sequence[Subject], name: str) -> Comparison:
        progress, rows = self.analysis.progress, list[Row]()
        total = sum(len(self.keeps) * len(subject.allocations) for subject in entrants)
        progress("compare", 0, total)
        for subject in entrants:
            for allocation in subject.allocations:
                for keep in self.keeps:
                    rows.append(self.row(subject, allocation, keep))
                    logger.info("%s", _said(rows[-1]))
                    progress("compare", len(rows), total)
            self.chooser.drop()
        moments, measured = self.analysis.moments, self.analysis.objective.unit
        return Comparison(
            model=name,
            original=self.original,
            unit=moments.unit,
            tokens=self.tokens,
            calibration_tokens=max(moments.tokens.values(), default=0),
            rows=tuple(rows),
            methods={subject.title: finite(subject.method.to_json()) for subject in entrants},
            measured_unit=measured if measured != moments.unit else "",
        )

    def row(self, subject: Subject, allocation: Allocation, keep: float) -> Row:
        """One row, from the cache where it is there with every latency that is asked for."""
        method = subject.method
        empty = Row(method.name, subject.role, allocation, subject.scope, keep)
        grid = self.keeps if allocation == "planned" else ()
        try:
            code = code_of(*method.formats)
        except PlanError as error:
            return replace(empty, notes=(reason(error),))
        what = method.to_json(), allocation, keep, grid, subject.role, self.rounds, code
        key = digest(self.base, self.measured_on, *what)
        with self.cache.claimed(key):
            found = _read(Row, self.cache.read(key))
            if found is None or (found.figures and not set(self.engines) <= found.figures.tried):
                found = self._kept(key, subject, empty)
        return found

    def _kept(self, key: str, subject: Subject, empty: Row) -> Row:
        """The row filled in; what goes wrong is its note, and is tried anew where it may not another time."""
        notes: Notes = Counter()
        try:
            made = self._made(subject, empty, notes)
        except Exception as error:
            if out_of_memory(error):
                raise
            logger.info("%s, %s, keep %s", empty.name, empty.allocation, empty.keep, exc_info=error)
            return replace(empty, notes=(*_counted(notes), reason(error)))
        if not self.chooser.passing:
            self.cache.write(key, finite(asdict(made)))
        return made

    def _made(self, subject: Subject, empty: Row, notes: Notes) -> Row:
        if not subject.method.regions(self.analysis.regions):
            kinds = " or ".join(subject.method.kinds)
            return replace(empty, notes=(f"the model has no {kinds} region that it rewrites",))
        fits = self.chooser.chosen(subject, empty.allocation, empty.keep, notes)
        if not fits:
            return replace(empty, notes=_counted(notes) or ("it rewrites nothing at this share",))
        return self._measured(empty, fits, notes)

    def _measured(self, row: Row, fits: Sequence[Fit], notes: Notes) -> Row:
        """``row`` with the figures of the model that ``fits`` make; equal fits are measured once."""
        taken = [self._option(fit) for fit in fits]
        saved = sum(measure(Dense(), item.region).weight_bytes - item.workload.weight_bytes for item in taken)
        scope = self.prices.scope(row.scope)
        key = digest(self.base, self.measured_on, self.rounds, sorted(fit.key for fit in fits))
        figures, failed = _read(Figures, self.cache.read(key)), dict[Engine, str]()
        if figures is None or not set(self.engines) <= figures.tried:
            figures, failed = self._rewritten(taken, fits, saved, scope)
            self.cache.write(key, finite(asdict(figures)))
        figures = replace(figures, predicted_loss=figures.predicted_loss * self.analysis.loss_ratio)
        untimed = {**figures.untimed, **failed, **self.missing}
        return replace(
            row,
            kept=1.0 - saved / scope.bytes,
            rewritten=len(fits),
            figures=figures,
            notes=(*_counted(notes), *(f"{engine}: {why}" for engine, why in untimed.items())),
        )

    def _option(self, fit: Fit) -> Option:
        region = self.analysis.regions[fit.region].region
        return Option(region, fit.form, self.prices.work(fit.form, region), fit.loss)

    def _rewritten(
        self, taken: Sequence[Option], fits: Sequence[Fit], saved: int, scope: Totals
    ) -> tuple[Figures, dict[Engine, str]]:
        """Figures of the rewritten model, and why an engine has no latency this time."""
        plan = choose(
            [*self.prices.dense, *taken],
            Budget(size=self.prices.total.bytes - saved),
            self.prices.fixed,
            model_hash=self.analysis.model_hash,
            unit=self.analysis.moments.unit,
        )
        rewrites = {fit.region: self.fits.factored(fit, self.analysis.regions[fit.region]) for fit in fits}
        program = self.analysis.lower(plan, rewrites)
        latency, failed = self.stopwatch(program, self.engines)
        parameters, own = program.parameter_count(), ParameterSpace.of(program)
        figures = Figures(
            size_bytes=program.size_bytes(),
            parameters=parameters,
            linear_parameters=scope.parameters - (self.prices.total.parameters - parameters),
            flops_per_token=plan.predicted.flops,
            compression_ratio=compression_ratio(self.before, parameter_count(own)),
            predicted_loss=sum(fit.loss for fit in fits),
            fit_s=seconds_of(fits),
            latency=latency,
            untimed={engine: error.what for engine, error in failed.items() if lasting(error)},
        )
        passing = {engine: error.what for engine, error in failed.items() if not lasting(error)}
        return self._with_fidelity(figures, program, rewrites), passing

    def _with_fidelity(self, figures: Figures, program: Program, rewrites: Rewrites) -> Figures:
        """A form that computes more than the weights is run as the weights that it multiplies out to."""
        analysis, space = self.analysis, ParameterSpace.of(self.analysis.original)
        reconstructed = space.reconstructed(program, rewrites)
        if figures.flops_per_token > self.prices.total.flops:
            names = [name for factored in rewrites.values() for name in factored.weights]
            program = reconstructed.applied_to(analysis.original, names)
        mae = parameter_mae(space, reconstructed)
        found = verify(self.reference, program, analysis.holdout, analysis.objective, mae)
        return replace(
            figures,
            parameter_mae=found.parameter_mae,
            loss_increase=found.loss_increase,
            loss=found.loss_optimized,
            kl=found.kl,
            top1_agreement=found.top1_agreement,
        )

    def _original(self) -> tuple[Figures, int]:
        """The figures of the model as it was, and the loss terms that losses are measured on."""
        analysis, total = self.analysis, self.prices.total
        fidelity = verify(self.reference, analysis.original, analysis.holdout, analysis.objective)
        linear = self.prices.scope("blocks").parameters
        figures = Figures(
            total.bytes, total.parameters, linear, self.prices.total.flops, loss=fidelity.loss_original
        )
        return figures, fidelity.tokens


def _shares(keep: float | Iterable[float]) -> tuple[float, ...]:
    given: Any = keep
    keeps = set(given) if isinstance(given, Iterable) and not isinstance(given, str) else {given}
    for share in keeps:
        if not isinstance(share, int | float) or not 0.0 < share < 1.0:
            raise ConfigError(f"a share of {share!r} cannot be kept", fix="give shares between 0 and 1")
    if not keeps:
        raise ConfigError("no share to keep is given", fix="give shares such as 0.8")
    return tuple(sorted(keeps, reverse=True))


def _engines(names: Iterable[Engine]) -> tuple[Engine, ...]:
    known: Mapping[str, Engine] = {"torch": "torch", "onnx": "onnx"}
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"no engine {name!r}", fix="use torch, onnx")
    return tuple(known[name] for name in wanted)


def _read(record: type[Record], data: Any) -> Record | None:
    """The record that was cached; None where there is none, or one of another form."""
    with suppress(ValidationError):
        return None if data is None else TypeAdapter(record).validate_json(json.dumps(data), strict=True)
    return None


def _counted(notes: Notes) -> tuple[str, ...]:
    return tuple(f"{count} x {text}" for text, count in sorted(notes.items()))


def _said(row: Row) -> str:
    loss = row.figures.loss_increase if row.figures else None
    return f"{row.name}, {row.allocation}, keep {row.keep}: {'no model' if loss is None else f'{loss:+.4f}'}"
