"""Which formats without a closed form a default plan fits, and where: a trial at the smallest matrices.

The loss of the low-rank forms is read off a spectrum; that of the others takes a fit per setting and region,
seconds for a large one. No bound on it is both cheap and above zero: at most sizes such a form has nearly
as many free numbers as the weight. So by default each is tried at one region of the smallest shape of each
kind, and joins the plan in the regions of that shape where it is ahead of the closed forms at the same
bytes. Stacks, tables and larger shapes are fitted when a format is asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from geofx.errors import NumericsError
from geofx.factorizations import Dense, Factorization
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis
from geofx.workload import measure

SHARE = 0.6
"""Kept share of the dense bytes at which a format is tried."""

TRIED: tuple[RegionKind, ...] = ("single", "shared_input")
"""Kinds of region with a trial."""

MOST_NUMBERS = 2**20
"""Numbers in the largest region that a default plan would fit by trial."""

Frontier = Mapping[str, Sequence[tuple[float, float]]]
"""Region -> (share of the dense bytes, loss) of every closed-form setting."""


@dataclass(frozen=True, eq=False)
class Screen:
    """The closed forms to beat, and the region of each kind to be tried at."""

    frontier: Frontier
    smallest: Mapping[RegionKind, RegionAnalysis]

    @classmethod
    def of(cls, analyses: Iterable[RegionAnalysis], frontier: Frontier) -> Screen:
        """The smallest region of each kind that is tried, the first of several."""
        smallest: dict[RegionKind, RegionAnalysis] = {}
        for analysis in analyses:
            kind, size = analysis.region.kind, _numbers(analysis.region)
            best = smallest.get(kind)
            if kind in TRIED and size <= MOST_NUMBERS and (best is None or size < _numbers(best.region)):
                smallest[kind] = analysis
        return cls(frontier, smallest)

    def covers(self, region: Region) -> bool:
        """Whether the trial at its kind speaks for ``region``: it has the same shapes."""
        tried = self.smallest.get(region.kind)
        return tried is not None and tried.region.rows == region.rows and tried.region.shape == region.shape

    def refusal(self, member: type[Factorization], kind: RegionKind) -> str | None:
        """Why ``member`` does not join in regions of ``kind``; None where it is ahead at `SHARE`."""
        analysis = self.smallest[kind]
        region, dense = analysis.region, measure(Dense(), analysis.region).weight_bytes
        forms = list(member.candidates(region, analysis))
        sized = [(measure(form, region).weight_bytes, form) for form in forms]
        fitting = [pair for pair in sized if pair[0] <= SHARE * dense]
        if not fitting:
            return f"does not fit {region.name}"
        size, form = max(fitting, key=lambda pair: pair[0])
        try:
            loss = form.predicted_loss(region, analysis)
        except NumericsError as error:
            return f"cannot be fitted at {region.name}: {error}"
        rival = self._rival(region, size / dense)
        if loss < rival:
            return None
        return f"adds {loss:.3g} at {size / dense:.0%} of {region.name}, closed forms {rival:.3g}"

    def _rival(self, region: Region, share: float) -> float:
        """Least loss at ``share`` of the bytes, by closed forms of the region or of its sites apart."""
        apart = sum(self._least(site.weight, share) for site in region.sites)
        return min(apart, self._least(region.name, share))

    def _least(self, name: str, share: float) -> float:
        pairs = self.frontier.get(name, ())
        return min((loss for ratio, loss in pairs if ratio <= share), default=float("inf"))


def _numbers(region: Region) -> int:
    rows, columns = region.shape
    return rows * columns
