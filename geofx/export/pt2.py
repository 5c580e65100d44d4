"""`torch.export` archives (.pt2): the graph itself, checked in a process of its own, then published."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._inductor
from torch import Tensor
from torch.export import ExportedProgram

from geofx.errors import ExportError, first_line
from geofx.export.alone import run_alone
from geofx.export.capture import captured
from geofx.export.cases import Compared, make_cases, shortened
from geofx.export.staging import staging, target_file
from geofx.program import Program, flat_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pt2Report(Compared):
    """What was published and how it was checked.

    Attributes:
        path: the file; load it with ``torch.export.load(path).module()``, or a compiled one with
            ``torch._inductor.aoti_load_package(path)``, and call it with positional inputs.
        input_names: order of those inputs.
        size_bytes: on disk.
        operations: those of geofx that it holds; where there are some, ``import geofx.ops`` before loading.
        differences: largest difference from ``program`` on valid positions, at each shape.
        seconds: wall-clock time of the whole export.
    """

    path: Path
    input_names: tuple[str, ...]
    size_bytes: int
    operations: tuple[str, ...]
    differences: Mapping[str, float]
    seconds: float


def to_pt2(
    program: Program, path: str | Path, *, rtol: float | None = None, compiled: bool = False
) -> Pt2Report:
    """Publish ``program`` as ``path`` (``.pt2``): inputs by position, tensors out.

    Operations of geofx stay what they are; a program without them opens where geofx is not installed.

    Args:
        program: a rewritten graph, fused or not.
        path: where to publish.
        rtol: largest difference as a share of the largest output; None: by the output's type.
        compiled: by AOTInductor, for ``torch._inductor.aoti_load_package``, here and on computers like this.

    Raises:
        ExportError: the program cannot be captured, or does not compile.
        VerificationError: the file does not do what the program does; nothing is published.
    """
    start, target = time.perf_counter(), target_file(path, ".pt2")
    for name, value in program.example.items():
        if not isinstance(value, Tensor):
            what = f"input {name!r} is a {type(value).__name__}; an archive takes tensors"
            raise ExportError(what, fix="trace with tensor inputs only")
    operations = sorted({str(node.target) for node in program.graph.nodes if _is_fused(node.target)})

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return flat_tensors(program(**inputs))

    with staging(target, 2 * program.size_bytes()) as folder:
        exported = captured(program)
        staged = folder / target.name
        (_compile if compiled else _save)(exported, staged)
        axes = program.dynamic_shapes
        cases = list(make_cases(run, shortened(run, program.example, axes), axes))
        differences = run_alone(staged, cases, rtol, with_geofx=bool(operations))
        size = staged.stat().st_size
        staged.replace(target)
    logger.info("%s: largest difference %.2g", target.name, max(differences.values()))
    seconds = time.perf_counter() - start
    return Pt2Report(target, program.input_names, size, tuple(operations), differences, seconds)


def _save(exported: ExportedProgram, file: Path) -> None:
    exported._example_inputs = None  # torch would store them in a pickle
    buffer = io.BytesIO()  # to a path, torch aborts the process when the disk is full
    torch.export.save(exported, buffer)
    file.write_bytes(buffer.getbuffer())


def _compile(exported: ExportedProgram, file: Path) -> None:
    try:
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(exported, package_path=str(file))
    except Exception as error:
        what = f"AOTInductor does not compile the graph: {first_line(error)[:300]}"
        raise ExportError(what, fix="install a C++ compiler, or export without compiling") from error


def _is_fused(operation: object) -> bool:
    return str(getattr(operation, "namespace", "")) == "geofx"
