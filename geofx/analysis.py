"""What one calibration run knows of a model: serves any number of budgets, saved to disk or not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from geofx.analysis_store import StoredAnalysis, save_analysis
from geofx.annotations import SITE
from geofx.batches import Batch
from geofx.budget import Budget
from geofx.cache import Cache, default_folder
from geofx.choice import Totals
from geofx.clock import Clock
from geofx.compare_run import compare_analysis
from geofx.comparison import Comparison
from geofx.compression import parameter_mae
from geofx.digest import hash_tensors
from geofx.errors import ConfigError, NumericsError
from geofx.factorizations import Factored, Factorization, Factors
from geofx.frontier import Axis, Frontier
from geofx.frontier_run import frontier_of
from geofx.method import formats_named
from geofx.model import OptimizedModel
from geofx.moments import Moments
from geofx.objective import Objective
from geofx.options import Option, list_options
from geofx.parameter_space import ParameterSpace
from geofx.passes.cleanup import Cleanup
from geofx.passes.contract import run_passes
from geofx.passes.count_flops import count_flops
from geofx.passes.lower import Lower
from geofx.patterns import Patterns, matching
from geofx.plan import Plan
from geofx.planner import choose
from geofx.program import Program
from geofx.progress import Progress, log_progress
from geofx.region import TABLES
from geofx.region_analysis import RegionAnalysis
from geofx.result_checks import EDITED, require_declared, require_finite_output, require_planned
from geofx.site import Skip
from geofx.sources import GENERATION
from geofx.stages import Stages
from geofx.summary import summarize
from geofx.target import Target, targets_of
from geofx.verify import SEEN, Fidelity, Reference, verify

logger = logging.getLogger(__name__)

Rewrites = dict[str, Factored]
Formats = tuple[type[Factorization], ...] | None


@dataclass(eq=False)
class Analysis:
    """The annotated program, its moments and the spectrum of every region.

    Attributes:
        original: the graph as traced; the results are verified against it.
        program: its canonical, annotated clone.
        regions: region name -> analysis.
        skips: weights that cannot be rewritten, with the reason.
        objective: the loss that predictions are in.
        holdout: batches to verify on.
        module: the user's model, or None.
        holdout_is_calibration: there was one batch only, so what is measured on it is too good.
        validation: batches that choices are made on, neither calibrated nor verified on; `geofx.effort`.
        calibration: beside these, the batches that the moments are of, and ``written``, the model's own.
        refines: the factors are trained on them after the plan.
        loss_ratio: measured over predicted increase of the loss, as `probe` found it.
    """

    original: Program
    program: Program
    regions: dict[str, RegionAnalysis]
    skips: list[Skip]
    moments: Moments
    objective: Objective
    holdout: list[Batch] = field(default_factory=list)
    module: nn.Module | None = None
    stages: Stages = field(default_factory=Stages)
    progress: Progress = log_progress
    files: Mapping[str, bytes] = field(default_factory=dict)
    holdout_is_calibration: bool = False
    validation: list[Batch] = field(default_factory=list)
    calibration: list[Batch] = field(default_factory=list)
    written: list[Batch] = field(default_factory=list)
    refines: bool = False
    loss_ratio: float = 1.0

    def __post_init__(self) -> None:
        self.model_hash = hash_tensors(self.original.tensors())
        self._reference = Reference(self.original)
        self.flops_per_token, self._rows_per_token = count_flops(self.program)
        self._clocks: dict[tuple[Target, ...], Clock] = {}
        self._options: dict[tuple[Formats, bool], tuple[list[Option], list[Skip]]] = {}

    def plan(
        self,
        budget: Budget,
        *,
        include: Patterns | None = None,
        ignore: Patterns = (),
        formats: Iterable[str | type[Factorization]] | str | type[Factorization] | None = None,
        refused: Mapping[tuple[str, str], str] | None = None,
        target: Target | Iterable[Target] | None = None,
    ) -> Plan:
        """The plan of least predicted loss within ``budget``, exact; milliseconds to seconds.

        ``include`` and ``ignore`` are globs or ``re:`` patterns of weight names; ``refused`` maps (region,
        format) to the reason why it must not be taken. ``formats`` are those to choose from, names or
        classes, each fitted where it has no closed form; by default all that `geofx.screening` finds worth
        a fit. ``target`` is what a budget for the latency is of, as `geofx.clock` times or computes it.

        Tables (embeddings) are rewritten only where ``include`` matches them, as ``"*"`` does: what is
        predicted for rows that calibration has hardly read is an extrapolation, and can be far too low.

        Raises:
            BudgetInfeasibleError: carries the smallest plan.
            ConfigError: a pattern matches nothing, a format is not known, or the budget needs losses that
                were not measured.
        """
        if budget.loss is not None and self.moments.mode != "two_sided":
            raise ConfigError(
                f"a budget for the loss needs its gradients; this analysis measures {self.moments.unit}",
                fix="analyze with mode='two_sided'",
            )
        members = None if formats is None else formats_named(formats)
        options, skips = self._priced(members, tables=False)
        if include:
            more, without = self._priced(members, tables=True)
            options, skips = [*options, *more], [*skips, *without]
        allowed = self.allowed(include or (), ignore)
        barred = refused or {}
        ignored = [
            Skip(name, "IGNORED", "left out by include / ignore")
            for name, analysis in self.regions.items()
            if not allowed.issuperset(analysis.region.weights)
        ]
        unnamed = [
            Skip(name, "NOT_NAMED", "a table is rewritten where include= names it: see Analysis.plan")
            for name, analysis in self.regions.items()
            if analysis.region.kind in TABLES and not include and name in allowed
        ]
        failed = [Skip(name, "FIT_FAILED", f"{kind}: {why}") for (name, kind), why in barred.items()]
        kept = [
            option if self.loss_ratio == 1.0 else replace(option, loss=option.loss * self.loss_ratio)
            for option in options
            if option.is_dense
            or (
                allowed.issuperset(option.region.weights)
                and (option.region.name, option.factorization.name) not in barred
            )
        ]
        fixed, untimed = self._fixed(options), list[Skip]()
        if budget.latency is not None:
            with self.stages("time options"):
                kept, outside_s, untimed = self.clock(target).priced(kept)
            fixed = replace(fixed, latency_s=outside_s)
        with self.stages("plan"):
            return choose(
                kept,
                budget,
                fixed,
                skips=(*self.skips, *skips, *ignored, *unnamed, *failed, *untimed),
                model_hash=self.model_hash,
                unit=self.moments.unit,
            )

    def clock(self, target: Target | Iterable[Target] | None = None) -> Clock:
        """What the model takes on one target or several; by default as `geofx.Target` has it."""
        targets = targets_of(target)
        if targets not in self._clocks:
            totals = Totals(self.original.size_bytes(), self.original.parameter_count(), self.flops_per_token)
            kept = Cache(default_folder("latency"))
            dense, _ = list_options(self.regions.values(), (), self._rows_per_token)
            self._clocks[targets] = Clock(self.original, targets, totals, tuple(dense), kept, self.progress)
        return self._clocks[targets]

    def apply(self, plan: Plan, holdout: list[Batch] | None = None) -> OptimizedModel:
        """Fit, lower, clean up and verify ``plan`` on a clone.

        Raises:
            PlanError: the plan is not for this model.
            NumericsError: a factorization cannot be fitted, or the result is not finite.
            VerificationError: the result is not as small as planned.
        """
        plan.require_for([analysis.region for analysis in self.regions.values()], self.model_hash)
        rewrites, failures = self.fit(plan)
        if failures:
            name, why = next(iter(failures.items()))
            raise NumericsError(
                f"{len(failures)} regions cannot be fitted: {why}", where=name, fix="edit the plan"
            )
        return self.finish(plan, rewrites, holdout)

    def compare(self, keep: float | Iterable[float] = 0.8, **settings: Any) -> Comparison:
        """Every format and published method at equal bytes; ``settings`` are those of `geofx.compare`."""
        return compare_analysis(self, keep, **settings)

    def frontier(self, by: Axis = "size", shares: Iterable[float] | None = None, **settings: Any) -> Frontier:
        """The least predicted loss at each share; ``settings`` are those of `geofx.frontier_run`."""
        return frontier_of(self, by, shares, **settings)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write moments, spectra and held-out batches for `geofx.load_analysis`; no weights, no code."""
        stored = StoredAnalysis(
            model_hash=self.model_hash,
            moments=self.moments,
            spectra={
                name: found.spectrum for name, found in self.regions.items() if found.region.has_spectrum
            },
            example=dict(self.original.example),
            holdout=self.holdout,
            holdout_is_calibration=self.holdout_is_calibration,
            validation=self.validation,
            calibration=self.calibration,
            written=self.written,
            refines=self.refines,
            loss_ratio=self.loss_ratio,
            objective=self.objective,
        )
        return save_analysis(stored, path, overwrite=overwrite)

    def fit(self, plan: Plan) -> tuple[Rewrites, dict[str, NumericsError]]:
        """Factors of every rewritten region, and the errors of those that have none."""
        rewrites: Rewrites = {}
        failures: dict[str, NumericsError] = {}
        chosen = plan.rewritten
        self.progress("fit", 0, len(chosen))
        with self.stages("fit"):
            for done, choice in enumerate(chosen):
                analysis = self.regions[choice.region]
                try:
                    fitted, factors = choice.factorization.fit(analysis.weights, analysis)
                    stored = _stored(factors, analysis)
                    require_declared(fitted, analysis.region, stored)
                    rewrites[choice.region] = Factored(fitted, stored, analysis.region.weights)
                except NumericsError as error:
                    failures[choice.region] = error
                self.progress("fit", done + 1, len(chosen))
        return rewrites, failures

    def probe(self, plan: Plan, rewrites: Rewrites, measure: Callable[[Program], float]) -> Plan:
        """``plan`` with its losses scaled to what ``measure`` finds, as all plans are from here on.

        tr(G ΔW A ΔWᵀ) leaves out how tokens and layers hang together, and what moments of few tokens do not
        show: one constant per model, which varies little with the size. Where the loss does not rise it says
        nothing of others, and this plan loses nothing.
        """
        if not self.validation or not plan.loss:
            return plan
        program = self.lower(plan, rewrites)
        with self.stages("probe"):
            lost = measure(program)
        if lost > 0.0:
            self.loss_ratio *= lost / plan.loss
        return plan.scaled_to(max(0.0, lost))

    def loss_of(self, program: Program) -> float:
        """What ``program`` loses on the validation batches."""
        return self._on_validation(program).loss_increase

    def expected_loss(self, program: Program) -> float:
        """What ``program`` is expected to lose on data like the calibration data, none of it seen.

        Of next tokens, Δ - KL = E[(true - p) log(p / q)] takes many tokens, but depends little on whether q
        was fitted to them; the KL divergence takes few, but is larger on unseen ones. So this is the mean of
        Δ - KL over the calibration data plus the KL on the validation batches. Elsewhere it is what is lost
        on these.
        """
        unseen = self._on_validation(program)
        if unseen.kl is None:
            return unseen.loss_increase
        seen = self._measured(program, self.calibration)
        return seen.loss_increase - (seen.kl or 0.0) + unseen.kl

    def distance_of(self, program: Program) -> float:
        """How far ``program`` is from the original on the validation batches: KL, or what it loses."""
        found = self._on_validation(program)
        return found.loss_increase if found.kl is None else found.kl

    def _on_validation(self, program: Program) -> Fidelity:
        return verify(self._reference, program, self.validation, self.objective, progress=self.progress)

    def _measured(self, program: Program, batches: list[Batch], mae: float = 0.0) -> Fidelity:
        return verify(self.original, program, batches, self.objective, mae, self.progress)

    def lower(self, plan: Plan, rewrites: Rewrites) -> Program:
        """The graph with the factors of a fitted plan in it.

        Raises:
            VerificationError: it is not as small as planned.
        """
        with self.stages("rewrite"):
            program = self.program.clone()
            run_passes(program, [Lower(rewrites), Cleanup()], written=[SITE])
        require_planned(program, plan)
        return program

    def finish(self, plan: Plan, rewrites: Rewrites, holdout: list[Batch] | None = None) -> OptimizedModel:
        """The rewritten, checked and verified result of a fitted plan."""
        plan = self.as_fitted(plan, rewrites)
        program = self.lower(plan, rewrites)
        held = self.holdout if holdout is None else holdout
        if not held:
            require_finite_output(program)
        fidelity = self._verified(program, rewrites, held) if held else None
        return OptimizedModel(
            program=program,
            plan=plan,
            report=summarize(self, plan, program, fidelity),
            fidelity=fidelity,
            rewrites=rewrites,
            module=self.module,
            config=config_of(self.module),
            files={**_generation_of(self.module), **self.files},
            original=self.original,
        )

    def as_fitted(self, plan: Plan, rewrites: Rewrites) -> Plan:
        """Settings that a fit filled in, and the predicted loss of choices that were edited by hand."""
        choices = []
        for choice in plan.choices:
            factored, loss = rewrites.get(choice.region), choice.loss
            if loss is None or plan.solver.status == EDITED:
                analysis = self.regions[choice.region]
                loss = self.loss_ratio * choice.factorization.predicted_loss(analysis.region, analysis)
            fitted = choice.factorization if factored is None else factored.factorization
            choices.append(replace(choice, factorization=fitted, loss=loss))
        return replace(plan, choices=tuple(choices), loss=math.fsum(choice.loss or 0.0 for choice in choices))

    def allowed(self, include: Patterns, ignore: Patterns) -> set[str]:
        """Names of the weights that patterns let through; a tied weight goes by each of its names."""
        aliases = self.original.aliases
        weights = dict.fromkeys(name for region in self.regions.values() for name in region.weights)
        known = (*weights, *(skip.weight for skip in self.skips), *aliases)
        included = {aliases.get(name, name) for name in matching(known, include)}
        kept = set(matching(known, (), ignore))
        return included - {aliases.get(name, name) for name in known if name not in kept}

    def _verified(self, program: Program, rewrites: Rewrites, held: list[Batch]) -> Fidelity:
        with self.stages("verify"):
            space = ParameterSpace.of(self.original)
            mae = parameter_mae(space, space.reconstructed(program, rewrites))
            found = self._measured(program, held, mae)
        seen = self.holdout_is_calibration and held is self.holdout
        return replace(found, data=SEEN) if seen else found

    def _priced(self, formats: Formats, tables: bool) -> tuple[list[Option], list[Skip]]:
        if (formats, tables) not in self._options:
            chosen = [item for item in self.regions.values() if (item.region.kind in TABLES) == tables]
            with self.stages("price options"):
                self._options[formats, tables] = list_options(
                    chosen, formats, self._rows_per_token, self.progress
                )
        return self._options[formats, tables]

    def _fixed(self, options: Iterable[Option]) -> Totals:
        """What the model stores and computes outside the regions."""
        dense = [option.workload for option in options if option.is_dense]
        return Totals(
            bytes=self.original.size_bytes() - sum(work.weight_bytes for work in dense),
            parameters=self.original.parameter_count() - sum(work.parameters for work in dense),
            flops=max(0.0, self.flops_per_token - sum(work.flops for work in dense)),
        )


def config_of(module: nn.Module | None) -> dict[str, Any] | None:
    """The Hugging Face configuration of a model that has one, naming its own class."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    return {**config.to_dict(), "architectures": [type(module).__name__]}


def _generation_of(module: nn.Module | None) -> dict[str, bytes]:
    """The file of how a model writes when nothing else is said, if it does."""
    settings = getattr(module, "generation_config", None)
    return {} if settings is None else {GENERATION: settings.to_json_string().encode()}


def _stored(factors: Factors, analysis: RegionAnalysis) -> Factors:
    """Factors on the weight's device, contiguous."""
    weight = next(iter(analysis.weights.values()))
    return {name: part.to(weight.device).contiguous() for name, part in factors.items()}
