"""Medians of a rewritten program and of the original, in turns, in torch and in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from geofx.bench_inputs import bench_inputs
from geofx.comparison import Engine, Latency
from geofx.errors import GeofxError, MissingDependencyError
from geofx.export.onnx import to_onnx
from geofx.export.onnx_runtime import OnnxRunner, require_onnx
from geofx.latency import interleaved_medians
from geofx.program import Program
from geofx.progress import Progress, log_progress


@dataclass
class Stopwatch:
    """Times programs against ``original``, whose ONNX export it makes once."""

    original: Program
    folder: Path
    rounds: int
    progress: Progress = log_progress

    def __call__(
        self, program: Program, engines: Iterable[Engine]
    ) -> tuple[dict[Engine, Latency], dict[Engine, GeofxError]]:
        """The medians by engine, and why an engine has none."""
        found: dict[Engine, Latency] = {}
        failed: dict[Engine, GeofxError] = {}
        for engine in engines:
            try:
                found[engine] = self._torch(program) if engine == "torch" else self._onnx(program)
            except GeofxError as error:
                failed[engine] = error
        return found, failed

    def _torch(self, program: Program) -> Latency:
        return self._timed(lambda: self.original(**self._inputs), lambda: program(**self._inputs))

    def _onnx(self, program: Program) -> Latency:
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
            to_onnx(program, Path(folder) / "row.onnx")
            runner = OnnxRunner(Path(folder) / "row.onnx")
            return self._timed(lambda: self._exported(self._inputs), lambda: runner(self._inputs))

    def _timed(self, original: Callable[[], object], rewritten: Callable[[], object]) -> Latency:
        calls = {"original": original, "rewritten": rewritten}
        with torch.no_grad():
            seconds = interleaved_medians(calls, self.rounds, self.progress)
        return Latency(seconds["rewritten"], seconds["original"])

    @cached_property
    def _inputs(self) -> dict[str, Tensor]:
        return bench_inputs(self.original, None, None)

    @cached_property
    def _exported(self) -> OnnxRunner:
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
            to_onnx(self.original, Path(folder) / "original.onnx")
            return OnnxRunner(Path(folder) / "original.onnx")


def not_installed(engines: Iterable[Engine]) -> dict[Engine, str]:
    """Those among ``engines`` whose packages are missing, and which."""
    if "onnx" in engines:
        try:
            require_onnx()
        except MissingDependencyError as error:
            return {"onnx": error.what}
    return {}
