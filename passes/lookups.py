"""Lookups in factorized tables, found in a graph by what lies between ids and rows."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from geofx.ops import TENSOR_TRAIN_LOOKUP, TOKEN_MPS_LOOKUP
from geofx.passes.chains import VIEWS, Chain, Shapes, is_constant, origin
from geofx.program import Program

aten = torch.ops.aten

STEPS = VIEWS | {
    operator.getitem,
    aten.add.Tensor,
    aten.alias.default,
    aten.arange.default,
    aten.bmm.default,
    aten.div.Tensor_mode,
    aten.embedding.default,
    aten.index_select.default,
    aten.matmul.default,
    aten.mul.Tensor,
    aten.new_ones.default,
    aten.remainder.Scalar,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.sym_size.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
}
"""What a lookup may be made of."""


def find_lookups(program: Program, shapes: Shapes) -> Iterator[Chain]:
    """Rows of tables of tensor trains and of matrix product states."""
    for ids in _looked_up(program):
        reached = _reached(program, ids)
        found: dict[tuple[fx.Node, ...], Chain] = {}
        for end in reached:
            if len(shapes.get(end, ())) > 1 and shapes[end][:-1] == shapes.get(ids):
                chain = _tensor_train(ids, end, reached, shapes) or _token_mps(ids, end, reached, shapes)
                if chain is not None:
                    known = found.get(chain.tensors)
                    if known is None or shapes[end][-1] > shapes[known.end][-1]:
                        found[chain.tensors] = chain
        yield from found.values()


def _looked_up(program: Program) -> list[fx.Node]:
    """What may be ids: whatever rows of a table are asked by, or taken apart into digits."""
    found: dict[Any, None] = {}
    for node in program.graph.nodes:
        if node.target is aten.flatten.using_ints:
            found[node.args[0]] = None
        elif node.target is aten.embedding.default:
            found[node.args[1]] = None
    return list(found)


def _reached(program: Program, ids: fx.Node) -> list[fx.Node]:
    """Nodes that depend on ``ids`` and constants alone, by steps of a lookup."""
    alone, found = {ids}, []
    for node in program.graph.nodes:
        if node.op == "get_attr":
            alone.add(node)
        elif node.target in STEPS and all(part in alone for part in node.all_input_nodes):
            alone.add(node)
            found.append(node)
    return found


def _slice(end: fx.Node, reached: list[fx.Node]) -> list[fx.Node]:
    """What ``end`` is made of, in the order of the graph."""
    needed = {end}
    for node in reversed(reached):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in reached if node in needed]


def _constants(nodes: list[fx.Node]) -> tuple[fx.Node, ...]:
    """Parameters that are read, in the order in which rows of them are picked."""
    found: dict[fx.Node, None] = {}
    for node in nodes:
        if node.target in (aten.embedding.default, aten.index_select.default):
            table = origin(node.args[0])
            if is_constant(table):
                found[table] = None
    return tuple(found)


def _tensor_train(ids: fx.Node, end: fx.Node, reached: list[fx.Node], shapes: Shapes) -> Chain | None:
    cores = _constants(_slice(end, reached))
    sides = [shapes[core] for core in cores]
    if len(cores) < 2 or any(len(side) != 4 for side in sides):
        return None
    bonds = [1, *(side[3] for side in sides)]
    if [side[0] for side in sides] != bonds[:-1] or bonds[-1] != 1:
        return None
    if shapes[end][-1] != math.prod(side[2] for side in sides):
        return None
    return Chain(TENSOR_TRAIN_LOOKUP, ids, end, cores)


def _token_mps(ids: fx.Node, end: fx.Node, reached: list[fx.Node], shapes: Shapes) -> Chain | None:
    nodes = _slice(end, reached)
    tables, parts = _constants(nodes), [node for node in nodes if _is_core(node)]
    if len(tables) != 1 or len(shapes[tables[0]]) != 2 or not parts:
        return None
    cores = [shapes[node][-3:] for node in sorted(parts, key=_place)]
    bonds, modes = [1, *(core[2] for core in cores)], [core[1] for core in cores]
    if [core[0] for core in cores] != bonds[:-1] or bonds[-1] != 1:
        return None
    if sum(map(math.prod, cores)) != shapes[tables[0]][1] or shapes[end][-1] > math.prod(modes):
        return None
    return Chain(TOKEN_MPS_LOOKUP, ids, end, tables, settings=(bonds, modes, shapes[end][-1]))


def _is_core(node: fx.Node) -> bool:
    """Whether ``node`` unfolds one part of a row that was split."""
    part = node.args[0] if node.target is aten.unflatten.int else None
    return isinstance(part, fx.Node) and part.target is operator.getitem


def _place(node: fx.Node) -> int:
    return int(node.args[0].args[1])  # type: ignore[union-attr, arg-type]
