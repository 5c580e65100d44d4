"""What a method does at a share: region by region, or as the planner shares it out; chosen and fitted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from geofx.budget import Budget
from geofx.compare_fits import Fit, Fits, reason
from geofx.compare_prices import Prices
from geofx.compare_subjects import Subject
from geofx.errors import BudgetInfeasibleError, lasting, out_of_memory
from geofx.factorizations import Dense, Factorization
from geofx.method import Allocation, Method, disjoint
from geofx.options import Option
from geofx.plan import Plan
from geofx.planner import choose
from geofx.progress import Progress
from geofx.region_analysis import RegionAnalysis
from geofx.workload import measure

logger = logging.getLogger(__name__)

Notes = Counter[str]

REPLANS = 8
"""How often a plan is made anew without what could not be fitted."""


@dataclass
class Chooser:
    """Fits of the settings that a subject takes at a share, of one model.

    Attributes:
        keeps: every share of the comparison: a plan draws on what is fitted at any of them.
    """

    regions: Mapping[str, RegionAnalysis]
    fits: Fits
    prices: Prices
    keeps: tuple[float, ...]
    progress: Progress
    _listed: dict[tuple[Method, str], tuple[list[Factorization], str]] = field(default_factory=dict)
    _unlisted: bool = False

    @property
    def passing(self) -> bool:
        """Whether something since the last `drop` failed that another time may not."""
        return self._unlisted or bool(self.fits.passing)

    def drop(self) -> None:
        """Forget candidates, factors and passing failures of what was done since the last call."""
        self._listed.clear()
        self._unlisted = False
        self.fits.drop()

    def chosen(self, subject: Subject, allocation: Allocation, keep: float, notes: Notes) -> list[Fit]:
        """What is rewritten, fitted; why the rest is not is added to ``notes``."""
        return (self._uniform if allocation == "uniform" else self._planned)(subject, keep, notes)

    def _uniform(self, subject: Subject, keep: float, notes: Notes) -> list[Fit]:
        """The largest setting within the share, region by region; what has none stays dense."""
        regions = disjoint(subject.method.regions(self.regions))
        return self._fitted([(item, self._within(subject, item, keep, notes)) for item in regions], notes)

    def _within(
        self, subject: Subject, analysis: RegionAnalysis, keep: float, notes: Notes
    ) -> Factorization | None:
        allowed = keep * measure(Dense(), analysis.region).weight_bytes
        fitting = [
            item
            for item in self._candidates(subject, analysis, notes)
            if measure(item, analysis.region).weight_bytes <= allowed
        ]
        if not fitting and not self._listed[subject.method, analysis.region.name][1]:
            notes[f"no setting within {keep:.0%} of the weight"] += 1
        return fitting[-1] if fitting else None

    def _fitted(
        self, wanted: Sequence[tuple[RegionAnalysis, Factorization | None]], notes: Notes
    ) -> list[Fit]:
        chosen = [(analysis, form) for analysis, form in wanted if form is not None]
        self.progress("fit", 0, len(chosen))
        found = []
        for done, (analysis, form) in enumerate(chosen):
            fit = self.fits.get(form, analysis)
            if fit.error:
                notes[fit.error] += 1
            else:
                found.append(fit)
            self.progress("fit", done + 1, len(chosen))
        return found

    def _planned(self, subject: Subject, keep: float, notes: Notes) -> list[Fit]:
        """The planner's choice among dense and what the method may do, within the same total bytes."""
        options = self._options(subject, notes)
        cap = self.prices.total.bytes - round((1.0 - keep) * self.prices.scope(subject.scope).bytes)
        for _ in range(REPLANS):
            plan = self._plan(options, cap, notes)
            wanted = [(self.regions[item.region], item.factorization) for item in plan.rewritten]
            fits = self._fitted(wanted, notes)
            if len(fits) == len(wanted):
                return fits
            done = {fit.region for fit in fits}
            failed = {(item.region.name, form) for item, form in wanted if item.region.name not in done}
            options = [item for item in options if (item.region.name, item.factorization) not in failed]
        return fits

    def _plan(self, options: Sequence[Option], cap: int, notes: Notes) -> Plan:
        try:
            return choose([*self.prices.dense, *options], Budget(size=cap), self.prices.fixed)
        except BudgetInfeasibleError as error:
            if error.best is None:
                raise
            notes["the share cannot be reached: the smallest plan"] += 1
            best: Plan = error.best
            return best

    def _options(self, subject: Subject, notes: Notes) -> list[Option]:
        found = []
        for analysis in subject.method.regions(self.regions):
            forms = self._candidates(subject, analysis, notes)
            known = {
                form: form.predicted_loss(analysis.region, analysis) for form in forms if form.closed_form
            }
            picked = {
                form
                for keep in self.keeps
                if (form := self._within(subject, analysis, keep, Counter())) and not form.closed_form
            }
            fits = [self.fits.get(form, analysis) for form in forms if form in picked]
            known |= {fit.asked: fit.loss for fit in fits if not fit.error}
            found += [
                Option(analysis.region, form, self.prices.work(form, analysis.region), loss)
                for form, loss in known.items()
            ]
        return found

    def _candidates(self, subject: Subject, analysis: RegionAnalysis, notes: Notes) -> list[Factorization]:
        """Settings that are smaller than the weight; none, and a note, where listing them fails."""
        key = subject.method, analysis.region.name
        if key not in self._listed:
            try:
                self._listed[key] = _smaller(subject, analysis), ""
            except Exception as error:
                if out_of_memory(error):
                    raise
                logger.info("%s at %s", subject.method.name, analysis.region.name, exc_info=error)
                self._unlisted |= not lasting(error)
                self._listed[key] = [], reason(error)
        found, failed = self._listed[key]
        if failed:
            notes[failed] += 1
        return found


def _smaller(subject: Subject, analysis: RegionAnalysis) -> list[Factorization]:
    dense = measure(Dense(), analysis.region).weight_bytes
    every = subject.method.candidates(analysis.region, analysis)
    return [item for item in every if measure(item, analysis.region).weight_bytes < dense]
