"""Run an ONNX file in ONNX Runtime on the CPU, and weigh the graph that it makes of the file."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geofx.errors import ExportError, MissingDependencyError

LEVELS = ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED")
SCALAR_LIMIT = 16
"""Initializers of at most this many numbers are shapes and scalars that came of folding, not weights."""


def require_onnx() -> None:
    """Raises MissingDependencyError unless the packages of the ``onnx`` extra are there."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingDependencyError(f"{package} is not installed", fix='run: pip install "geofx[onnx]"')


class OnnxRunner:
    """An ONNX Runtime session: tensors by input name in, tensors in output order out.

    Args:
        path: the model file; its external data lies beside it.
        threads: threads per operator; 0 leaves the choice to ONNX Runtime.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        ExportError: it cannot load the file.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        require_onnx()
        options = _options()
        options.intra_op_num_threads = threads
        self.session = _session(Path(path).resolve(), options)  # data lies beside the file, not its link
        self.input_names = tuple(value.name for value in self.session.get_inputs())
        self.output_names = tuple(value.name for value in self.session.get_outputs())

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Outputs for ``inputs``; inputs that the file does not have are left out."""
        arrays = {name: inputs[name].numpy(force=True) for name in self.input_names}
        return [torch.from_numpy(array) for array in self.session.run(None, arrays)]


def optimized_weight_bytes(path: Path) -> int:
    """Bytes of weights in the graph that ONNX Runtime has optimized, the larger of its portable levels."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        return max(_optimized_bytes(path, Path(folder), level) for level in LEVELS)


def _optimized_bytes(path: Path, folder: Path, level: str) -> int:
    import onnx
    import onnxruntime

    options = _options()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    data = folder / "optimized.data"
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data.name)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
    )
    _session(path, options)
    graph = onnx.load(str(folder / "optimized.onnx"), load_external_data=False).graph
    data.unlink(missing_ok=True)
    tensors = [*graph.initializer, *(a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute)]
    weights = [tensor for tensor in tensors if math.prod(tensor.dims) > SCALAR_LIMIT]
    return sum(_bytes(tensor) for tensor in weights)


def _bytes(tensor: Any) -> int:
    import onnx

    return int(math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _options() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def _session(path: Path, options: Any) -> Any:
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        providers = ", ".join(onnxruntime.get_available_providers())
        raise ExportError(
            f"ONNX Runtime cannot load the model: {str(error)[:300]}",
            where=f"{path.name}; onnxruntime {onnxruntime.__version__}, providers {providers}",
            fix="update onnxruntime, or export a float32 copy if it lacks a kernel",
        ) from error
