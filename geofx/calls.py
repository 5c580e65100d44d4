"""Programs made ready to be called in the runtime that will run them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geofx.errors import ConfigError, ExportError, first_line
from geofx.export.onnx_graph import require_exportable, to_onnx_model
from geofx.export.onnx_runtime import OnnxRunner, require_onnx
from geofx.fusion import fused
from geofx.program import Program
from geofx.target import Target


def require_runtime(target: Target) -> None:
    """Check that calls by the runtime of ``target`` can be timed here.

    Raises:
        ConfigError: the runtime is timed on the CPU only.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    if target.runtime == "onnxruntime":
        require_onnx()
        if target.device != "cpu":
            raise ConfigError(
                "ONNX Runtime is timed on the CPU only", where=str(target), fix="use device='cpu'"
            )


def ready(program: Program, inputs: Mapping[str, Tensor], target: Target, rows: int) -> Callable[[], Any]:
    """A function that calls ``program`` on ``inputs``, ``rows`` tokens, once, as ``target`` says.

    It ends when the call is done.

    Raises:
        ExportError: the program cannot be compiled or exported.
    """
    if target.runtime == "onnxruntime":
        return loaded(exported(program), inputs)
    there = fused(program, target, rows)
    given = {name: value.to(target.device) for name, value in inputs.items()}
    module: Callable[..., Any] = there.graph_module
    if target.runtime == "compile":
        module = torch.compile(there.graph_module, dynamic=False)

    @torch.no_grad()
    def call() -> Any:
        output = module(**given)
        if target.device == "cuda":
            torch.cuda.synchronize()
        return output

    if target.runtime == "compile":
        try:
            call()
        except Exception as error:  # whatever a compiler on this machine may say
            what = f"torch.compile fails: {first_line(error)[:200]}"
            raise ExportError(what, fix="install a C++ compiler, or use runtime='eager'") from error
    return call


def exported(program: Program) -> Any:
    """The `onnx_ir.Model` of ``program``, not checked as `to_onnx` does.

    Raises:
        ExportError: it has no standard ONNX form.
    """
    require_exportable(program)
    return to_onnx_model(program)


def loaded(model: Any, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    """A function that runs ``model`` once in ONNX Runtime; its file is gone as soon as it is loaded."""
    import onnx_ir as ir

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "program.onnx"
        ir.save(model, file, external_data="program.data", size_threshold_bytes=0)
        runner = OnnxRunner(file)
    arrays = {name: inputs[name].numpy(force=True) for name in runner.input_names if name in inputs}
    return lambda: runner.session.run(None, arrays)
