"""One region's entry in a plan: its factorization, its price, and the checks that it must pass."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator

from geofx.errors import PlanError
from geofx.factorizations import Dense, Factorization, from_json, to_json
from geofx.patterns import nearest
from geofx.region import Region, RegionKind
from geofx.site import Site
from geofx.workload import measure

MAX_SIDE = 2**28
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Count = Annotated[int, Field(ge=0)]


def _read_factorization(data: Any) -> Factorization:
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise ValueError("a factorization is an object with a name")
    try:
        return from_json(data)
    except PlanError as error:
        raise ValueError(str(error)) from error


StoredFactorization = Annotated[
    Factorization, PlainValidator(_read_factorization), PlainSerializer(to_json, return_type=dict[str, Any])
]


@dataclass(frozen=True)
class Totals:
    """Bytes and numbers stored, flops per token, seconds on the targets (0 where none was asked)."""

    bytes: int
    parameters: int
    flops: float
    latency_s: float = 0.0

    __pydantic_config__ = STRICT

    def __add__(self, other: Totals) -> Totals:
        return self._joined(other, 1)

    def __sub__(self, other: Totals) -> Totals:
        return self._joined(other, -1)

    def _joined(self, other: Totals, sign: int) -> Totals:
        return Totals(
            self.bytes + sign * other.bytes,
            self.parameters + sign * other.parameters,
            self.flops + sign * other.flops,
            self.latency_s + sign * other.latency_s,
        )


@dataclass(frozen=True)
class Choice:
    """The factorization of one region, its price and the price of leaving the region dense.

    Attributes:
        shapes: (out, in) of each weight, canonical.
        biased: names of the weights to whose products a bias is added.
        latency_s: of the targets, and ``dense_latency_s``; 0 where none was asked.
        loss: predicted increase; None where it was not predicted (edited by hand).
    """

    region: str
    kind: RegionKind
    weights: tuple[str, ...]
    shapes: tuple[tuple[Side, Side], ...]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    factorization: StoredFactorization
    loss: float | None
    parameters: Count
    bytes: Count
    flops: float
    dense_parameters: Count
    dense_bytes: Count
    dense_flops: float
    biased: tuple[str, ...] = ()
    latency_s: float = 0.0
    dense_latency_s: float = 0.0

    __pydantic_config__ = STRICT

    @property
    def price(self) -> Totals:
        """What the chosen factors store and compute."""
        return Totals(self.bytes, self.parameters, self.flops, self.latency_s)

    @property
    def dense(self) -> Totals:
        """What the weights as they were store and compute."""
        return Totals(self.dense_bytes, self.dense_parameters, self.dense_flops, self.dense_latency_s)

    @property
    def is_dense(self) -> bool:
        """Whether the region is left as it is."""
        return isinstance(self.factorization, Dense)

    def as_region(self) -> Region:
        """The region as far as prices need it: names, shapes, dtype."""
        pairs = zip(self.weights, self.shapes, strict=True)
        return Region(self.region, self.kind, tuple(self._site(*pair) for pair in pairs))

    def _site(self, weight: str, shape: tuple[int, int]) -> Site:
        return Site(weight, shape, dtype=self.dtype, has_bias=weight in self.biased)

    @property
    def rows_per_token(self) -> float:
        """How often the region runs per token of the model."""
        once = measure(Dense(), self.as_region()).flops
        return self.dense_flops / once if once else 1.0

    def part(self, weight: str) -> Region:
        """The region of one of the weights alone."""
        return Region(weight, "single", (self._site(weight, self.shapes[self.weights.index(weight)]),))


@dataclass(frozen=True)
class Rejection:
    """What was not taken or not proposed, and why; ``factorization`` is empty where it concerns all."""

    region: str
    factorization: str
    reason: str
    detail: str

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class SolverReport:
    """How good the plan is proved to be.

    Attributes:
        status: ``optimal``, ``nothing to do``, ``not proved optimal``, ``closest``, ``uniform`` or
            ``edited``.
        objective: the minimised sum: loss, or bytes where only the loss is limited.
        bound: no plan within the budget is below.
        gap: (objective - bound) / objective.
    """

    status: str
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None

    __pydantic_config__ = STRICT


def priced(region: Region, factorization: Factorization, rows_per_token: float) -> Choice:
    """The choice of ``factorization`` for ``region``; its loss is unknown unless it is dense.

    Raises:
        PlanError: the factorization does not fit the region.
    """
    work = measure(Dense(), region).times(rows_per_token)
    dense = work.parameters, work.weight_bytes, work.flops
    shapes = tuple(site.shape for site in region.sites)
    whole = Choice(
        region.name,
        region.kind,
        region.weights,
        shapes,
        region.sites[0].dtype,  # type: ignore[arg-type]
        Dense(),
        0.0,
        *dense,
        *dense,
        biased_in(region),
    )
    return reprice(whole, factorization, region.name)


def biased_in(region: Region) -> tuple[str, ...]:
    """The weights of ``region`` to whose products a bias is added."""
    return tuple(site.weight for site in region.sites if site.has_bias)


def reprice(choice: Choice, factorization: Factorization, where: str) -> Choice:
    """``choice`` with this factorization at measured prices; a loss predicted for another is dropped.

    Raises:
        PlanError: the factorization does not fit the region.
    """
    try:
        region = choice.as_region()
        if choice.kind not in factorization.regions:
            raise ValueError(f"{factorization.name} does not rewrite {choice.kind} regions")
        factorization.factor_shapes(region)
        work, dense = measure(factorization, region), measure(Dense(), region)
    except (PlanError, ValueError, RuntimeError) as error:
        raise PlanError(f"{choice.region}: {error}", where=where, fix="mend this entry") from error
    flops = work.flops * choice.rows_per_token
    repriced = replace(
        choice,
        factorization=factorization,
        parameters=work.parameters,
        bytes=work.weight_bytes,
        flops=choice.flops if math.isclose(choice.flops, flops, rel_tol=1e-9) else flops,
        dense_parameters=dense.parameters,
        dense_bytes=dense.weight_bytes,
    )
    if repriced.is_dense:
        return replace(repriced, loss=0.0)
    same = (choice.factorization, choice.bytes, choice.parameters) == (
        factorization,
        repriced.bytes,
        repriced.parameters,
    )
    return repriced if same else replace(repriced, loss=None)


def require_disjoint(choices: Iterable[Choice], tied: Mapping[str, str]) -> None:
    """Raises PlanError where two choices rewrite one weight; ``tied`` maps further names to the first."""
    owner: dict[str, str] = {}
    for index, choice in enumerate(choices):
        for weight in choice.weights:
            first = owner.setdefault(tied.get(weight, weight), f"choices[{index}]")
            if first != f"choices[{index}]" or choice.weights.count(weight) > 1:
                raise PlanError(
                    f"{weight} is rewritten twice, also by {first}",
                    where=f"choices[{index}]",
                    fix="remove one",
                )


def require_fits(choice: Choice, known: Mapping[str, Region], where: str) -> None:
    """Raises PlanError unless ``choice`` is for one of the ``known`` regions and fits it."""
    if choice.region not in known:
        near = nearest(choice.region, known)
        raise PlanError(
            f"the model has no region {choice.region!r}", where=where, fix=f"the nearest are {near}"
        )
    region = known[choice.region]
    for field, wanted in (
        ("kind", region.kind),
        ("weights", region.weights),
        ("shapes", tuple(site.shape for site in region.sites)),
        ("dtype", region.sites[0].dtype),
        ("biased", biased_in(region)),
    ):
        if getattr(choice, field) != wanted:
            raise PlanError(
                f"{choice.region}: {field} is {getattr(choice, field)}, the model has {wanted}",
                where=f"{where}.{field}",
                fix="plan again",
            )
    reprice(choice, choice.factorization, where)


def plain(name: str) -> str:
    """``name`` without control and format characters, which a terminal would obey."""
    return "".join(letter for letter in name if unicodedata.category(letter)[0] != "C")
