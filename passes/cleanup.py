"""Dead nodes, and parameters that nothing reads any more, out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from geofx.annotations import Key
from geofx.program import Program


@dataclass(frozen=True)
class Cleanup:
    """After it, the graph module holds exactly the tensors that the graph reads."""

    name: ClassVar[str] = "cleanup"
    reads: ClassVar[tuple[Key[Any], ...]] = ()
    writes: ClassVar[tuple[Key[Any], ...]] = ()

    def run(self, program: Program) -> bool:
        """Erase dead code and unread parameters and buffers; True when a node went."""
        changed = bool(program.graph.eliminate_dead_code())
        used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
        root = program.graph_module
        for name, _ in (
            *root.named_parameters(remove_duplicate=False),
            *root.named_buffers(remove_duplicate=False),
        ):
            if name not in used:
                *path, leaf = name.split(".")
                delattr(root.get_submodule(".".join(path)), leaf)
        _drop_empty(root)
        return changed


def _drop_empty(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        _drop_empty(child)
        full = any(True for part in (child.children(), child.parameters(), child.buffers()) for _ in part)
        if not full and type(child) is nn.Module:
            delattr(module, name)
