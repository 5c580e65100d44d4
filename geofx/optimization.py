"""From an analysis and a budget to the result: plan, fit, measure, refine."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

from geofx.analysis import Analysis, Rewrites
from geofx.budget import Budget
from geofx.choice import SolverReport
from geofx.errors import BudgetInfeasibleError, GeofxError, NumericsError
from geofx.factorizations import Factorization
from geofx.frontier_run import frontier_of
from geofx.latency_budget import Wanted, confirmed, fitted, in_time
from geofx.model import OptimizedModel
from geofx.objective import Custom
from geofx.patterns import Patterns
from geofx.plan import Plan
from geofx.target import Target
from geofx.training import native_autocast
from geofx.uniform import uniform_plan

logger = logging.getLogger(__name__)

PROBES = 4
"""How often it plans for a budget of the loss at most, each time with the loss measured at the last plan."""
NEAR_RATIO = 0.85
"""Share of such a budget at which a plan is near enough."""
STEPS = 128
"""Of the training that refines a result."""
REPORTED = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Sizes, of the original's, that a report says the predicted loss of."""


def optimize_analysis(
    analysis: Analysis,
    budget: Budget,
    *,
    include: Patterns | None = None,
    ignore: Patterns = (),
    target: Target | Iterable[Target] | None = None,
) -> OptimizedModel:
    """`optimize` from an analysis that is there already.

    Where it has validation batches, a budget for the loss is planned for anew with the loss expected of the
    last plan, one share of every matrix is taken instead where that is nearer to the original on them, and
    the predicted loss is `Analysis.expected_loss` of what comes out.

    With a budget for the latency, what comes out is timed against the original, and plans are made anew
    until it is as fast as asked: `geofx.latency_budget`.

    Raises:
        BudgetInfeasibleError: no plan meets the budget; or none was as fast when it was measured.
    """
    wanted = Wanted(include, ignore, target)
    timed = budget.latency is not None
    with analysis.stages("choose") if analysis.validation or timed else nullcontext():
        choose = in_time if timed else _nearest
        plan, rewrites = choose(analysis, budget, wanted)
        if analysis.validation and rewrites and not timed:
            plan, rewrites = _or_uniform(analysis, plan, rewrites, include or (), ignore)
    result = refined(analysis, plan, rewrites) if analysis.refines and rewrites else None
    result = result or analysis.finish(plan, rewrites)
    if analysis.validation and rewrites:
        result = foreseen(analysis, result)
    result = _with_frontier(analysis, result, budget, wanted)
    if timed:
        return confirmed(analysis, result, target)
    lost = result.plan.loss or 0.0
    if budget.loss is not None and lost > budget.loss:
        logger.warning("no plan is expected to lose at most %.3g; the nearest loses %.3g", budget.loss, lost)
    return result


def _nearest(analysis: Analysis, budget: Budget, wanted: Wanted) -> tuple[Plan, Rewrites]:
    """The plan that loses most within a budget of the loss, else the one that exceeds it least."""
    limit = math.inf if budget.loss is None else budget.loss
    plan, rewrites = fitted(analysis, budget, wanted)
    if not analysis.validation or budget.loss is None:
        return plan, rewrites
    best = analysis.probe(plan, rewrites, analysis.expected_loss), rewrites
    for _ in range(PROBES - 1):
        if NEAR_RATIO * limit <= (best[0].loss or 0.0) <= limit:
            break
        before = _forms(plan)
        try:
            plan, rewrites = fitted(analysis, budget, wanted)
        except BudgetInfeasibleError:  # as far as is known by now
            break
        if _forms(plan) == before:
            break
        probed = analysis.probe(plan, rewrites, analysis.expected_loss)
        best = min(best, (probed, rewrites), key=lambda pair: _distance(pair[0], limit))
    return best


def _forms(plan: Plan) -> dict[str, Factorization]:
    return {choice.region: choice.factorization for choice in plan.choices}


def _distance(plan: Plan, limit: float) -> tuple[bool, float]:
    """How far from a limit of the loss, those within it first."""
    lost = plan.loss or 0.0
    return lost > limit, abs(lost - limit)


def _or_uniform(
    analysis: Analysis, plan: Plan, rewrites: Rewrites, include: Patterns, ignore: Patterns
) -> tuple[Plan, Rewrites]:
    """``plan``, or one share of every matrix where that is nearer to the original on validation batches."""
    allowed = analysis.allowed(include, ignore)
    regions = [item for item in analysis.regions.values() if allowed.issuperset(item.region.weights)]
    same = uniform_plan(plan, regions)
    if same is None:
        return plan, rewrites
    simple, failures = analysis.fit(same)
    if failures:
        return plan, rewrites
    try:
        pairs = (same, simple), (plan, rewrites)
        after, before = (analysis.distance_of(analysis.lower(*pair)) for pair in pairs)
    except NumericsError as error:
        logger.warning("the plan is not compared with the same share of every matrix: %s", error)
        return plan, rewrites
    if not after < before:
        return plan, rewrites
    logger.warning("the same share of every matrix is nearer to the original: %.3g, not %.3g", after, before)
    return replace(analysis.as_fitted(same, simple), solver=SolverReport("uniform")), simple


def _with_frontier(
    analysis: Analysis, result: OptimizedModel, budget: Budget, wanted: Wanted
) -> OptimizedModel:
    """``result`` with the plans of several sizes in its report, where they are found."""
    try:
        with analysis.stages("frontier"):
            found = frontier_of(
                analysis, shares=REPORTED, scope=budget.scope, include=wanted.include, ignore=wanted.ignore
            )
    except GeofxError as error:
        logger.warning("the report has no other sizes: %s", error)
        return result
    stages = tuple(analysis.stages.done)
    return replace(result, report=replace(result.report, frontier=found, stages=stages))


def refined(analysis: Analysis, plan: Plan, rewrites: Rewrites) -> OptimizedModel | None:
    """The result of a fitted plan after a short recovery on the batches that it was calibrated on.

    None where that brings it no nearer to the original on the validation batches.
    """
    objective, result = analysis.objective, analysis.finish(plan, rewrites, holdout=[])
    device = next(part.device for _, part in analysis.original.tensors())
    with analysis.stages("refine"):
        before = analysis.distance_of(result.program)
        try:
            result = result.recover(
                [*analysis.calibration, *analysis.written],
                validation=analysis.validation,
                holdout=analysis.holdout or None,
                loss=objective.function if isinstance(objective, Custom) else None,
                progress=analysis.progress,
                steps=STEPS,
                every=STEPS // 4,
                autocast=native_autocast(device),
            )
            after = analysis.distance_of(result.program)
        except NumericsError as error:
            logger.warning("the factors are not refined: %s", error)
            return None
    if after < before:
        return result
    logger.warning("the factors are not refined: that goes from %.3g to %.3g", before, after)
    return None


def foreseen(analysis: Analysis, result: OptimizedModel) -> OptimizedModel:
    """``result`` with `Analysis.expected_loss` as the loss of its plan."""
    with analysis.stages("predict"):
        lost = analysis.expected_loss(result.program)
    plan = result.plan.scaled_to(max(0.0, lost))
    losses = {choice.region: choice.loss for choice in plan.choices}
    report = replace(
        result.report,
        stages=tuple(analysis.stages.done),
        predicted_loss=plan.loss,
        regions=tuple(replace(row, loss=losses[row.name]) for row in result.report.regions),
    )
    return replace(result, plan=plan, report=report)
