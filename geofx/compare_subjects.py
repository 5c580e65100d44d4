"""What is compared: every format on every kind of region that it rewrites, and every recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from geofx import recipes
from geofx.comparison import Role, Scope
from geofx.errors import ConfigError
from geofx.factorizations import FACTORIZATIONS, Dense, Factorization
from geofx.method import Allocation, Form, Method, formats_named
from geofx.recipes import EMBEDDINGS, Recipe
from geofx.region import TABLES, RegionKind
from geofx.region_analysis import RegionAnalysis

TOGETHER: tuple[RegionKind, ...] = ("shared_input", "gated_mlp", "stack")
Names = Iterable[str | type[Factorization]] | Literal["all", "none"]


@dataclass(frozen=True)
class Subject:
    """A method and the allocations to show of it."""

    method: Method
    role: Role
    allocations: tuple[Allocation, ...]

    @property
    def title(self) -> str:
        """Role and name: a format and a recipe may be namesakes."""
        return f"{self.role} {self.method.name}"

    @property
    def scope(self) -> Scope:
        """Which weights a share is of."""
        tables = TABLES & set(self.method.kinds)
        if not tables:
            return "blocks"
        return "embedding" if tables == set(self.method.kinds) else "blocks and embedding"


def subjects(
    formats: Names, chosen: Names | Iterable[Recipe], regions: Mapping[str, RegionAnalysis]
) -> list[Subject]:
    """Formats first, by the kinds of region that the model has, then recipes.

    Raises:
        ConfigError: a name is neither a format nor a recipe, or is that of two recipes.
    """
    kinds = {analysis.region.kind for analysis in regions.values()}
    methods = [method for member in _formats(formats) for method in _methods(member, kinds)]
    found = [Subject(method, "format", ("uniform", "planned")) for method in methods]
    return [*found, *(Subject(item, "recipe", (item.allocation,)) for item in _recipes(chosen))]


def _formats(names: Names) -> list[type[Factorization]]:
    known = [member for member in FACTORIZATIONS if member is not Dense]
    wanted = listed(names)
    if wanted == ["all"]:
        return known
    return list(formats_named(() if wanted == ["none"] else wanted, known))


def _methods(member: type[Factorization], kinds: set[RegionKind]) -> Iterator[Method]:
    """The format on single matrices, on each kind of region of several, and on the embedding."""
    forms, rewritten = (Form(member.name),), member.regions & kinds
    if "single" in rewritten:
        yield Method(member.name, forms)
    for kind in TOGETHER:
        if kind in rewritten:
            rest: tuple[RegionKind, ...] = ("single",) if "single" in rewritten else ()
            yield Method(f"{member.name}/{kind}", forms, (kind, *rest))
    tables = tuple(kind for kind in EMBEDDINGS if kind in rewritten)
    if tables:
        yield Method(f"{member.name}/embedding", forms, tables)


def _recipes(chosen: Names | Iterable[Recipe]) -> tuple[Recipe, ...]:
    wanted = listed(chosen)
    if wanted in (["all"], ["none"]):
        return recipes.all() if wanted == ["all"] else ()
    found: dict[str, Recipe] = {}
    for item in wanted:
        (recipe,) = (item,) if isinstance(item, Recipe) else recipes.named([item])
        if found.setdefault(recipe.name, recipe) != recipe:
            raise ConfigError(f"two recipes are named {recipe.name!r}", fix="give each a name of its own")
    return tuple(found.values())


def reads_directions(formats: Names, chosen: Names | Iterable[Recipe]) -> bool:
    """Whether something among these has criteria over x / ‖x‖, which an analysis takes only when asked."""
    named = [getattr(item, "name", str(item)) for item in (*listed(formats), *listed(chosen))]
    return any(name == "all" or name.startswith(("activation_subspace", "espace")) for name in named)


def listed(names: Names | Iterable[Recipe]) -> list[Any]:
    """The names, classes or recipes given; a single one stands for itself."""
    several = isinstance(names, Iterable) and not isinstance(names, str | type)
    return list(names) if several else [names]
