"""Exports of fewer bits than the model: weights of 8 bits, and what an exported file loses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geofx.errors import ExportError
from geofx.export.decoder_session import PAST, PRESENT, positions_of
from geofx.export.onnx_runtime import OnnxRunner
from geofx.verify import Fidelity

BLOCK = 32
"""Numbers of a weight's column that share a scale."""
TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}

Measure = Callable[[Path], Fidelity]


@dataclass(frozen=True)
class Variant:
    """How an export differs from the model, and how what it loses is measured.

    Attributes:
        int8: matmuls by constant weights hold these as 8-bit integers, a scale per `BLOCK` of a column, by
            ONNX Runtime's MatMulNBits, which no other runtime knows.
        measure: file -> how far it is from the optimized model; None where nothing is measured.
    """

    int8: bool = False
    measure: Measure | None = None


def in_8_bits(file: Path) -> Any:
    """The `onnx_ir.Model` of ``file`` with the weights of its matmuls as 8-bit integers.

    Source: ONNX Runtime's own weight-only quantizer, to nearest, symmetric. Activations, tables and what
    these are tied to stay as they are.

    Raises:
        ExportError: ONNX Runtime is too old for it, or there is no such matmul.
    """
    import onnx
    import onnx_ir as ir

    try:
        with _logging_kept():
            from onnxruntime.quantization import matmul_nbits_quantizer as nbits
        settings = nbits.DefaultWeightOnlyQuantConfig(
            block_size=BLOCK, is_symmetric=True, accuracy_level=1, bits=8
        )
    except (ImportError, TypeError) as error:
        fix = "install onnxruntime 1.22 or newer, with onnx"
        raise ExportError("ONNX Runtime cannot quantize to 8 bits", fix=fix) from error
    nbits.logger.setLevel(logging.ERROR)
    with _logging_kept():
        quantizer = nbits.MatMulNBitsQuantizer(onnx.load(str(file)), algo_config=settings)
        quantizer.process()
    model = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in model.graph.node):
        raise ExportError("there is no matmul by a constant weight to quantize", where=file.name)
    return ir.from_proto(model)


class OnnxModel:
    """An exported file in the place of a `geofx.program.Program`: inputs by name in, outputs by name out.

    A decoder with its past starts from an empty one; its keys and values are not among the outputs.
    """

    def __init__(self, file: Path) -> None:
        self._runner = OnnxRunner(file)
        self._inputs = {value.name: value for value in self._runner.session.get_inputs()}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs for ``inputs``; a mask, positions and a past that are not given are made."""
        given = {name: self._of_its_type(name, value) for name, value in inputs.items()}
        if "input_ids" in given:
            mask = given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
            positions = positions_of(mask.numpy(force=True), mask.shape[1])
            given.setdefault("position_ids", torch.from_numpy(positions))
        rows = next(len(value) for value in given.values())
        past = {name: self._nothing(name, rows) for name in self._inputs if name.startswith(PAST)}
        found = zip(self._runner.output_names, self._runner({**given, **past}), strict=True)
        return {name: value for name, value in found if not name.startswith(PRESENT)}

    def buffers_kept(self) -> AbstractContextManager[None]:
        """A file has no state of its own."""
        return nullcontext()

    def _of_its_type(self, name: str, value: Tensor) -> Tensor:
        known = self._inputs.get(name)
        return value.to(TYPES.get(known.type, value.dtype)) if known is not None else value

    def _nothing(self, name: str, rows: int) -> Tensor:
        _, heads, _, width = self._inputs[name].shape
        return torch.zeros(rows, heads, 0, width, dtype=TYPES[self._inputs[name].type])


@contextmanager
def _logging_kept() -> Iterator[None]:
    """The quantizer sets the process's logging up as it pleases; what was set is set again."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
