"""A program captured by `torch.export` again: what ONNX and .pt2 files are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from geofx.errors import ExportError
from geofx.program import Program


def captured(program: Program) -> ExportedProgram:
    """``program`` as an `ExportedProgram`: inputs by position, tensors out, dynamic axes dynamic.

    Raises:
        ExportError: it cannot be captured, or an axis was fixed.
    """
    module = program.clone().graph_module
    module.graph.set_codegen(CodeGen())  # flat in, flat out: run_decompositions needs it
    _keep_tensor_outputs(module.graph)
    module.recompile()
    inputs = tuple(
        program.example[name].detach().clone() for name in program.input_names
    )  # a view leaves guards
    dynamic = tuple(
        dict.fromkeys(program.dynamic_shapes.get(name, {}), Dim.AUTO) for name in program.input_names
    )
    try:
        with torch.no_grad():
            exported = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise ExportError(
            f"the rewritten graph cannot be captured again: {error}", fix="report this as a bug"
        ) from error
    _require_dynamic(exported, program)
    return exported


def _keep_tensor_outputs(graph: fx.Graph) -> None:
    (output,) = graph.find_nodes(op="output")
    leaves = pytree.tree_leaves(output.args[0])
    output.args = (tuple(leaf for leaf in leaves if is_tensor(leaf)),)


def is_tensor(leaf: Any) -> bool:
    """Whether an output of the graph is a tensor."""
    return isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val", torch.empty(0)), Tensor)


def _require_dynamic(exported: ExportedProgram, program: Program) -> None:
    nodes = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    for name, node_name in zip(program.input_names, exported.graph_signature.user_inputs, strict=True):
        shape = nodes[str(node_name)].meta["val"].shape
        for dim, label in program.dynamic_shapes.get(name, {}).items():
            if isinstance(shape[dim], int):
                fix = "trace again with a longer example of at least 2 rows"
                raise ExportError(
                    f"dimension {label!r} was fixed to {shape[dim]} on capture", where=name, fix=fix
                )
