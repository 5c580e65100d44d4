"""What a model takes on its targets: predicted from options, measured on what was made of them."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from geofx.bench_inputs import bench_inputs
from geofx.cache import Cache
from geofx.calls import ready, require_runtime
from geofx.choice import Choice, Totals
from geofx.cost_models import DEVICES, Measured, Roofline
from geofx.errors import ConfigError
from geofx.fusion import require_device, rows_of
from geofx.latency import interleaved_times
from geofx.options import Option
from geofx.piece_latency import PieceTimer
from geofx.plan import Plan
from geofx.program import Program
from geofx.progress import Progress, log_progress
from geofx.report import Timing
from geofx.site import Skip
from geofx.target import Target
from geofx.workload import Workload, measure

logger = logging.getLogger(__name__)

ROUNDS = 21
"""Turns of original and optimized whose median ratio counts."""
DOUBTFUL_RATIO = 0.9
"""A choice that is predicted to take more of the dense maps' seconds is timed itself."""
RATIOS = 0.2, 5.0
"""Between these, what pieces save is scaled to what the whole model showed."""


@dataclass(eq=False)
class Clock:
    """T = T(dense) - ρ Σ over regions of (t(dense) - t(option)), Σ weight · seconds over the targets.

    T(dense) is measured on the whole model; t is of pieces alone, measured or computed; ρ is 1 until a
    rewritten model was measured, and then says how much of what its pieces save the whole one shows.

    Attributes:
        original: the graph that is made faster.
        totals: what it stores and computes.
        dense: the regions as they are; what is computed for the model is the sum of these and what is left.
        cache: where timings of pieces are kept.
        models: what prices options on each target.

    Raises:
        ConfigError: a device is not known, or some are measured and some computed.
    """

    original: Program
    targets: tuple[Target, ...]
    totals: Totals
    dense: tuple[Option, ...] = ()
    cache: Cache | None = None
    progress: Progress = log_progress
    saving_ratio: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        check_targets(self.targets)
        self.models = {target: self._model(target) for target in self.targets}
        self._calls: dict[Target, Callable[[], Any]] = {}

    @property
    def is_measured(self) -> bool:
        """Whether there is anything to measure here."""
        return self.targets[0].is_measured

    @property
    def dense_s(self) -> float:
        """Seconds of the original."""
        return math.fsum(target.weight * seconds for target, seconds in self._dense_s.items())

    def priced(self, options: Iterable[Option]) -> tuple[list[Option], float, list[Skip]]:
        """Options with their seconds, the seconds outside them, and what is left out as it saves none."""
        every = list(options)
        unknown: dict[tuple[str, str], str] = {}
        for model in self.models.values():
            if isinstance(model, Measured):
                unknown |= model.learn(every)
        timed = [
            replace(option, latency_s=self._cost(option)) for option in every if _key(option) not in unknown
        ]
        dense_s = {option.region.name: option.latency_s for option in timed if option.is_dense}
        kept = [item for item in timed if item.is_dense or item.latency_s < _whole(item, dense_s)]
        slower = sorted({_key(item) for item in timed} - {_key(item) for item in kept})
        skips = [Skip(name, "NOT_TIMED", f"{form}: {why}") for (name, form), why in unknown.items()]
        skips += [Skip(name, "NOT_FASTER", f"{form} at any size") for name, form in slower]
        return kept, self.dense_s - math.fsum(dense_s.values()), skips

    def measure(self, program: Program, rounds: int = ROUNDS) -> tuple[Timing, ...]:
        """Original and ``program`` in turns on each target; none where these are computed."""
        found = []
        for target in self.targets if self.is_measured else ():
            optimized = ready(program, self._inputs(target), target, self._tokens(target))
            calls = {"original": self._original(target), "optimized": optimized}
            times = interleaved_times(calls, rounds, self.progress)
            pairs = zip(times["optimized"], times["original"], strict=True)
            found.append(
                Timing(
                    target=str(target),
                    weight=target.weight,
                    original_s=statistics.median(times["original"]),
                    optimized_s=statistics.median(times["optimized"]),
                    ratio=statistics.median(one / other for one, other in pairs),
                    rounds=len(times["original"]),
                )
            )
        return tuple(found)

    def seconds(self, timings: Iterable[Timing]) -> float:
        """Of what was measured: its ratios times the seconds of the original."""
        ratios = {timing.target: timing.ratio for timing in timings}
        return math.fsum(
            target.weight * ratios[str(target)] * seconds for target, seconds in self._dense_s.items()
        )

    def correct(self, plan: Plan, seconds: float) -> None:
        """Scale what pieces save to what a model of ``plan`` was measured to take."""
        said, found = self.dense_s - plan.predicted.latency_s, self.dense_s - seconds
        if said > 0.0:
            self.saving_ratio = min(max(self.saving_ratio * found / said, RATIOS[0]), RATIOS[1])
            logger.info("%.3g s saved of %.3g predicted", found, said)

    def slower(self, plan: Plan) -> list[Choice]:
        """Rewritten choices as slow as the dense maps; those that gain little are timed themselves."""
        found = []
        for choice in plan.rewritten if self.is_measured else ():
            if choice.latency_s < DOUBTFUL_RATIO * choice.dense_latency_s:
                continue
            item, rows = choice.as_region(), choice.rows_per_token
            work = measure(choice.factorization, item).times(rows)
            option = Option(item, choice.factorization, work, 0.0, rows)
            gains = [
                target.weight * model.gain_s(option)
                for target, model in self.models.items()
                if isinstance(model, Measured)
            ]
            if math.fsum(gains) <= 0.0:
                found.append(choice)
        return found

    def _model(self, target: Target) -> Measured | Roofline:
        if target.is_measured:
            return Measured(PieceTimer(target, self.cache, self.progress), self._tokens(target))
        return Roofline(DEVICES[target.device], self._tokens(target), target.dtype or _dtype(self.original))

    def _cost(self, option: Option) -> float:
        costs = [target.weight * model.cost(option) for target, model in self.models.items()]
        return self.saving_ratio * math.fsum(costs)

    def _tokens(self, target: Target) -> int:
        return rows_of(self.original, target)

    def _inputs(self, target: Target) -> dict[str, Tensor]:
        return bench_inputs(
            self.original, target.batch, target.tokens if self.original.takes_sequences else None
        )

    def _original(self, target: Target) -> Callable[[], Any]:
        if target not in self._calls:
            rows = self._tokens(target)
            self._calls[target] = ready(self.original, self._inputs(target), target, rows)
        return self._calls[target]

    @property
    def _outside(self) -> Workload:
        """What the model computes and stores beside the regions; its activations are not known."""
        works = [option.workload for option in self.dense]
        return Workload(
            flops=max(0.0, self.totals.flops - math.fsum(work.flops for work in works)),
            parameters=self.totals.parameters - sum(work.parameters for work in works),
            weight_bytes=max(0, self.totals.bytes - sum(work.weight_bytes for work in works)),
            activation_bytes=0.0,
            launches=0,
        )

    @cached_property
    def _dense_s(self) -> Mapping[Target, float]:
        found = {}
        for target, model in self.models.items():
            if isinstance(model, Roofline):
                regions = [model.cost(option) for option in self.dense]
                scale = getattr(torch, model.dtype).itemsize / getattr(torch, _dtype(self.original)).itemsize
                found[target] = math.fsum([*regions, model.latency_s(self._outside, scale)])
            else:
                times = interleaved_times({"original": self._original(target)}, ROUNDS, self.progress)
                found[target] = statistics.median(times["original"])
        return found


def check_targets(targets: Iterable[Target]) -> None:
    """Check that all can be measured here, or computed.

    Raises:
        ConfigError: a device is not known or not there, or some are measured and some computed.
        MissingDependencyError: the runtime is not installed.
    """
    every = list(targets)
    if len({target.is_measured for target in every}) > 1:
        fix = "optimize for one kind at a time"
        raise ConfigError("some targets are measured here and some computed", where="target", fix=fix)
    for target in every:
        require_device(target)
        if target.is_measured:
            require_runtime(target)


def _key(option: Option) -> tuple[str, str]:
    return option.region.name, option.factorization.name


def _whole(option: Option, dense_s: Mapping[str, float]) -> float:
    """Seconds of the dense maps that an option replaces."""
    return math.fsum(dense_s[weight] for weight in option.region.weights)


def _dtype(program: Program) -> str:
    """The one that most of a program's tensors are of."""
    kinds = [str(part.dtype) for _, part in program.tensors() if part.is_floating_point()]
    return max(sorted(set(kinds)), key=kinds.count).removeprefix("torch.")
