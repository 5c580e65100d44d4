"""A budget for the latency: plan, rewrite, time the whole model, plan anew until it is as fast as asked."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from geofx.analysis import Analysis, Rewrites
from geofx.budget import Budget, describe
from geofx.cache import Cache, default_folder
from geofx.clock import check_targets
from geofx.errors import BudgetInfeasibleError, ConfigError, NumericsError
from geofx.model import OptimizedModel
from geofx.patterns import Patterns
from geofx.plan import Plan
from geofx.target import Target, targets_of

logger = logging.getLogger(__name__)

REPLANS = 8
"""How often a plan is made anew without the settings that could not be fitted."""
TRIES = 5
"""How often a rewritten model is timed and planned anew."""
PLANNED_RATIO, MOST_RATIO, LEAST_RATIO = 0.98, 0.99, 0.95
"""Shares of a budget: that is planned for, and between which a measured model is near enough to it.

What is left is for the noise of another measurement; models below lose more than they need.
"""


@dataclass(frozen=True)
class Wanted:
    """What `optimize` was asked for beside the budget."""

    include: Patterns | None = None
    ignore: Patterns = ()
    target: Target | Iterable[Target] | None = None


def check_wanted(budget: Budget, target: Target | Iterable[Target] | None) -> None:
    """Check before any work that what a budget for the latency is of can be timed.

    Raises:
        ConfigError: a target cannot be used, or there is one but no such budget.
        MissingDependencyError: the runtime is not installed.
        ArtifactError: there is no folder to keep timings in.
    """
    if budget.latency is None:
        if target is not None:
            fix = "give Budget(latency=0.8), or leave target out"
            raise ConfigError("the budget does not limit the latency", where="target", fix=fix)
        return
    check_targets(targets_of(target))
    Cache(default_folder("latency"))


def fitted(
    analysis: Analysis, budget: Budget, wanted: Wanted, barred: Mapping[tuple[str, str], str] | None = None
) -> tuple[Plan, Rewrites]:
    """The best plan of those that can be fitted, and its factors; ``barred`` are not to be taken.

    Raises:
        NumericsError: `REPLANS` plans cannot.
    """
    refused = dict(barred or {})
    for _ in range(REPLANS):
        plan = analysis.plan(
            budget, include=wanted.include, ignore=wanted.ignore, refused=refused, target=wanted.target
        )
        rewrites, failures = analysis.fit(plan)
        if not failures:
            return analysis.as_fitted(plan, rewrites), rewrites
        names = {choice.region: choice.factorization.name for choice in plan.choices}
        refused |= {(region, names[region]): str(why) for region, why in failures.items()}
    regions = ", ".join(sorted({region for region, _ in refused})[:5])
    raise NumericsError(
        f"{REPLANS} plans could not be fitted", where=regions, fix="leave these out by ignore="
    )


def in_time(analysis: Analysis, budget: Budget, wanted: Wanted) -> tuple[Plan, Rewrites]:
    """The plan of least loss of those that were measured to be fast enough; else the fastest.

    Rewritten weights that turn out no faster than dense go back to that. On targets that are computed it is
    the first.

    Raises:
        BudgetInfeasibleError: not even the fastest plan is predicted to meet it.
    """
    clock = analysis.clock(wanted.target)
    barred: dict[tuple[str, str], str] = {}
    best: tuple[tuple[bool, float], Plan, Rewrites] | None = None
    limit = _limit(analysis.plan(budget, include=wanted.include, ignore=wanted.ignore, target=wanted.target))
    for _ in range(TRIES):
        try:
            plan, rewrites = fitted(analysis, _lowered(budget, limit), wanted, barred)
        except BudgetInfeasibleError:  # as far as is known by now
            if best is None:
                raise
            break
        if not clock.is_measured or not rewrites:
            return replace(plan, budget=budget), rewrites
        slower = clock.slower(plan)
        if slower:
            logger.info("%d rewritten regions are no faster than dense", len(slower))
            why = "as timed, no faster than dense"
            barred |= {(item.region, item.factorization.name): why for item in slower}
            plan, rewrites = fitted(analysis, _lowered(budget, limit), wanted, barred)
        seconds = clock.seconds(clock.measure(analysis.lower(plan, rewrites)))
        logger.info(
            "%.4g s asked, %.4g predicted, %.4g measured", limit.total, plan.predicted.latency_s, seconds
        )
        met = seconds <= MOST_RATIO * limit.total
        rank = (not met, (plan.loss or 0.0) if met else seconds)
        if best is None or rank < best[0]:
            best = rank, plan, rewrites
        if met and seconds >= LEAST_RATIO * limit.total:
            break
        clock.correct(plan, seconds)
    assert best is not None
    return replace(best[1], budget=budget), best[2]


@dataclass(frozen=True)
class _Limit:
    """Seconds that the whole model may take, and those of them that the budget's scope leaves out."""

    total: float
    outside: float


def _limit(plan: Plan) -> _Limit:
    scope = plan.dense if plan.budget.scope == "model" else plan.factorizable
    outside = plan.dense.latency_s - scope.latency_s
    return _Limit(plan.limits["latency"] + outside, outside)


def _lowered(budget: Budget, limit: _Limit) -> Budget:
    """``budget`` with the seconds that are planned for."""
    return replace(budget, latency=f"{1e6 * (PLANNED_RATIO * limit.total - limit.outside):.6f}us")


def confirmed(
    analysis: Analysis, result: OptimizedModel, target: Target | Iterable[Target] | None
) -> OptimizedModel:
    """``result`` with what was measured of it in its report.

    Raises:
        BudgetInfeasibleError: it is slower than asked; carries it as ``result``.
    """
    clock, plan = analysis.clock(target), result.plan
    if not plan.rewritten:
        return result
    with analysis.stages("measure latency"):
        timings = clock.measure(result.program)
    said = plan.predicted.latency_s / clock.dense_s
    report = replace(
        result.report, stages=tuple(analysis.stages.done), timings=timings, predicted_latency_ratio=said
    )
    result, limit = replace(result, report=report), _limit(plan).total
    taken = clock.seconds(timings) if timings else plan.predicted.latency_s
    if taken <= limit:
        return result
    raise BudgetInfeasibleError(
        f"asked for {describe('latency', limit)}, the best result takes {describe('latency', taken)}",
        where="; ".join(f"{item.target}: {item.ratio:.1%} of the original" for item in timings),
        fix="raise latency, or take what was made, the error's result",
        smallest={"latency": taken},
        best=plan,
        result=result,
    )
