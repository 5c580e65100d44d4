"""A plan: the factorization chosen for each region, what it is predicted to cost, and what was not taken."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from geofx.budget import Budget, Resource, describe
from geofx.choice import (
    STRICT,
    Choice,
    Rejection,
    SolverReport,
    Totals,
    plain,
    priced,
    reprice,
    require_disjoint,
    require_fits,
)
from geofx.errors import ArtifactMismatchError, ConfigError, PlanError
from geofx.factorizations import Dense, Factorization
from geofx.folder import write_file
from geofx.patterns import nearest
from geofx.region import Region
from geofx.strict_json import MAX_BYTES, parse

SCHEMA: Literal[1] = 1

__all__ = ["Choice", "Plan", "Rejection", "SolverReport", "Totals"]


@dataclass(frozen=True)
class Plan:
    """What to do with each region; regions it does not name stay dense.

    Attributes:
        dense: totals of the whole model as it was.
        predicted: totals of the whole model as planned.
        factorizable: dense totals of the regions that have an option other than dense.
        loss: sum over the choices in ``unit``; None where one is not predicted.
        model_hash: hash of the model that the plan is for.
    """

    choices: tuple[Choice, ...]
    rejections: tuple[Rejection, ...]
    budget: Budget
    dense: Totals
    predicted: Totals
    factorizable: Totals
    loss: float | None
    unit: str
    solver: SolverReport
    model_hash: str
    schema_version: Literal[1]

    __pydantic_config__ = STRICT

    @classmethod
    def of(
        cls,
        choices: Sequence[Choice],
        budget: Budget,
        dense: Totals,
        factorizable: Totals,
        solver: SolverReport,
        rejections: Iterable[Rejection] = (),
        unit: str = "nats per token",
        model_hash: str = "",
    ) -> Plan:
        """predicted = dense + Σ (price - dense price), loss = Σ loss."""
        predicted = sum((choice.price - choice.dense for choice in choices), dense)
        losses = [choice.loss for choice in choices if choice.loss is not None]
        loss = math.fsum(losses) if len(losses) == len(choices) else None
        return cls(
            choices=tuple(choices),
            rejections=tuple(rejections),
            budget=budget,
            dense=dense,
            predicted=predicted,
            factorizable=factorizable,
            loss=loss,
            unit=unit,
            solver=solver,
            model_hash=model_hash,
            schema_version=SCHEMA,
        )

    @property
    def rewritten(self) -> tuple[Choice, ...]:
        """The choices that are not dense."""
        return tuple(choice for choice in self.choices if not choice.is_dense)

    @property
    def limits(self) -> dict[Resource, float]:
        """The largest allowed value of each limited resource, in the budget's scope."""
        scope = self.dense if self.budget.scope == "model" else self.factorizable
        return self.budget.limits(scope.bytes, scope.parameters, scope.flops, scope.latency_s)

    @property
    def used(self) -> dict[Resource, float | None]:
        """The planned value of each limited resource, in the budget's scope."""
        total = self.predicted
        if self.budget.scope == "factorizable":
            total = total - (self.dense - self.factorizable)
        every: dict[Resource, float | None] = {
            "size": total.bytes,
            "parameters": total.parameters,
            "flops": total.flops,
            "latency": total.latency_s,
            "loss": self.loss,
        }
        return {resource: every[resource] for resource in self.limits}

    def to_json(self) -> str:
        """The plan as JSON, byte-identical for equal plans; inverse of `from_json`."""
        return _ADAPTER.dump_json(self, indent=2).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``text`` describes, every price measured anew.

        Where a recorded price is not that of the factorization, the entry was edited by hand: its
        loss is unknown. Where the recorded total is not that of the entries, some were taken out: they
        stay dense, and the budget is not enforced.

        Raises:
            PlanError: names the path of the first faulty entry.
        """
        try:
            parse(text)
            plan = _ADAPTER.validate_json(text, strict=True)
        except ValidationError as error:
            raise _faulty(error) from error
        except (ValueError, RecursionError, ConfigError) as error:
            raise PlanError(f"not a plan: {error}", fix="mend the file or plan again") from error
        choices = [
            reprice(choice, choice.factorization, f"choices[{i}]") for i, choice in enumerate(plan.choices)
        ]
        require_disjoint(choices, {})
        fresh = plan._with(choices, plan.solver)
        same = (fresh.choices, fresh.predicted) == (plan.choices, plan.predicted)
        return fresh if same else plan._with(choices, SolverReport("edited"))

    def save(self, path: str | Path) -> None:
        """Write the JSON text to ``path``.

        Raises:
            ArtifactError, ResourceError: it cannot be written; what was there is as it was.
        """
        write_file(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a JSON file.

        Raises:
            PlanError: the file cannot be read, is too long, or `from_json` refuses it.
        """
        try:
            with Path(path).open("rb") as file:
                text = file.read(MAX_BYTES + 1).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"cannot read the plan: {error}", where=str(path), fix="give a plan file"
            ) from error
        return cls.from_json(text)

    def scaled_to(self, loss: float) -> Plan:
        """This plan with the losses of its choices scaled so that they add up to ``loss``.

        Where they are all 0, those that are rewritten lose alike.
        """
        alike = loss / max(1, len(self.rewritten))
        choices = tuple(
            item
            if item.is_dense
            else replace(item, loss=(item.loss or 0.0) * loss / self.loss if self.loss else alike)
            for item in self.choices
        )
        return replace(self, choices=choices, loss=loss)

    def edit(self, changes: Mapping[str, Factorization], regions: Iterable[Region] = ()) -> Plan:
        """This plan with the factorizations of some regions replaced, priced anew.

        A region that is not in the plan, such as q, k and v together, takes the place of those that share
        weights with it; what they leave uncovered stays dense. The loss of a replaced choice is 0 where it is
        dense, else unknown; the budget is not enforced.

        Args:
            changes: region name -> factorization.
            regions: where regions that the plan does not name are looked up, such as an analysis'.

        Raises:
            PlanError: a region is not known, or a factorization does not fit it.
        """
        known = {region.name: region for region in regions} | {
            choice.region: choice.as_region() for choice in self.choices
        }
        for name in changes:
            if name not in known:
                raise PlanError(
                    f"the plan has no region {name!r}", fix=f"the nearest are {nearest(name, known)}"
                )
        owner = {weight: name for name in changes for weight in known[name].weights}
        choices: list[Choice] = []
        for choice in self.choices:
            if not owner.keys() & set(choice.weights) or choice.region in changes:
                form = changes.get(choice.region, choice.factorization)
                choices.append(reprice(choice, form, choice.region))
                continue
            placed = {done.region for done in choices}
            for name in dict.fromkeys(owner[weight] for weight in choice.weights if weight in owner):
                if name not in placed:
                    choices.append(priced(known[name], changes[name], choice.rows_per_token))
            for weight in choice.weights:
                if weight not in owner:
                    whole = known.get(weight) or choice.part(weight)
                    choices.append(priced(whole, Dense(), choice.rows_per_token))
        placed = {done.region for done in choices}
        choices += [priced(known[name], changes[name], 1.0) for name in changes if name not in placed]
        require_disjoint(choices, {})
        return self._with(choices, SolverReport("edited"))

    def require_for(self, regions: Iterable[Region], model_hash: str) -> None:
        """Check that the plan can be applied to the model with these regions and this hash.

        Raises:
            ArtifactMismatchError: the plan is for another model.
            PlanError: an entry names an unknown region, does not fit it, or rewrites a weight twice.
        """
        if self.model_hash != model_hash:
            raise ArtifactMismatchError(
                f"the plan is for model {plain(self.model_hash)[:16]}, this is {model_hash[:16]}",
                fix="plan again",
            )
        known = {region.name: region for region in regions}
        sites = [site for region in known.values() for site in region.sites]
        tied = {alias: site.weight for site in sites for alias in site.aliases}
        require_disjoint(self.choices, tied)
        for index, choice in enumerate(self.choices):
            require_fits(choice, known, f"choices[{index}]")

    def _with(self, choices: Sequence[Choice], solver: SolverReport) -> Plan:
        return Plan.of(
            choices,
            self.budget,
            self.dense,
            self.factorizable,
            solver,
            self.rejections,
            self.unit,
            self.model_hash,
        )

    def __str__(self) -> str:
        return "\n".join(_lines(self))


_ADAPTER: TypeAdapter[Plan] = TypeAdapter(Plan)


def _faulty(error: ValidationError) -> PlanError:
    first = error.errors(include_url=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    return PlanError(f"not a plan: {path}: {first['msg']}", where=path, fix="mend this entry")


def _lines(plan: Plan) -> Iterator[str]:
    used = plan.used
    yield f"plan: {len(plan.rewritten)} of {len(plan.choices)} regions rewritten, {plan.solver.status}"
    for resource, limit in plan.limits.items():
        value = used[resource]
        found = "unknown" if value is None else describe(resource, value, plan.unit)
        over = "" if value is None or value <= limit else "  OVER BUDGET"
        asked = describe(resource, limit, plan.unit)
        yield f"  asked {resource} of the {plan.budget.scope} <= {asked}: {found}{over}"
    totals: tuple[tuple[Resource, float, float], ...] = (
        ("size", plan.dense.bytes, plan.predicted.bytes),
        ("parameters", plan.dense.parameters, plan.predicted.parameters),
        ("flops", plan.dense.flops, plan.predicted.flops),
        ("latency", plan.dense.latency_s, plan.predicted.latency_s),
    )
    for resource, before, after in totals:
        if resource == "latency" and not before:
            continue
        share = after / before if before else 1.0
        yield f"  {describe(resource, before)} -> {describe(resource, after)} ({share:.1%})"
    yield f"  predicted {'loss unknown' if plan.loss is None else describe('loss', plan.loss, plan.unit)}"
    solver = plan.solver
    if solver.gap is not None:
        yield f"  solver objective {solver.objective:.6g}, bound {solver.bound:.6g}, gap {solver.gap:.2g}"
    yield from _group_lines(plan.choices)
    reasons = Counter(plain(rejection.reason) for rejection in plan.rejections)
    yield from (f"  {count} x {reason}" for reason, count in sorted(reasons.items()))


def _group_lines(choices: Iterable[Choice]) -> Iterator[str]:
    """One row per role (names alike but for their numbers) and format."""
    groups: dict[tuple[str, str], list[Choice]] = defaultdict(list)
    for choice in choices:
        groups[re.sub(r"\d+", "*", plain(choice.region)), choice.factorization.name].append(choice)
    width = max((len(role) for role, _ in groups), default=0)
    for (role, name), members in sorted(groups.items()):
        before, after = sum(member.dense_bytes for member in members), sum(member.bytes for member in members)
        losses = [member.loss for member in members if member.loss is not None]
        loss = f"{math.fsum(losses):.4g}" if len(losses) == len(members) else "unknown"
        sizes = f"{describe('size', before)} -> {describe('size', after)}"
        yield f"  {role:<{width}}  {len(members):>3} x {name}{_settings(members)}  {sizes}  loss {loss}"


def _settings(members: Sequence[Choice]) -> str:
    ranks = [member.factorization.rank for member in members if hasattr(member.factorization, "rank")]
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    return f" rank {low}" if low == high else f" rank {low}..{high}"
