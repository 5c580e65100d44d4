"""What an optimization did, as figures: nothing that was decided or measured is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from geofx.environment import environment
from geofx.errors import ArtifactCorruptError
from geofx.frontier import Frontier
from geofx.graph_block import Block
from geofx.record_file import read_record

MAX_JSON_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Measured:
    """The figures of one model; None where a figure was not taken.

    Attributes:
        size_bytes: bytes of all tensors in memory, tied weights once; what a size budget counts.
        parameters: floating-point numbers of the whole model, tied weights once.
        linear_parameters: those of the matmuls that can be factorized.
        flops_per_token: of the matmuls; a multiply-add is 2.
        loss: mean loss on the held-out batches, in nats per token where the model predicts tokens.
        latency_torch_s: median seconds of one call in torch.
        latency_onnx_s: median seconds of one call in ONNX Runtime.
        onnx_bytes: bytes of the exported ONNX files.
        disk_bytes: bytes of the safetensors file that `save` writes, for the original as for the result.
    """

    size_bytes: int | None = None
    parameters: int | None = None
    linear_parameters: int | None = None
    flops_per_token: float | None = None
    loss: float | None = None
    latency_torch_s: float | None = None
    latency_onnx_s: float | None = None
    onnx_bytes: int | None = None
    disk_bytes: int | None = None

    @property
    def perplexity(self) -> float | None:
        """exp(loss), where the loss is small enough for that to mean something."""
        return math.exp(self.loss) if self.loss is not None and self.loss < 100.0 else None


@dataclass(frozen=True)
class Stage:
    """Time of one stage and the highest memory of the process until its end."""

    name: str
    seconds: float
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Timing:
    """Original and optimized in turns on one target.

    Attributes:
        target: in words; ``weight`` is that of its seconds beside those of others.
        original_s: median of one call, and ``optimized_s``.
        ratio: median of the ratios of neighbouring calls.
        rounds: how many of each.
    """

    target: str
    weight: float
    original_s: float
    optimized_s: float
    ratio: float
    rounds: int


@dataclass(frozen=True)
class CalibrationCard:
    """What the statistics were taken from."""

    mode: str
    unit: str
    tokens: int = 0
    loss_terms: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RegionRow:
    """What was chosen for one region, and what was not.

    Attributes:
        kept_ratio: numbers stored afterwards / before.
        loss: predicted increase, in the calibration card's unit.
        refused: ``"REASON: detail"`` of every option that was not proposed or not taken.
        sensitivity: predicted loss of removing the region altogether.
        effective_rank: exp of the entropy of the weighted singular values.
        rank_99: least rank that keeps 99 % of the weighted energy.
        spectrum: σ_i², descending; may be thinned out or empty.
        subspaces: how many the form has, and which, in words.
        transformations: what happens among them, in order, in words.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    factorization: str
    rank: int | None = None
    kept_ratio: float = 1.0
    loss: float | None = None
    refused: tuple[str, ...] = ()
    sensitivity: float | None = None
    effective_rank: float | None = None
    rank_99: int | None = None
    spectrum: tuple[float, ...] = ()
    subspaces: str = ""
    transformations: str = ""


@dataclass(frozen=True)
class Report:
    """Original against optimized, what was asked, predicted and measured, region by region.

    Attributes:
        model: what was optimized, without any path.
        budget: what was asked, in words.
        counting: the rule by which the budget was counted, in words.
        predicted_loss: sum over regions, in the calibration card's unit.
        fidelity: figures of `geofx.verify.Fidelity` by name, and their ``unit``.
        notes: fallbacks and warnings that a reader should know of.
        frontier: the least predicted loss at several sizes.
        block: a layer before and after, to be drawn.
        timings: of each target of a budget for the latency, and ``predicted_latency_ratio``, of their sum.
        recovery: of a training after the rewrite, the step, the training and the validation loss at each
            validation.
    """

    model: str
    budget: str
    counting: str
    original: Measured
    optimized: Measured
    predicted_loss: float | None = None
    fidelity: Mapping[str, float | int | str | None] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    calibration: CalibrationCard | None = None
    regions: tuple[RegionRow, ...] = ()
    environment: Mapping[str, str] = field(default_factory=environment)
    notes: tuple[str, ...] = ()
    recovery: tuple[Mapping[str, float], ...] = ()
    timings: tuple[Timing, ...] = ()
    predicted_latency_ratio: float | None = None
    frontier: Frontier | None = None
    block: Block | None = None

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @property
    def measured_loss(self) -> float | None:
        """Increase of the loss on the held-out batches."""
        return self.figure("loss_increase")

    def figure(self, name: str) -> float | None:
        """One number of ``fidelity``; None where it was not taken."""
        value = self.fidelity.get(name)
        return None if isinstance(value, str) else value

    def with_measured(self, *, original: Mapping[str, Any], optimized: Mapping[str, Any]) -> Report:
        """The same report with further figures, by the names of `Measured`."""
        return replace(
            self, original=replace(self.original, **original), optimized=replace(self.optimized, **optimized)
        )

    def after_recovery(self, fidelity: Any, history: Iterable[Mapping[str, float]]) -> Report:
        """The report with what was measured after a training, on what, and how that went."""
        return replace(
            self.with_measured(
                original={"loss": fidelity.loss_original}, optimized={"loss": fidelity.loss_optimized}
            ),
            fidelity=asdict(fidelity),
            notes=tuple(
                dict.fromkeys((*self.notes, f"after the recovery it was measured on {fidelity.data}"))
            ),
            recovery=(*self.recovery, *history),
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON types; a figure that is not finite becomes null."""
        return {key: _finite(value) for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str | bytes, where: str = "report") -> Report:
        """Inverse of `to_json`, from the parsed object or its text.

        Raises:
            ArtifactCorruptError: not a report; names the field.
        """
        text = data if isinstance(data, str | bytes) else json.dumps(data)
        if len(text) > MAX_JSON_BYTES:
            raise ArtifactCorruptError(f"a report of {len(text)} bytes", where=where, fix="make it anew")
        return read_record(TypeAdapter(cls), text, "a report", where=where, fix="make it anew")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
