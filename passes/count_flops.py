"""Flops per token of the whole graph, and how often each site runs per token."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from geofx.passes.find_sites import linear_nodes, lookup_nodes
from geofx.program import Program


class _RowCounter(fx.Interpreter):
    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.linear, self.lookups = linear_nodes(program), lookup_nodes(program)
        self.rows: dict[str, int] = defaultdict(int)

    def run_node(self, n: fx.Node) -> Any:
        site = self.linear.get(n.name)
        if site is not None:
            x = self.env[n.args[0]]  # type: ignore[index]
            self.rows[site.weight] += x.numel() // x.shape[-1]
        table = self.lookups.get(n.name)
        if table is not None and table.kind == "embedding":
            self.rows[table.weight] += self.env[n.args[1]].numel()  # type: ignore[index]
        return super().run_node(n)


def count_flops(program: Program) -> tuple[float, dict[str, float]]:
    """(flops per token, weight -> rows per token), by running the example under FlopCounterMode.

    Rows are vectors multiplied; of a table that is only looked up, rows read.
    A token is one entry of a two-dimensional integer input, or one row of the batch where there is none.
    A multiply-add is 2 flops. Products inside
    fused attention kernels that torch has no formula for are not counted.
    """
    counter, flops = _RowCounter(program), FlopCounterMode(display=False)
    with torch.no_grad(), program.buffers_kept(), flops:
        counter.run(*program.example.values())
    tokens = tokens_of(program)
    return flops.get_total_flops() / tokens, {name: rows / tokens for name, rows in counter.rows.items()}


def tokens_of(program: Program) -> int:
    """Number of tokens in the program's example."""
    tensors = [value for value in program.example.values() if isinstance(value, Tensor)]
    ids = next((value for value in tensors if value.dim() == 2 and not value.is_floating_point()), None)
    return ids.numel() if ids is not None else tensors[0].shape[0]
