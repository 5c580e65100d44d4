"""TorchScript export (legacy): traced from the eager module, checked without geofx, then published."""

from __future__ import annotations

import inspect
import io
import logging
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from geofx.errors import ExportError
from geofx.export.alone import run_alone
from geofx.export.cases import Axes, Compared, make_cases, shortened
from geofx.export.staging import staging, target_file
from geofx.program import flat_tensors
from geofx.trace import evaluating

logger = logging.getLogger(__name__)

UNSUPPORTED_PYTHON = (3, 14)


@dataclass(frozen=True)
class TorchScriptReport(Compared):
    """What was published and how it was checked.

    Attributes:
        path: the file; load it with `torch.jit.load`, call it with positional inputs.
        input_names: order of those inputs.
        size_bytes: on disk.
        differences: largest difference from the eager module on valid positions, at each shape.
        seconds: wall-clock time of the whole export.
    """

    path: Path
    input_names: tuple[str, ...]
    size_bytes: int
    differences: Mapping[str, float]
    seconds: float


class _Positional(nn.Module):
    """The module with inputs by position and the tensors of its output, as TorchScript wants it."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)
        known = inspect.signature(module.forward).parameters
        self.constants = {name: False for name in ("use_cache", "return_dict") if name in known}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        output = self.module(**dict(zip(self.names, inputs, strict=True)), **self.constants)
        tensors = tuple(flat_tensors(output))
        return tensors[0] if len(tensors) == 1 else tensors


def to_torchscript(
    module: nn.Module,
    example: Mapping[str, Tensor],
    path: str | Path,
    *,
    dynamic_shapes: Axes | None = None,
    rtol: float | None = None,
) -> TorchScriptReport:
    """Publish ``module``, traced in evaluation mode, as ``path`` (``.pt``): inputs by position, tensors out.

    Args:
        module: an eager module such as `factorize_module` returns; its modes are left as they are.
        example: inputs by name, batch >= 2, sequence >= 2, a padded row.
        path: where to publish.
        dynamic_shapes: axes that may vary, by input; None: the batch, and the sequence of token inputs.
        rtol: largest difference as a share of the largest output; None: by the output's type.

    Raises:
        ExportError: the module cannot be traced or loaded without geofx.
        VerificationError: the file does not do what the module does; nothing is published.
    """
    start = time.perf_counter()
    target = target_file(path, ".pt")
    if sys.version_info >= UNSUPPORTED_PYTHON:
        logger.warning("PyTorch supports TorchScript on Python below 3.14 only, it may break: export ONNX")
    positional = _Positional(module, tuple(example))

    def run(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return flat_tensors(positional(*inputs.values()))

    size = sum(value.nbytes for value in module.state_dict().values())
    with evaluating(module), staging(target, 2 * size) as folder:
        axes = _token_axes(example) if dynamic_shapes is None else dynamic_shapes
        example = shortened(run, example, axes)
        staged = _trace(positional, example, folder / target.name)
        cases = list(make_cases(run, example, axes))
        differences = run_alone(staged, cases, rtol)
        size = staged.stat().st_size
        staged.replace(target)
    logger.info("%s: largest difference %.2g", target.name, max(differences.values()))
    return TorchScriptReport(target, tuple(example), size, differences, time.perf_counter() - start)


def _trace(positional: _Positional, example: Mapping[str, Tensor], file: Path) -> Path:
    buffer = io.BytesIO()  # torch.jit.save to a path aborts the process when the disk is full
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, and sizes that are constants warn
            traced = torch.jit.trace(positional, tuple(example.values()), check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, buffer)
    except Exception as error:
        fix = "TorchScript is legacy: export ONNX instead"
        raise ExportError(f"torch.jit cannot trace the module: {str(error)[:300]}", fix=fix) from error
    file.write_bytes(buffer.getbuffer())
    return file


def _token_axes(example: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    tokens = {name for name, value in example.items() if value.dim() == 2 and not value.is_floating_point()}
    return {name: {0: "batch"} | ({1: "sequence"} if name in tokens else {}) for name in example}
