"""Which formats a default plan fits at all: those that beat the closed forms where it is cheap to try.

The loss of the low-rank forms is read off a spectrum; that of the others takes a fit per setting and
region. No bound on their loss is both cheap and above zero: at most sizes they have nearly as many free
numbers as the weight, and only a fit tells. So each is fitted at the smallest region of each kind, and
takes part in the plan where it is ahead of the closed forms there at the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from geofx.errors import NumericsError
from geofx.factorizations import Dense, Factorization
from geofx.region import RegionKind
from geofx.region_analysis import RegionAnalysis
from geofx.workload import measure

SHARES = (0.8, 0.4)
"""Kept shares of the dense bytes at which a format is tried."""

Frontier = Mapping[str, tuple[tuple[int, float], ...]]
"""Weight -> (bytes, loss) of every closed-form setting of its own region."""


@dataclass(frozen=True, eq=False)
class Screen:
    """The closed forms to beat, and the region of each kind to be tried at."""

    frontier: Frontier
    smallest: Mapping[RegionKind, RegionAnalysis]

    @classmethod
    def of(cls, analyses: Iterable[RegionAnalysis], frontier: Frontier) -> Screen:
        """The smallest region of each kind, the first of several."""
        smallest: dict[RegionKind, RegionAnalysis] = {}
        for analysis in analyses:
            kind, shape = analysis.region.kind, analysis.region.shape
            best = smallest.get(kind)
            if best is None or shape[0] * shape[1] < best.region.shape[0] * best.region.shape[1]:
                smallest[kind] = analysis
        return cls(frontier, smallest)

    def refusal(self, member: type[Factorization], kind: RegionKind) -> str | None:
        """Why ``member`` is not fitted in regions of ``kind``; None where it is ahead at one of `SHARES`."""
        analysis = self.smallest[kind]
        region, dense = analysis.region, measure(Dense(), analysis.region).weight_bytes
        settings = [
            (measure(item, region).weight_bytes, item) for item in member.candidates(region, analysis)
        ]
        found = []
        for share in SHARES:
            fitting = [pair for pair in settings if pair[0] <= share * dense]
            if not fitting:
                continue
            size, form = max(fitting, key=lambda pair: pair[0])
            try:
                loss = form.predicted_loss(region, analysis)
            except NumericsError as error:
                return f"{form} cannot be fitted at {region.name}: {error}"
            rival = self._rival(analysis, size / dense)
            if loss < rival:
                return None
            found.append(f"{loss:.3g} at {share:.0%} of the bytes, closed forms {rival:.3g}")
        return f"behind at {region.name}: {'; '.join(found)}" if found else f"no setting fits {region.name}"

    def _rival(self, analysis: RegionAnalysis, share: float) -> float:
        """Σ over sites of the least loss at ``share`` of the bytes of each."""
        return sum(
            min(
                (
                    loss
                    for size, loss in self.frontier[site.weight]
                    if size <= share * self._dense(site.weight)
                ),
                default=float("inf"),
            )
            for site in analysis.region.sites
        )

    def _dense(self, weight: str) -> int:
        return max(size for size, _ in self.frontier[weight])
