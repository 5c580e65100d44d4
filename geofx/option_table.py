"""Priced options as columns of numbers in an order that does not depend on where they came from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy.sparse import csr_array

from geofx.budget import Budget, Resource
from geofx.choice import Totals
from geofx.cost_models import Flops, Size
from geofx.errors import ConfigError, NumericsError
from geofx.options import Option
from geofx.partition import Floats, Indices, Problem
from geofx.region import OWN

Caps = dict[Resource, float]
_USE: dict[Resource, Callable[[Option], float]] = {
    "size": Size().cost,
    "parameters": lambda option: option.workload.parameters,
    "flops": Flops().cost,
    "latency": lambda option: option.latency_s,
    "loss": lambda option: option.loss,
}


@dataclass(frozen=True, eq=False)
class OptionTable:
    """Options in canonical order, as columns of numbers."""

    options: tuple[Option, ...]
    budget: Budget
    fixed: Totals

    @classmethod
    def of(cls, options: Iterable[Option], budget: Budget, fixed: Totals) -> OptionTable:
        """The table of a set of options.

        Raises:
            ConfigError: a site has no dense option, or two regions have one name.
            NumericsError: a price or loss is not a number >= 0.
        """
        return cls(tuple(sorted(set(options), key=_canonical)), budget, fixed)

    def __post_init__(self) -> None:
        for option in self.options:
            if not all(math.isfinite(use(option)) and use(option) >= 0.0 for use in _USE.values()):
                raise NumericsError(
                    f"{option.factorization} has a price or loss that is no number >= 0 (loss {option.loss})",
                    where=option.region.name,
                    fix="leave this region dense",
                )
        regions = {option.region for option in self.options}
        if len(regions) > len({region.name for region in regions}):
            raise ConfigError("two regions have the same name", fix="give every region a name of its own")
        bare = sorted(self.sites - {self.options[j].region.site.weight for j in self.dense})
        if bare:
            raise ConfigError("a site has no dense option", where=bare[0], fix="list Dense among the formats")

    @cached_property
    def sites(self) -> set[str]:
        """Weights that the options cover."""
        return {weight for option in self.options for weight in option.region.weights}

    @cached_property
    def dense(self) -> Indices:
        """The all-dense partition."""
        found: dict[str, int] = {}
        for index, option in enumerate(self.options):
            if option.is_dense and option.region.kind in OWN:
                found.setdefault(option.region.site.weight, index)
        return np.array(sorted(found.values()), dtype=np.intp)

    @cached_property
    def dense_of(self) -> dict[str, Totals]:
        """Dense price of each site."""
        return {self.options[j].region.site.weight: price_of(self.options[j]) for j in self.dense}

    @cached_property
    def use(self) -> dict[Resource, Floats]:
        """What each option uses of each resource."""
        return {
            name: np.array([of(option) for option in self.options], dtype=float) for name, of in _USE.items()
        }

    @cached_property
    def total_dense(self) -> Totals:
        """The whole model as it was."""
        return sum(self.dense_of.values(), self.fixed)

    @cached_property
    def rewritable(self) -> set[str]:
        """Weights that some option would rewrite."""
        return {name for option in self.options if not option.is_dense for name in option.region.weights}

    @cached_property
    def factorizable(self) -> Totals:
        """Dense totals of the sites that some option would rewrite."""
        return sum((self.dense_of[name] for name in sorted(self.rewritable)), Totals(0, 0, 0.0))

    @cached_property
    def untouched(self) -> Totals:
        """What counts outside the options, less what does not count inside them."""
        if self.budget.scope == "model":
            return self.fixed
        return self.factorizable - (self.total_dense - self.fixed)

    @cached_property
    def caps(self) -> Caps:
        """The largest sum over chosen options that the budget leaves of each limited resource."""
        scope = self.total_dense if self.budget.scope == "model" else self.factorizable
        limits = self.budget.limits(scope.bytes, scope.parameters, scope.flops, scope.latency_s)
        return {resource: limit - self.outside(resource) for resource, limit in limits.items()}

    def outside(self, resource: Resource) -> float:
        """The part of a resource's total that no choice changes."""
        untouched = self.untouched
        return {
            "size": untouched.bytes,
            "parameters": untouched.parameters,
            "flops": untouched.flops,
            "latency": untouched.latency_s,
            "loss": 0.0,
        }[resource]

    def total(self, resource: Resource, chosen: Indices) -> float:
        """Σ over ``chosen``, rounded once."""
        return math.fsum(self.use[resource][chosen])

    def problem(self, goal: Resource, caps: Caps) -> tuple[Problem, Indices]:
        """The partition problem over the options that no other option of their region dominates."""
        kept = self._undominated(np.array([self.use[name] for name in sorted({goal, *caps})]).T)
        column = {name: row for row, name in enumerate(sorted(self.sites))}
        pairs = [(column[w], j) for j, k in enumerate(kept) for w in self.options[k].region.weights]
        rows, columns = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
        cover = csr_array((np.ones(len(pairs)), (rows, columns)), shape=(len(column), len(kept)))
        limited = sorted(caps)
        uses = np.array([self.use[name][kept] for name in limited]).reshape(len(limited), len(kept))
        limits = np.array([caps[name] for name in limited])
        base = np.unique(self.group[self.dense])
        return Problem(self.use[goal][kept], cover, self.group[kept], uses, limits, base), kept

    @cached_property
    def group(self) -> Indices:
        """Index of each option's region."""
        numbers: dict[str, int] = {}
        return np.array(
            [numbers.setdefault(option.region.name, len(numbers)) for option in self.options], dtype=np.intp
        )

    def _undominated(self, prices: Floats) -> Indices:
        """Options for which no other of the region is as good in all ``prices`` (and, if equal, earlier)."""
        kept: list[int] = []
        for members in np.split(np.arange(len(prices)), np.flatnonzero(np.diff(self.group)) + 1):
            own = prices[members]
            as_good = (own[:, None] <= own[None]).all(axis=2)
            earlier = np.arange(len(own))[:, None] < np.arange(len(own))[None]
            beaten = (as_good & (~as_good.T | earlier)).any(axis=0)
            kept += members[~beaten].tolist()
        return np.array(kept, dtype=np.intp)


def _canonical(option: Option) -> tuple[object, ...]:
    """By region, weights numbered as people count; then dense first, then the cheaper."""
    name, work = option.region.name, option.workload
    price = work.weight_bytes, work.parameters, work.flops, option.loss
    return _natural(name), name, not option.is_dense, price, repr(option.factorization)


@lru_cache(maxsize=4096)
def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that puts layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", name))


def price_of(option: Option) -> Totals:
    """What an option stores and computes."""
    work = option.workload
    return Totals(work.weight_bytes, work.parameters, work.flops, option.latency_s)
