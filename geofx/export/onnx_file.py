"""A program as ONNX files: written with its data beside it, weighed, checked, published by renames."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geofx.errors import ExportError, VerificationError
from geofx.export.cases import Compared
from geofx.export.onnx_graph import to_onnx_model
from geofx.export.onnx_runtime import optimized_weight_bytes
from geofx.export.onnx_variants import Variant, in_8_bits
from geofx.export.staging import staging
from geofx.program import Program
from geofx.verify import Fidelity

MAX_GROWTH = 1.05
"""Most that ONNX Runtime's optimized graph may weigh, relative to the plan; more means folded factors."""

INLINE_LIMIT = 1024
"""Tensors below this many bytes stay in the model file; all others are external data, so 2 GB is no limit."""


@dataclass(frozen=True)
class OnnxReport(Compared):
    """What was published and how it was checked.

    Attributes:
        path: the model file.
        size_bytes: on disk, external data included.
        planned_bytes: tensors that the program reads.
        optimized_bytes: weights in the graph that ONNX Runtime has optimized.
        fidelity: how far the file is from the optimized model, where that was measured.
        differences: largest difference from the program on valid positions, at each shape.
        seconds: wall-clock time of the whole export.
    """

    path: Path
    size_bytes: int
    planned_bytes: int
    optimized_bytes: int
    differences: Mapping[str, float]
    fidelity: Fidelity | None
    seconds: float


def published(
    program: Program,
    target: Path,
    check: Callable[[Path], Mapping[str, float]],
    start: float,
    variant: Variant,
    beside: Mapping[str, bytes] | None = None,
) -> OnnxReport:
    """Write ``program`` aside, weigh it, and move it to ``target`` once ``check`` has nothing against it.

    Args:
        program: what `geofx.export.onnx_graph.require_exportable` takes.
        target: the model file.
        check: the staged file -> its largest differences, by what was compared.
        start: when the export began, of `time.perf_counter`.
        variant: what becomes of the file that was checked.
        beside: further files for the folder, by name; they are there before the model is.

    Raises:
        ExportError: an operator that ONNX cannot express, or the checker refuses the graph.
        VerificationError: it weighs more than planned, or ``check`` raises it; nothing is published.
        ResourceError: the disk is too small.
    """
    planned = program.size_bytes()
    with staging(target, 2 * planned) as folder:
        staged = _write(to_onnx_model(program), folder / target.name)
        optimized = _require_unfolded(staged[0], planned)
        differences = check(staged[0])
        if variant.int8:
            (folder / "int8").mkdir()
            staged = _write(in_8_bits(staged[0]), folder / "int8" / target.name)
        fidelity = None if variant.measure is None else variant.measure(staged[0])
        size = sum(file.stat().st_size for file in staged)
        others = [folder / name for name in beside or {}]
        for file, content in zip(others, (beside or {}).values(), strict=True):
            file.write_bytes(content)
        _publish([*others, *staged[1:]], staged[0], target)
    return OnnxReport(target, size, planned, optimized, differences, fidelity, time.perf_counter() - start)


def _write(model: Any, file: Path) -> list[Path]:
    """The model file and its data file, which is named by content."""
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


def _require_unfolded(file: Path, planned: int) -> int:
    """Bytes of the weights that ONNX Runtime keeps, which are not to be much more than ``planned``."""
    optimized = optimized_weight_bytes(file)
    if optimized > MAX_GROWTH * planned:
        raise VerificationError(
            f"optimized by ONNX Runtime the graph weighs {optimized} bytes, planned {planned}: folded",
            where=file.name,
            fix="keep factors as separate products of the activations; nothing was published",
        )
    return optimized


def data_files(target: Path) -> set[str]:
    """Names of the data files of exports to ``target`` in its folder."""
    ours = re.compile(re.escape(target.name) + r"\.[0-9a-f]{16}\.data")
    return {file.name for file in target.parent.iterdir() if ours.fullmatch(file.name)}


def _publish(others: list[Path], model: Path, target: Path) -> None:
    """Move the staged files to ``target``'s folder, the model last; data of models that were there go."""
    for file in others:
        file.replace(target.with_name(file.name))
    model.replace(target)
    for name in data_files(target) - {file.name for file in others}:
        target.with_name(name).unlink()
