"""From an analysis and a budget to the result: plan, fit, measure, refine."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace

from geofx.analysis import Analysis, Rewrites
from geofx.budget import Budget
from geofx.errors import NumericsError
from geofx.model import OptimizedModel
from geofx.objective import Custom
from geofx.plan import Plan
from geofx.training import native_autocast
from geofx.uniform import uniform_plan

logger = logging.getLogger(__name__)

Patterns = Iterable[str] | str

REPLANS = 8
"""How often `optimize` plans anew without the settings that could not be fitted."""
PROBES = 4
"""How often it plans for a budget of the loss at most, each time with the loss measured at the last plan."""
NEAR_RATIO = 0.85
"""Share of such a budget at which a plan is near enough."""
STEPS = 128
"""Of the training that refines a result."""


def optimize_analysis(
    analysis: Analysis,
    budget: Budget,
    *,
    include: Patterns | None = None,
    ignore: Patterns = (),
) -> OptimizedModel:
    """`optimize` from an analysis that is there already.

    Where it has validation batches, the predicted loss is what the plan loses on these; a budget for the loss
    is planned for anew with it.
    """
    best: tuple[Plan, Rewrites] | None = None
    for _ in range(PROBES if analysis.validation and budget.loss is not None else 1):
        plan, rewrites = _fitted(analysis, budget, include, ignore)
        plan = analysis.probe(plan, rewrites)
        lost, limit = plan.loss or 0.0, math.inf if budget.loss is None else budget.loss
        if lost <= limit and (best is None or lost > (best[0].loss or 0.0)):
            best = plan, rewrites
        if NEAR_RATIO * limit <= lost <= limit:
            break
    if best is None:
        logger.warning("no plan was measured to lose at most %.3g; the nearest loses %.3g", limit, lost)
    plan, rewrites = best or (plan, rewrites)
    if analysis.calibration and rewrites:
        result = refined(analysis, analysis.finish(plan, rewrites, holdout=[]))
    else:
        result = analysis.finish(plan, rewrites)
    return _not_worse_than_uniform(analysis, result, include, ignore)


def _not_worse_than_uniform(
    analysis: Analysis, result: OptimizedModel, include: Patterns | None, ignore: Patterns
) -> OptimizedModel:
    """``result``, or one share of every matrix where that loses less on the validation batches."""
    allowed = analysis.allowed(include or (), ignore)
    regions = [item for item in analysis.regions.values() if allowed.issuperset(item.region.weights)]
    same = uniform_plan(result.plan, regions) if analysis.validation and result.rewrites else None
    rewrites, failures = analysis.fit(same) if same else ({}, {})
    if same is None or failures:
        return result
    program = analysis.lower(same, rewrites)
    lost = analysis.loss_of(program)
    if result.plan.loss is None or lost >= result.plan.loss:
        return result
    logger.warning("the same share of every matrix loses %.3g, the plan %.3g", lost, result.plan.loss)
    return analysis.finish(same, rewrites)


def refined(analysis: Analysis, result: OptimizedModel) -> OptimizedModel:
    """``result`` after a short recovery on the batches that it was calibrated on.

    The best state on the validation batches is kept, so it is never worse there; the plan's loss is what it
    then loses on them.
    """
    objective = analysis.objective
    device = next(part.device for _, part in analysis.original.tensors())
    with analysis.stages("refine"):
        result = result.recover(
            analysis.calibration,
            validation=analysis.validation,
            holdout=analysis.holdout or None,
            loss=objective.function if isinstance(objective, Custom) else None,
            progress=analysis.progress,
            steps=STEPS,
            every=STEPS // 4,
            autocast=native_autocast(device),
        )
        lost = analysis.loss_of(result.program)
    plan = result.plan.scaled_to(lost) if lost > 0.0 else result.plan
    report = replace(result.report, stages=tuple(analysis.stages.done), predicted_loss=plan.loss)
    return replace(result, plan=plan, report=report)


def _fitted(
    analysis: Analysis, budget: Budget, include: Patterns | None, ignore: Patterns
) -> tuple[Plan, Rewrites]:
    """The best plan of those that can be fitted, and its factors."""
    refused: dict[tuple[str, str], str] = {}
    for _ in range(REPLANS):
        plan = analysis.plan(budget, include=include, ignore=ignore, refused=refused)
        rewrites, failures = analysis.fit(plan)
        if not failures:
            return plan, rewrites
        names = {choice.region: choice.factorization.name for choice in plan.choices}
        refused |= {(region, names[region]): str(why) for region, why in failures.items()}
    regions = ", ".join(sorted({region for region, _ in refused})[:5])
    raise NumericsError(
        f"{REPLANS} plans could not be fitted", where=regions, fix="leave these out by ignore="
    )
