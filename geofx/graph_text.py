"""Graphs as text: a line per node, what a rewrite changed as a unified diff, and the DOT language."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from geofx.program import Program

CONTEXT = 1
"""Lines around what changed."""


def graph_lines(program: Program) -> list[str]:
    """``name = operation(arguments)`` per node, in the order in which they run; tensors by name and shape."""
    return [_line(program, node) for node in program.graph.nodes if node.op != "get_attr"]


def graph_diff(original: Program, optimized: Program) -> Iterator[str]:
    """The subgraphs that were rewritten, as a unified diff of `graph_lines`; none where nothing was."""
    before, after = graph_lines(original), graph_lines(optimized)
    return difflib.unified_diff(before, after, "original", "optimized", n=CONTEXT, lineterm="")


def graph_dot(program: Program) -> str:
    """The graph in the DOT language of Graphviz: operations, and the tensors that they read."""
    lines = ["digraph geofx {", "  node [shape=box, fontname=monospace];"]
    for node in program.graph.nodes:
        stored = node.op == "get_attr"
        label = _tensor(program, node) if stored else f"{node.name}\n{operation_name(node)}"
        style = ", style=rounded" if stored else ""
        lines.append(f"  {_quoted(node.name)} [label={_quoted(label)}{style}];")
        lines += [f"  {_quoted(source.name)} -> {_quoted(node.name)};" for source in node.all_input_nodes]
    return "\n".join([*lines, "}", ""])


def _line(program: Program, node: fx.Node) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, fx.Node):
            return _tensor(program, value) if value.op == "get_attr" else value.name
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(shown, value))}]"
        return str(value)

    parts = [
        *map(shown, node.args),
        *(f"{name}={shown(value)}" for name, value in sorted(node.kwargs.items())),
    ]
    return f"{node.name} = {operation_name(node)}({', '.join(parts)})"


def operation_name(node: fx.Node) -> str:
    """``aten.linear``, ``aten.add.Tensor``, ``input``."""
    if node.op != "call_function":
        return "input" if node.op == "placeholder" else str(node.op)
    name = str(node.target) if hasattr(node.target, "_schema") else getattr(node.target, "__name__", "")
    return name.removesuffix(".default")


def _tensor(program: Program, node: fx.Node) -> str:
    value = program.attribute(str(node.target))
    return f"{node.target}{list(value.shape)}" if isinstance(value, Tensor) else str(node.target)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
