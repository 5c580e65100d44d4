"""A graph several times in one, each copy with weights of its own."""

from __future__ import annotations

from typing import Any


def with_copies(model: Any, count: int) -> Any:
    """``model`` (`onnx_ir.Model`) with its nodes ``count`` times, on the same inputs; outputs of all copies.

    The weights of copy k are those given times 1 + k / 1024, so that no two are taken for one.
    """
    import onnx_ir as ir

    graph = model.graph
    nodes, outputs, weights = list(graph), list(graph.outputs), list(graph.initializers.values())
    for copy in range(1, count):
        known = {value: value for value in graph.inputs}
        for value in weights:
            array = value.const_value.numpy()
            scaled = array * array.dtype.type(1.0 + copy / 1024) if array.dtype.kind == "f" else array.copy()
            name = f"{value.name}.{copy}"
            stored = ir.tensor(scaled, name=name)
            own = ir.Value(name=name, shape=value.shape, type=value.type, const_value=stored)
            graph.register_initializer(own)
            known[value] = own
        for node in nodes:
            again = ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else known[value] for value in node.inputs],
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
            )
            for old, new in zip(node.outputs, again.outputs, strict=True):
                new.name = f"{old.name}.{copy}"
                new.shape, new.type = old.shape, old.type
                known[old] = new
            graph.append(again)
        graph.outputs.extend(known[value] for value in outputs)
    return model
