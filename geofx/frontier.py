"""The frontier: the least predicted loss at every size, from one analysis, and what was measured on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from geofx.budget import Scope
from geofx.choice import Totals
from geofx.environment import environment
from geofx.folder import write_file
from geofx.plan import Plan
from geofx.record_file import read_record
from geofx.verify import Fidelity

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Axis = Literal["size", "flops", "parameters"]


@dataclass(frozen=True)
class Point:
    """The best plan at one share.

    Attributes:
        share: what was allowed; the last point may be the smallest plan there is, above its share.
        kept: what the plan uses, as a share.
        linear_parameters: numbers stored in the regions that can be rewritten.
        predicted_loss: increase, in the frontier's unit.
        loss_increase: measured on held-out data, where that was asked for.
        kl: likewise, of the next token.
    """

    share: float
    kept: float
    size_bytes: int
    parameters: int
    linear_parameters: int
    flops_per_token: float
    rewritten: int
    predicted_loss: float
    loss_increase: float | None = None
    kl: float | None = None

    __pydantic_config__ = STRICT

    @classmethod
    def of(cls, plan: Plan, share: float, axis: Axis, fidelity: Fidelity | None) -> Point:
        """The figures of ``plan``; its only limit is on ``axis``."""
        scope = plan.dense if plan.budget.scope == "model" else plan.factorizable
        dense = {"size": scope.bytes, "flops": scope.flops, "parameters": scope.parameters}[axis]
        return cls(
            share=share,
            kept=(plan.used[axis] or 0.0) / dense if dense else 1.0,
            size_bytes=plan.predicted.bytes,
            parameters=plan.predicted.parameters,
            linear_parameters=plan.factorizable.parameters
            - (plan.dense.parameters - plan.predicted.parameters),
            flops_per_token=plan.predicted.flops,
            rewritten=len(plan.rewritten),
            predicted_loss=plan.loss or 0.0,
            loss_increase=None if fidelity is None else fidelity.loss_increase,
            kl=None if fidelity is None else fidelity.kl,
        )


@dataclass(frozen=True)
class Frontier:
    """Points from the largest share to the smallest, and the model as it was.

    Attributes:
        axis: what the shares are of.
        scope: of the whole model, or of what can be rewritten.
        dense: totals of the model as it was.
        calibration_tokens: that the analysis saw.
        tokens: tokens that measured points were measured on; 0 where none was, or the model predicts none.
    """

    axis: Axis
    scope: Scope
    dense: Totals
    unit: str
    points: tuple[Point, ...]
    model: str = ""
    calibration_tokens: int = 0
    tokens: int = 0
    environment: dict[str, str] = field(default_factory=environment)

    __pydantic_config__ = STRICT

    @property
    def is_measured(self) -> bool:
        """Whether the loss of any point was measured."""
        return any(point.loss_increase is not None for point in self.points)

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str | bytes) -> Frontier:
        """Inverse of `to_json`, from the parsed object or its text.

        Raises:
            ArtifactCorruptError: not a frontier; names the field.
        """
        return read_record(_ADAPTER, data, "a frontier", fix="make it anew")

    def save(self, path: str | Path) -> None:
        """Write the JSON text to ``path``."""
        write_file(Path(path), json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")


_ADAPTER: TypeAdapter[Frontier] = TypeAdapter(Frontier)
