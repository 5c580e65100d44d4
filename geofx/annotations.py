"""Typed keys under which passes leave frozen records in ``node.meta``."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

from torch import fx

from geofx.errors import PassError
from geofx.site import Site

T = TypeVar("T")


@dataclass(frozen=True)
class Key(Generic[T]):
    """A flat key such as ``"geofx.site"``, the type of its records and the pass that writes them."""

    name: str
    type: type[T]
    writer: str

    def get(self, node: fx.Node) -> T:
        """The record on ``node``.

        Raises:
            PassError: there is none; names the pass that writes it.
        """
        value = node.meta.get(self.name)
        if not isinstance(value, self.type):
            raise PassError(f"node {node.name} has no {self.name}", fix=f"run the pass {self.writer!r} first")
        return value

    def set(self, node: fx.Node, value: T) -> None:
        """Leave ``value`` on ``node``."""
        node.meta[self.name] = value


@dataclass(frozen=True)
class Sensitivity:
    """What the analysis found at a matmul, short enough to look at.

    Attributes:
        rank: numerical rank of the weighted matrix.
        effective_rank: exp of the entropy of its singular values.
        stable_rank: Σ σ² / σ₁².
        rank_99: least rank that keeps 99 % of the weighted energy.
        loss: predicted loss of removing the matmul altogether.
        spectrum: σ_i², descending, in the analysis' unit.
    """

    rank: int
    effective_rank: float
    stable_rank: float
    rank_99: int
    loss: float
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class Rewrite:
    """What the plan chose at a matmul that was rewritten."""

    region: str
    factorization: str


SITE = Key("geofx.site", Site, "find_sites")
SENSITIVITY = Key("geofx.sensitivity", Sensitivity, "analyse")
REWRITE = Key("geofx.rewrite", Rewrite, "lower")
KEYS: tuple[Key[Any], ...] = (SITE, SENSITIVITY, REWRITE)


NOTES = "geofx.notes"
"""Key of what a saved graph remembers of its annotations: flat, as `annotations_of` gives it."""


def annotations_of(node: fx.Node) -> dict[str, Any]:
    """All geofx records on a node, flattened to ``"site.weight": ...`` for graph tools."""
    flat: dict[str, Any] = dict(node.meta.get(NOTES, {}))
    for key in KEYS:
        record = node.meta.get(key.name)
        if is_dataclass(record) and not isinstance(record, type):
            prefix = key.name.removeprefix("geofx.")
            flat |= {f"{prefix}.{field.name}": getattr(record, field.name) for field in fields(record)}
    return flat
