"""ONNX export: written aside, checked, run in ONNX Runtime at several shapes, weighed, then published."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from geofx.errors import ExportError, VerificationError
from geofx.export.cases import make_cases, require_equal, shortened
from geofx.export.onnx_graph import require_exportable, to_onnx_model
from geofx.export.onnx_runtime import OnnxRunner, optimized_weight_bytes, require_onnx
from geofx.export.staging import staging, target_file
from geofx.program import Program, flat_tensors

logger = logging.getLogger(__name__)

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


def to_onnx(program: Program, path: str | Path, *, rtol: float | None = None) -> OnnxReport:
    """Publish ``program`` as ``path`` (``.onnx``) plus ``<name>.<hash>.data`` beside it.

    Outputs may differ from the program's by ``rtol`` times the largest output (None: by the output's
    type). The model file names its data by content and is replaced last, so a reader never sees a mixture.

    Raises:
        MissingDependencyError: the ``onnx`` extra is not installed.
        ExportError: the program has no standard ONNX form.
        VerificationError: the file does not do what the program does, or weighs more; nothing is published.
    """
    require_onnx()
    start = time.perf_counter()
    target = target_file(path, ".onnx")
    require_exportable(program)
    planned = program.size_bytes()
    example = shortened(partial(_outputs, program), program.example, program.dynamic_shapes)
    program = replace(program, example=example)
    with staging(target, 2 * planned) as folder:
        staged = _write(to_onnx_model(program), folder / target.name)
        optimized = _require_unfolded(staged[0], planned)
        differences = _require_same(program, staged[0], rtol)
        size = sum(file.stat().st_size for file in staged)
        _publish(staged, target)
    return OnnxReport(target, size, planned, optimized, differences, time.perf_counter() - start)


def _outputs(program: Program, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return flat_tensors(program(**inputs))


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
    optimized = optimized_weight_bytes(file)
    if optimized > MAX_GROWTH * planned:
        raise VerificationError(
            f"optimized by ONNX Runtime the graph weighs {optimized} bytes, planned {planned}: folded",
            where=file.name,
            fix="keep factors as separate products of the activations; nothing was published",
        )
    return optimized


def _require_same(program: Program, file: Path, rtol: float | None) -> dict[str, float]:
    runner = OnnxRunner(file)
    differences: dict[str, float] = {}
    for case in make_cases(partial(_outputs, program), program.example, program.dynamic_shapes):
        try:
            actual = runner(dict(zip(runner.input_names, case.inputs.values(), strict=True)))
        except Exception as error:
            what = f"ONNX Runtime fails: {str(error)[:300]}"
            raise VerificationError(what, where=case.label, fix="nothing was published") from error
        differences[case.label] = require_equal(case, actual, rtol, runner.output_names)
        logger.info("%s at %s: largest difference %.2g", file.name, case.label, differences[case.label])
    return differences


def _publish(staged: list[Path], target: Path) -> None:
    model, *data = staged
    for file in data:
        file.replace(target.with_name(file.name))
    model.replace(target)
    ours = re.compile(re.escape(target.name) + r"\.[0-9a-f]{16}\.data")
    for file in target.parent.iterdir():
        if ours.fullmatch(file.name) and file.name not in {kept.name for kept in data}:
            file.unlink()
