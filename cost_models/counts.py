"""Costs that no hardware changes: bytes stored, and operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from geofx.cost_models.contract import Priced


@dataclass(frozen=True)
class Size:
    """Bytes of all factors, indices included."""

    name: ClassVar[str] = "size"
    unit: ClassVar[str] = "bytes"

    def cost(self, item: Priced) -> float:
        """Bytes."""
        return item.workload.weight_bytes


@dataclass(frozen=True)
class Flops:
    """Operations per token; a multiply-add is 2."""

    name: ClassVar[str] = "flops"
    unit: ClassVar[str] = "flops per token"

    def cost(self, item: Priced) -> float:
        """Flops per token."""
        return item.workload.flops
