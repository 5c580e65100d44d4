"""A plan at every share, and at those that are asked for the model itself, rewritten and measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

from geofx.batches import Batch
from geofx.budget import Budget, Scope
from geofx.errors import BudgetInfeasibleError, ConfigError, NumericsError
from geofx.frontier import Axis, Frontier, Point
from geofx.model import OptimizedModel
from geofx.moments import UNITS, Mode, Moments
from geofx.patterns import Patterns
from geofx.plan import Plan
from geofx.progress import Progress
from geofx.verify import Fidelity

logger = logging.getLogger(__name__)

SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
"""Of the frontier, where none are given."""


class Plannable(Protocol):
    """What a frontier takes from an analysis."""

    moments: Moments
    holdout: list[Batch]
    progress: Progress

    def plan(
        self,
        budget: Budget,
        *,
        include: Patterns | None = None,
        ignore: Patterns = (),
        formats: Any = None,
    ) -> Plan:
        """The best plan."""
        ...

    def apply(self, plan: Plan) -> OptimizedModel:
        """The measured result of a plan."""
        ...


def frontier_of(
    analysis: Plannable,
    axis: Axis = "size",
    shares: Iterable[float] | None = None,
    *,
    measured: Iterable[float] = (),
    scope: Scope = "model",
    name: str = "",
    include: Patterns | None = None,
    ignore: Patterns = (),
    formats: Any = None,
) -> Frontier:
    """The best plan at each share, largest first; those of ``measured`` are applied and verified too.

    The first share that no plan reaches gives the smallest plan there is, and ends the frontier; that plan is
    measured for all shares below it.

    Args:
        analysis: of the model.
        axis: what the shares are of.
        shares: in (0, 1]; `SHARES` where there are none.
        measured: shares to measure, further ones or some of ``shares``.
        scope: of the whole ``model``, or of the ``factorizable`` weights.
        name: of the model, for people.
        include, ignore, formats: as for `Analysis.plan`.

    Raises:
        ConfigError: a share or the axis is not known, or there is nothing to measure on.
    """
    if axis not in ("size", "flops", "parameters"):
        raise ConfigError(f"no axis {axis!r}", fix="use size, flops or parameters")
    wanted = _checked(SHARES if shares is None else shares)
    held = _checked(measured)
    if held and not analysis.holdout:
        raise ConfigError("there is no held-out data to measure on", fix="analyze with holdout=")
    if held:
        require_measurable(analysis.moments.mode)
    every = sorted({*wanted, *held}, reverse=True)
    if not every:
        raise ConfigError("no share is given", fix="give shares such as 0.8")
    plans: list[tuple[float, Plan]] = []
    analysis.progress("frontier", 0, len(every))
    for share in every:
        try:
            budget = Budget(**{axis: share}, scope=scope)
            plan = analysis.plan(budget, include=include, ignore=ignore, formats=formats)
            plans.append((share, plan))
        except BudgetInfeasibleError as error:
            if error.best is None:
                raise
            held = tuple(max(share, asked) for asked in held)
            plans.append((share, error.best))
            analysis.progress("frontier", len(every), len(every))
            break
        analysis.progress("frontier", len(plans), len(every))
    tokens, points = 0, []
    for share, plan in plans:
        fidelity = _measured(analysis, plan) if share in held else None
        tokens = max(tokens, fidelity.tokens if fidelity else 0)
        points.append(Point.of(plan, share, axis, fidelity))
    moments = analysis.moments
    found = Frontier(axis, scope, plans[0][1].dense, moments.unit, tuple(points), name)
    return replace(found, calibration_tokens=max(moments.tokens.values(), default=0), tokens=tokens)


def require_measurable(mode: Mode) -> None:
    """Raises ConfigError where what is predicted is not in the unit of what is measured."""
    if mode != "two_sided":
        raise ConfigError(
            f"predictions are in {UNITS[mode]}, not in what is measured",
            where=f"mode={mode!r}",
            fix="measure nothing, or analyze with mode='two_sided'",
        )


def _measured(analysis: Plannable, plan: Plan) -> Fidelity | None:
    """None, with a warning, where the model cannot be made: the other points are worth having."""
    try:
        return analysis.apply(plan).fidelity
    except NumericsError as error:
        logger.warning("a point is not measured: %s", error)
        return None


def _checked(shares: Iterable[float]) -> tuple[float, ...]:
    found = tuple(shares) if not isinstance(shares, int | float) else (shares,)
    for share in found:
        if not isinstance(share, int | float) or not math.isfinite(share) or not 0.0 < share <= 1.0:
            raise ConfigError(f"{share!r} is not a share", fix="give shares above 0 and at most 1")
    return tuple(float(share) for share in found)
