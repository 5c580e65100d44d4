"""A program as an ONNX graph of standard operators."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from geofx.errors import ExportError
from geofx.export.capture import captured, is_tensor
from geofx.export.onnx_weights import store_in_multiplied_order
from geofx.program import Program

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
UNSUPPORTED = frozenset({torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2})
"""Types that ONNX Runtime's CPU kernels cannot multiply, so an export could not be checked."""


def to_onnx_model(program: Program) -> Any:
    """The `onnx_ir.Model` of ``program``: named inputs, outputs and axes; no metadata; nothing folded.

    Raises:
        ExportError: an operator that ONNX cannot express.
    """
    with _quiet():
        model = _convert(captured(program)).model
    _name_inputs_and_outputs(model, program)
    store_in_multiplied_order(model)
    _tidy(model)
    _require_standard(model)
    return model


def require_exportable(program: Program) -> None:
    """Raises ExportError where an input or type cannot be expressed in ONNX, or not be checked."""
    for name, value in program.example.items():
        if not isinstance(value, Tensor):
            fix = "trace with tensor inputs only"
            raise ExportError(f"input {name!r} is a {type(value).__name__}; ONNX takes tensors", fix=fix)
    for name, value in (*program.tensors(), *program.example.items()):
        if value.dtype in UNSUPPORTED:
            fix = "export a float32 or float16 copy: model.float() or model.half()"
            raise ExportError(f"ONNX Runtime has no CPU kernels for {value.dtype}", where=name, fix=fix)


def _convert(exported: ExportedProgram) -> Any:
    try:
        return torch.onnx.export(exported, dynamo=True, optimize=False, verbose=False)
    except Exception as error:
        cause = error.__cause__ or error
        what = f"an operator has no ONNX translation: {type(cause).__name__}: {str(cause)[:300]}"
        raise ExportError(what, fix="lower it to aten operators first") from error


def _name_inputs_and_outputs(model: Any, program: Program) -> None:
    axes: dict[str, str] = {}
    inputs = list(model.graph.inputs)
    for value, name in zip(inputs, program.input_names, strict=True):
        value.name = _plain(name)
        for dim, label in program.dynamic_shapes.get(name, {}).items():
            axes.setdefault(str(value.shape[dim].value), label)
            value.shape[dim] = label
    for value, name in zip(model.graph.outputs, output_names(program), strict=True):
        value.name = name
    for value in model.graph.outputs:
        for dim, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                value.shape[dim] = re.sub(r"\w+", lambda found: axes.get(found[0], found[0]), str(size.value))


def output_names(program: Program) -> list[str]:
    """Names of the tensors that the graph returns, in order: their keys in the output, such as ``logits``."""
    (output,) = program.graph.find_nodes(op="output")
    leaves = pytree.tree_leaves(output.args[0])
    names = _output_paths(program.graph, len(leaves))
    taken = {_plain(name) for name in program.input_names}
    result: list[str] = []
    for leaf, name in zip(leaves, names, strict=True):
        if is_tensor(leaf):
            free = name if name not in taken else f"output_{name}"
            result.append(free if free not in result else f"{free}_{len(result)}")
    return result


def _output_paths(graph: fx.Graph, count: int) -> list[str]:
    info = getattr(graph._codegen, "pytree_info", None)
    numbered = [f"output_{index}" if count > 1 else "output" for index in range(count)]
    if info is None or info.out_spec is None or info.out_spec.num_leaves != count:
        return numbered
    tree = pytree.tree_unflatten(list(range(count)), info.out_spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    keys = [[getattr(key, "key", None) or getattr(key, "name", None) for key in path] for path in paths]
    return [
        _plain("_".join(map(str, key))) if key and all(key) else number
        for key, number in zip(keys, numbered, strict=True)
    ]


def _plain(name: str) -> str:
    return re.sub(r"[^0-9A-Za-z_.]", "_", name)


def _tidy(model: Any) -> None:
    """Dead and repeated nodes out; names made unique; no stack traces, paths or stale shapes kept."""
    import onnx_ir.passes.common as passes
    from onnx_ir.passes import Sequential

    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = value.type = None
    Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.NameFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    )(model)
    model.graph.metadata_props.clear()


def _require_standard(model: Any) -> None:
    foreign = sorted(
        {f"{node.domain}::{node.op_type}" for node in model.graph if node.domain not in STANDARD_DOMAINS}
    )
    if foreign or model.functions:
        names = ", ".join(foreign or map(str, model.functions))
        raise ExportError(
            f"the graph holds operators that are not standard ONNX: {names}", fix="lower them to aten first"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No emoji on stdout and no warnings about optional packages while torch exports."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
