"""What the model and its regions store and compute, dense and rewritten: the scale of equal bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from geofx.choice import Totals
from geofx.comparison import Scope
from geofx.factorizations import Dense, Factorization
from geofx.options import Option, uses_per_token
from geofx.passes.count_flops import count_flops
from geofx.program import Program
from geofx.region import OWN, TABLES, Region, RegionKind
from geofx.region_analysis import RegionAnalysis
from geofx.workload import Workload, measure


@dataclass
class Prices:
    """Totals of one model.

    Attributes:
        total: the whole model as it was.
        regions: every region by name.
        rows: weight -> how often it is used per token.
    """

    total: Totals
    regions: Mapping[str, RegionAnalysis]
    rows: Mapping[str, float]

    @classmethod
    def of(cls, original: Program, program: Program, regions: Mapping[str, RegionAnalysis]) -> Prices:
        """Measured on the original's tensors and the canonical program's graph."""
        flops, rows = count_flops(program)
        return cls(Totals(original.size_bytes(), original.parameter_count(), flops), regions, rows)

    def work(self, form: Factorization, region: Region) -> Workload:
        """Price of one form of one region, per token of the model."""
        return measure(form, region).times(uses_per_token(region, self.rows))

    @cached_property
    def dense(self) -> list[Option]:
        """Leaving each weight as it is."""
        own = [item.region for item in self.regions.values() if item.region.kind in OWN]
        return [Option(region, Dense(), self.work(Dense(), region), 0.0) for region in own]

    @cached_property
    def fixed(self) -> Totals:
        """What lies outside the regions."""
        outside = self.total - self._dense_totals(OWN)
        return replace(outside, flops=max(0.0, outside.flops))

    def scope(self, scope: Scope) -> Totals:
        """Dense totals of what shares are of: the blocks' linear weights, the embedding, or both."""
        kinds: set[RegionKind] = set() if scope == "embedding" else {"single"}
        return self._dense_totals(kinds if scope == "blocks" else kinds | TABLES)

    def _dense_totals(self, kinds: Collection[RegionKind]) -> Totals:
        work = [option.workload for option in self.dense if option.region.kind in kinds]
        return Totals(
            sum(item.weight_bytes for item in work),
            sum(item.parameters for item in work),
            sum(item.flops for item in work),
        )
