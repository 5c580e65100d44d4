"""An ONNX model as files: written with its data beside it, weighed, published by one rename."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geofx.errors import ExportError, VerificationError
from geofx.export.onnx_runtime import optimized_weight_bytes

MAX_GROWTH = 1.05
"""Most that ONNX Runtime's optimized graph may weigh, relative to the plan; more means folded factors."""

INLINE_LIMIT = 1024
"""Tensors below this many bytes stay in the model file; all others are external data, so 2 GB is no limit."""


@dataclass(frozen=True)
class OnnxReport:
    """What was published and how it was checked.

    Attributes:
        path: the model file.
        size_bytes: on disk, external data included.
        planned_bytes: tensors that the program reads.
        optimized_bytes: weights in the graph that ONNX Runtime has optimized.
        differences: largest difference from the program on valid positions, at each shape.
        seconds: wall-clock time of the whole export.
    """

    path: Path
    size_bytes: int
    planned_bytes: int
    optimized_bytes: int
    differences: Mapping[str, float]
    seconds: float

    @property
    def max_difference(self) -> float:
        """The largest difference over all shapes."""
        return max(self.differences.values())


def write_model(model: Any, file: Path) -> list[Path]:
    """The model file and its data file, which is named by content.

    Raises:
        ExportError: the ONNX checker refuses the graph.
    """
    import onnx
    import onnx_ir as ir

    digest = hashlib.sha256()
    for value in model.graph.initializers.values():
        digest.update(value.const_value.tobytes())
    data = file.with_name(f"{file.name}.{digest.hexdigest()[:16]}.data")
    ir.save(model, file, external_data=data.name, size_threshold_bytes=INLINE_LIMIT)
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses the graph: {str(error)[:300]}") from error
    return [file, data] if data.exists() and data.stat().st_size else [file]


def require_unfolded(file: Path, planned: int) -> int:
    """Bytes of the weights that ONNX Runtime keeps, which are not to be much more than ``planned``.

    Raises:
        VerificationError: they are: factors were multiplied with one another.
    """
    optimized = optimized_weight_bytes(file)
    if optimized > MAX_GROWTH * planned:
        raise VerificationError(
            f"optimized by ONNX Runtime the graph weighs {optimized} bytes, planned {planned}: folded",
            where=file.name,
            fix="keep factors as separate products of the activations; nothing was published",
        )
    return optimized


def publish(staged: list[Path], target: Path) -> None:
    """Move the staged files to ``target``, the model last; data of models that were there go."""
    model, *data = staged
    for file in data:
        file.replace(target.with_name(file.name))
    model.replace(target)
    ours = re.compile(re.escape(target.name) + r"\.[0-9a-f]{16}\.data")
    for file in target.parent.iterdir():
        if ours.fullmatch(file.name) and file.name not in {kept.name for kept in data}:
            file.unlink()
