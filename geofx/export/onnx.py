"""ONNX export: written aside, checked, run in ONNX Runtime at several shapes, weighed, then published."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from geofx.errors import VerificationError
from geofx.export.cases import make_cases, require_equal, shortened
from geofx.export.onnx_file import OnnxReport, published
from geofx.export.onnx_graph import require_exportable
from geofx.export.onnx_runtime import OnnxRunner, require_onnx
from geofx.export.onnx_variants import Variant
from geofx.export.staging import target_file
from geofx.program import Program, flat_tensors

logger = logging.getLogger(__name__)


def to_onnx(
    program: Program, path: str | Path, *, rtol: float | None = None, variant: Variant | None = None
) -> OnnxReport:
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
    example = shortened(partial(_outputs, program), program.example, program.dynamic_shapes)
    program = replace(program, example=example)
    return published(
        program, target, lambda file: _require_same(program, file, rtol), start, variant or Variant()
    )


def _outputs(program: Program, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
    return flat_tensors(program(**inputs))


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
