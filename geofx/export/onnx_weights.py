"""Weights of an ONNX graph, each stored once and in the order in which it is multiplied."""

from __future__ import annotations

from typing import Any


def store_in_multiplied_order(model: Any) -> None:
    """Replace each Transpose of a weight by a weight stored transposed, or by Gemm where W is used both ways.

    Left to ONNX Runtime, a tied embedding would be folded into two copies, W and Wᵀ.
    """
    partner: dict[Any, Any] = {}
    for node in list(model.graph):
        if not _transposes_weight(node, partner):
            continue
        (source,) = node.inputs
        if source not in partner:
            partner[source] = _transposed(source)
            partner[partner[source]] = source
        node.outputs[0].replace_all_uses_with(partner[source])
        model.graph.remove(node, safe=True)
    for value in list(partner):
        if value.is_initializer():
            _choose_order(model.graph, value, partner[value])


def _transposes_weight(node: Any, known: dict[Any, Any]) -> bool:
    if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
        return False
    (source,) = node.inputs
    constant = source.const_value if source.is_initializer() or source in known else None
    return constant is not None and tuple(node.attributes["perm"].as_ints()) == (1, 0)


def _transposed(value: Any) -> Any:
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    tensor = TorchTensor(value.const_value.raw.t(), name=f"{value.name}.T")
    return ir.Value(
        name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def _choose_order(graph: Any, stored: Any, flipped: Any) -> None:
    if stored.uses() or stored.is_graph_output():
        for node, index in list(flipped.uses()):
            if node.op_type == "MatMul" and index == 1:
                _multiply_by_transpose(graph, node, stored)
    if flipped.uses():
        graph.register_initializer(flipped)


def _multiply_by_transpose(graph: Any, node: Any, weight: Any) -> None:
    """MatMul(x, Wᵀ) -> Gemm(x as a matrix, W, transB), so that W serves as it is stored."""
    import onnx_ir as ir

    x, (rows, columns) = node.inputs[0], weight.const_value.shape.numpy()
    tape = ir.tape.Tape()
    flat = tape.op("Reshape", [x, _integers(tape, -1, columns)])
    product = tape.op("Gemm", [flat, weight], {"transB": 1})
    leading = tape.op("Shape", [x], {"start": 0, "end": -1})
    shape = tape.op("Concat", [leading, _integers(tape, rows)], {"axis": 0})
    result = tape.op("Reshape", [product, shape])
    graph.insert_before(node, tape.nodes)
    result.name, result.shape, result.type = node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _integers(tape: Any, *values: int) -> Any:
    import onnx_ir as ir

    return tape.op("Constant", [], {"value": ir.tensor(list(values), dtype=ir.DataType.INT64)})
