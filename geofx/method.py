"""A method as data: formats with some settings held, the regions they rewrite, how a budget is shared out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from geofx.errors import ConfigError, PlanError
from geofx.factorizations import FACTORIZATIONS, Factorization, known_formats
from geofx.patterns import nearest
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis
from geofx.workload import measure

Allocation = Literal["uniform", "planned"]
"""The same share of every region, or the planner's choice for the whole model."""

Setting = str | int | float


@dataclass(frozen=True)
class Form:
    """A format and the settings of it that do not vary."""

    format: str
    settings: tuple[tuple[str, Setting], ...] = ()

    @classmethod
    def of(cls, format: str, **settings: Setting) -> Form:
        """``Form.of("low_rank", weighting="input")``."""
        return cls(format, tuple(settings.items()))

    def candidates(self, region: Region, analysis: RegionAnalysis) -> Iterator[Factorization]:
        """The format's own candidates with the held settings put in, where ``region`` has room for these.

        None for other kinds of region.

        Raises:
            PlanError: geofx has no such format, or the format no such setting.
        """
        member = self.member()
        if region.kind in member.regions:
            for candidate in member.candidates(region, analysis):
                held: Factorization = replace(candidate, **dict(self.settings))  # type: ignore[type-var]
                if _fits(held, region):
                    yield held

    def member(self) -> type[Factorization]:
        """The class of the format."""
        known = {member.name: member for member in FACTORIZATIONS}
        if self.format not in known:
            fix = f"the nearest are {nearest(self.format, known)}"
            raise PlanError(f"unknown factorization {self.format!r}", fix=fix)
        settings = {field.name for field in fields(known[self.format])}  # type: ignore[arg-type]
        for name, _ in self.settings:
            if name not in settings:
                raise PlanError(f"{self.format} has no setting {name!r}", fix="remove it")
        return known[self.format]


def _fits(form: Factorization, region: Region) -> bool:
    try:
        form.factor_shapes(region)
    except PlanError:
        return False
    return True


@dataclass(frozen=True)
class Method:
    """What a compression method does to a model, as data.

    Attributes:
        kinds: of the regions that it rewrites, those that come first preferred.
        layers: how many sites a ``stack`` has; None takes the largest.
    """

    name: str
    forms: tuple[Form, ...]
    kinds: tuple[RegionKind, ...] = ("single",)
    allocation: Allocation = "uniform"
    layers: int | None = None

    @property
    def formats(self) -> tuple[type[Factorization], ...]:
        """The classes of its formats."""
        return tuple(form.member() for form in self.forms)

    def candidates(self, region: Region, analysis: RegionAnalysis) -> list[Factorization]:
        """Every distinct setting for ``region`` that this method allows, in order of bytes."""
        found = dict.fromkeys(item for form in self.forms for item in form.candidates(region, analysis))
        return sorted(found, key=lambda item: measure(item, region).weight_bytes)

    def regions(self, analyses: Mapping[str, RegionAnalysis]) -> list[RegionAnalysis]:
        """The regions that this method may rewrite, the preferred ones first; they may overlap."""
        found = [item for item in analyses.values() if self._takes(item.region)]
        return sorted(found, key=lambda item: self._place(item.region))

    def _takes(self, region: Region) -> bool:
        if region.kind not in self.kinds or not any(region.kind in form.regions for form in self.formats):
            return False
        return region.kind != "stack" or self.layers in (None, len(region.sites))

    def _place(self, region: Region) -> tuple[int, int]:
        return self.kinds.index(region.kind), -len(region.sites)

    def to_json(self) -> dict[str, Any]:
        """Plain data: names, numbers, lists."""
        forms = [{"format": form.format, **dict(form.settings)} for form in self.forms]
        return {**asdict(self), "forms": forms, "kinds": list(self.kinds)}


def disjoint(analyses: Sequence[RegionAnalysis]) -> list[RegionAnalysis]:
    """The regions in order, without those that hold a weight of an earlier one."""
    taken: set[str] = set()
    kept = []
    for analysis in analyses:
        if taken.isdisjoint(analysis.region.weights):
            taken.update(analysis.region.weights)
            kept.append(analysis)
    return kept


def formats_named(
    names: Iterable[str | type[Factorization]] | str | type[Factorization],
    known: Iterable[type[Factorization]] | None = None,
) -> tuple[type[Factorization], ...]:
    """The formats given by name or by class, each once, in the order given; a single one stands for itself.

    Raises:
        ConfigError: one is none of ``known``, by default `known_formats`, or has settings: those are the
            planner's to choose.
    """
    members = {member.name: member for member in (known_formats() if known is None else known)}
    several: Iterable[Any] = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else names
    found: dict[type[Factorization], None] = {}
    for item in several:
        name = item.name if item in members.values() else item
        if not isinstance(name, str) or name not in members:
            fix = f"the nearest are {nearest(str(name), members)}; give names or classes, your own registered"
            raise ConfigError(f"no format {name!r}", fix=fix)
        found[members[name]] = None
    return tuple(found)
