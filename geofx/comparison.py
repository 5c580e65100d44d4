"""Formats and recipes side by side at equal bytes: what each keeps, costs and loses on one model and data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter

from geofx.environment import environment
from geofx.folder import write_file
from geofx.method import Allocation
from geofx.record_file import read_record

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Role = Literal["format", "recipe"]
Scope = Literal["blocks", "embedding", "blocks and embedding"]
Engine = Literal["torch", "onnx"]


@dataclass(frozen=True)
class Latency:
    """Median seconds of one call, and of one of the original model in turns with it."""

    seconds: float
    original_s: float

    __pydantic_config__ = STRICT

    @property
    def ratio(self) -> float:
        """Below 1 is faster than the original."""
        return self.seconds / self.original_s


@dataclass(frozen=True)
class Figures:
    """What was measured of one rewritten model, or of the original.

    Attributes:
        size_bytes: of all weights, tied ones once, indices included.
        parameters: floating-point numbers stored.
        linear_parameters: those of the weights in the row's scope.
        flops_per_token: a multiply-add is 2.
        compression_ratio: CR = (s(v) - s(ṽ)) / s(ṽ), s counting what is not zero.
        parameter_mae: FDL = mean |v - v̂| over all parameters.
        predicted_loss: Σ tr(G ΔW A ΔWᵀ) of what was fitted, in the comparison's ``unit``.
        loss_increase: in its ``measured_unit``, on held-out batches; of a form that computes more than the
            weights, on the weights that it multiplies out to: the same but for rounding, and takes less time.
        loss: of the rewritten model on them; None where the loss is a difference itself.
        kl: mean KL(original ‖ rewritten) of the next token, in nats; None without tokens.
        fit_s: seconds that its fits took, summed over regions; spectra that the analysis holds are not in it.
        latency: engine -> medians.
        untimed: engine -> why it cannot run the model, so that it is not tried again.
    """

    size_bytes: int
    parameters: int
    linear_parameters: int
    flops_per_token: float
    compression_ratio: float = 0.0
    parameter_mae: float = 0.0
    predicted_loss: float = 0.0
    loss_increase: float | None = None
    loss: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    fit_s: float = 0.0
    latency: dict[Engine, Latency] = field(default_factory=dict)
    untimed: dict[Engine, str] = field(default_factory=dict)

    __pydantic_config__ = STRICT

    @property
    def tried(self) -> set[Engine]:
        """Engines whose latency is known, or known not to be had."""
        return {*self.latency, *self.untimed}


@dataclass(frozen=True)
class Row:
    """One method at one share.

    Attributes:
        keep: share of the scope's bytes that was allowed.
        kept: share that the rewritten weights take; None where there is no model.
        rewritten: number of regions that were rewritten.
        figures: None where the method has no model at this share; `notes` say why.
        notes: reasons, each with the number of regions that it concerns.
    """

    name: str
    role: Role
    allocation: Allocation
    scope: Scope
    keep: float
    kept: float | None = None
    rewritten: int = 0
    figures: Figures | None = None
    notes: tuple[str, ...] = ()

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Comparison:
    """The rows, and what they were measured on.

    Attributes:
        model: what was compressed, without any path.
        original: the figures of the model as it was.
        unit: of predicted losses.
        tokens: loss terms in the held-out batches.
        calibration_tokens: tokens that the methods were fitted on.
        methods: "format <name>" or "recipe <name>" -> the method as data, a recipe's paper among it.
        measured_unit: of measured losses; empty where it is the unit of predicted ones.
    """

    model: str
    original: Figures
    unit: str
    tokens: int
    calibration_tokens: int
    rows: tuple[Row, ...] = ()
    methods: dict[str, Any] = field(default_factory=dict)
    measured_unit: str = ""
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=environment)

    __pydantic_config__ = STRICT

    def to_json(self) -> dict[str, Any]:
        """JSON types; a figure that is not finite becomes null."""
        return {key: finite(value) for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str | bytes) -> Comparison:
        """Inverse of `to_json`, from the parsed object or its text.

        Raises:
            ArtifactCorruptError: not a comparison; names the field.
        """
        return read_record(_ADAPTER, data, "a comparison", fix="compare anew")

    def save(self, path: str | Path) -> None:
        """Write the JSON text to ``path``."""
        write_file(Path(path), json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")


_ADAPTER: TypeAdapter[Comparison] = TypeAdapter(Comparison)


def finite(value: Any) -> Any:
    """``value`` as JSON types, null for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
