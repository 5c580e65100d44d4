"""The plan that keeps one share of every matrix: what a choice region by region must not be worse than."""

from __future__ import annotations

from collections.abc import Iterable

from geofx.factorizations import Dense, Factorization, GaugeFixed
from geofx.plan import Plan
from geofx.region_analysis import RegionAnalysis
from geofx.workload import measure

HALVINGS = 12
"""Of the interval that the share is sought in."""


def uniform_plan(plan: Plan, analyses: Iterable[RegionAnalysis]) -> Plan | None:
    """``plan`` with gauge-fixed low rank at one share in all regions of one matrix.

    It is the largest share that keeps the limits of the plan, but for that of the loss; None where there is
    none, or the loss is all that is limited.
    """
    if not plan.limits.keys() - {"loss"}:
        return None
    singles = [item for item in analyses if item.region.kind == "single"]
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        share = (low + high) / 2
        forms = {item.region.name: _at(share, item) for item in singles}
        found = plan.edit(forms, [item.region for item in singles])
        if _keeps_limits(found):
            low, best = share, found
        else:
            high = share
    return best


def _at(share: float, analysis: RegionAnalysis) -> Factorization:
    """The largest setting within ``share`` of the weight's numbers, at least the smallest there is."""
    numbers = share * measure(Dense(), analysis.region).parameters
    found: Factorization = Dense()
    for form in GaugeFixed.candidates(analysis.region, analysis):
        if isinstance(found, GaugeFixed) and measure(form, analysis.region).parameters > numbers:
            break
        found = form
    return found


def _keeps_limits(plan: Plan) -> bool:
    return all((plan.used[name] or 0) <= limit for name, limit in plan.limits.items() if name != "loss")
