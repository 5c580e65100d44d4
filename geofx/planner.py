"""min Σ loss subject to the budget, one option over every site: the exact choice among priced options."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from geofx.budget import Budget, Resource, describe
from geofx.choice import Choice, Rejection, SolverReport, Totals, biased_in
from geofx.errors import BudgetInfeasibleError, ResourceError
from geofx.option_table import Caps, OptionTable, price_of
from geofx.options import Option
from geofx.partition import Indices, Solution, solve
from geofx.plan import Plan
from geofx.site import Skip


def choose(
    options: Iterable[Option],
    budget: Budget,
    fixed: Totals,
    skips: Iterable[Skip] = (),
    model_hash: str = "",
    unit: str = "nats per token",
    time_limit_s: float = 20.0,
) -> Plan:
    """The plan with the least summed loss within the budget; the fewest bytes where only loss is limited.

    Every site is covered by exactly one option of the regions that hold it. The result depends on
    the set of options, not on their order.

    Args:
        options: with a `Dense` one for the single region of every site.
        fixed: what the model stores and computes outside the regions in ``options``.

    Raises:
        BudgetInfeasibleError: no plan meets the budget; has the smallest values and the closest plan.
        ConfigError: a site has no `Dense` option.
        NumericsError: a loss is not finite.
        ResourceError: the time ran out before any plan was found.
    """
    table = OptionTable.of(options, budget, fixed)
    request = _Request(table, tuple(skips), model_hash, unit, time_limit_s)
    goal: Resource = "size" if set(table.caps) == {"loss"} else "loss"
    if goal == "loss" and all(
        table.total(resource, table.dense) <= cap for resource, cap in table.caps.items()
    ):
        return request.plan(table.dense, SolverReport("nothing to do", 0.0, 0.0, 0.0))
    found = request.solve(goal, table.caps)
    if found is None:
        raise request.infeasible()
    gap = (found.objective - found.bound) / found.objective if found.objective else 0.0
    status = "optimal" if found.proved else "not proved optimal"
    return request.plan(found.chosen, SolverReport(status, found.objective, found.bound, gap))


@dataclass(frozen=True, eq=False)
class _Request:
    """A table and how its plans are to be found and labelled."""

    table: OptionTable
    skips: tuple[Skip, ...]
    model_hash: str
    unit: str
    time_limit_s: float

    def solve(self, goal: Resource, caps: Caps) -> Solution | None:
        """The best choice within ``caps``, as indices of the table."""
        problem, kept = self.table.problem(goal, caps)
        try:
            found = solve(problem, self.time_limit_s)
        except TimeoutError as error:
            raise ResourceError(
                f"no plan was found within {self.time_limit_s} s",
                fix="raise the budget, or plan fewer formats",
            ) from error
        return found and Solution(kept[found.chosen], found.objective, found.bound, found.proved)

    def plan(self, chosen: Indices, solver: SolverReport) -> Plan:
        """The plan of some choice, with a reason for all that was not chosen."""
        table = self.table
        taken = [table.options[index] for index in sorted(chosen.tolist())]
        return Plan.of(
            [_choice(option, table.dense_of) for option in taken],
            table.budget,
            table.total_dense,
            table.factorizable,
            solver,
            [*_not_chosen(table.options, taken), *_skipped(self.skips)],
            self.unit,
            self.model_hash,
        )

    def infeasible(self) -> BudgetInfeasibleError:
        """What cannot be met, alone or together with the other limits, and the plan that comes closest."""
        table = self.table
        least = {resource: self._least(resource, {}) for resource in table.caps}
        alone = [resource for resource, value in least.items() if value > table.caps[resource]]
        smallest = {resource: value + table.outside(resource) for resource, value in least.items()}
        for resource in alone or table.caps:
            others = {name: cap for name, cap in table.caps.items() if name != resource and not alone}
            reached = self._least(resource, others)
            if not math.isfinite(reached):
                continue
            best = self.solve("loss", {**others, resource: reached})
            chosen = table.dense if best is None else best.chosen
            return self._error(
                resource, reached, others, smallest, self.plan(chosen, SolverReport("closest"))
            )
        first = next(iter(table.caps))
        return self._error(first, least[first], {}, smallest, self.plan(table.dense, SolverReport("closest")))

    def _least(self, resource: Resource, caps: Caps) -> float:
        found = self.solve(resource, caps)
        return math.inf if found is None else self.table.total(resource, found.chosen)

    def _error(
        self, resource: Resource, reached: float, others: Caps, smallest: dict[Resource, float], best: Plan
    ) -> BudgetInfeasibleError:
        needed = describe(resource, reached + self.table.outside(resource), self.unit)
        within = " and ".join(describe(name, best.limits[name], self.unit) for name in others)
        together = f" within {within}" if within else ""
        return BudgetInfeasibleError(
            f"budget of {describe(resource, best.limits[resource], self.unit)} cannot be met: "
            f"the smallest plan{together} needs {needed}",
            where=f"limit: {self._obstacle(resource, best)}",
            fix=f"raise {' or '.join((resource, *others))}, or let more weights be rewritten",
            smallest={str(name): value for name, value in smallest.items()},
            best=best,
        )

    def _obstacle(self, resource: Resource, best: Plan) -> str:
        """The largest part of what the closest plan uses."""
        of: dict[Resource, Callable[[Choice], float]] = {
            "size": lambda choice: choice.bytes,
            "parameters": lambda choice: choice.parameters,
            "flops": lambda choice: choice.flops,
            "latency": lambda choice: choice.latency_s,
            "loss": lambda choice: choice.loss or 0.0,
        }
        counted = [
            choice
            for choice in best.choices
            if self.table.budget.scope == "model" or self.table.rewritable & set(choice.weights)
        ]
        parts = [(of[resource](choice), repr(choice.region)) for choice in counted]
        if self.table.budget.scope == "model":
            parts.append((self.table.outside(resource), "weights that are not rewritten"))
        use, name = max(parts, key=lambda part: part[0])
        return f"{name}, {describe(resource, use, self.unit)}"


def _choice(option: Option, dense_of: dict[str, Totals]) -> Choice:
    region = option.region
    price, dense = price_of(option), sum((dense_of[name] for name in region.weights), Totals(0, 0, 0.0))
    return Choice(
        region=region.name,
        kind=region.kind,
        weights=region.weights,
        shapes=tuple(site.shape for site in region.sites),
        dtype=region.sites[0].dtype,  # type: ignore[arg-type]
        factorization=option.factorization,
        loss=option.loss,
        parameters=price.parameters,
        bytes=price.bytes,
        flops=price.flops,
        dense_parameters=dense.parameters,
        dense_bytes=dense.bytes,
        dense_flops=dense.flops,
        biased=biased_in(region),
        latency_s=price.latency_s,
        dense_latency_s=dense.latency_s,
    )


def _not_chosen(options: Sequence[Option], taken: Sequence[Option]) -> list[Rejection]:
    """One row per region and format not taken, with its best setting at no more bytes than were taken."""
    chosen = {option.region.name: option for option in taken}
    spent = {weight: option for option in taken for weight in option.region.weights}
    groups: dict[tuple[str, str], list[Option]] = defaultdict(list)
    for option in options:
        groups[option.region.name, option.factorization.name].append(option)
    rows = []
    for (region, name), members in groups.items():
        if region in chosen and chosen[region].factorization.name == name:
            continue
        rivals = {id(spent[w]): spent[w] for w in members[0].region.weights}.values()
        room = sum(rival.workload.weight_bytes for rival in rivals)
        fitting = [m for m in members if m.workload.weight_bytes <= room] or members[:1]
        best = min(fitting, key=lambda m: m.loss)
        price = f"{best.loss:.4g} at {best.workload.weight_bytes} bytes"
        detail = f"{len(members)} settings; {best.factorization} adds {price}"
        rows.append(Rejection(region, name, "NOT_CHOSEN", detail))
    return rows


def _skipped(skips: Iterable[Skip]) -> list[Rejection]:
    ordered = sorted(skips, key=lambda skip: (skip.weight, skip.reason, skip.detail))
    return [Rejection(skip.weight, "", skip.reason, skip.detail) for skip in ordered]
