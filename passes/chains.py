"""Chains of aten operations that an operation of `geofx.ops` stands for, found in a graph by structure."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from geofx.ops import BLOCK_DIAGONAL_LINEAR, GAUGE_FIXED_LINEAR, LOW_RANK_LINEAR, FusedOp
from geofx.program import Program, writes_in_place

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.flatten.using_ints,
        aten.narrow.default,
        aten.slice.Tensor,
    }
)

Shapes = dict[fx.Node, tuple[int, ...]]


@dataclass(frozen=True)
class Chain:
    """Nodes that ``op`` stands for: from ``x`` to ``end``, with the constants between.

    Attributes:
        tensors: nodes of the factors, in the order of the operation's arguments.
        bias: the vector that is added at the end.
        settings: the operation's arguments behind the tensors, where they are numbers.
    """

    op: FusedOp
    x: fx.Node
    end: fx.Node
    tensors: tuple[fx.Node, ...]
    bias: fx.Node | None = None
    settings: tuple[Any, ...] = ()


def find_linear_chains(program: Program, shapes: Shapes) -> Iterator[Chain]:
    """Low-rank and gauge-fixed maps and products of block-diagonal ones, their biases included."""
    for node in list(program.graph.nodes):
        chain = _low_rank(node) or _gauge_fixed(node, shapes) or _block_diagonal(node, shapes)
        if chain is not None:
            yield _with_bias(chain, shapes)


def shapes_of(program: Program) -> Shapes:
    """The shape of each node's tensor on the program's example, from a run without storage."""
    found: Shapes = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                found[n] = tuple(value.shape)
            return value

    device = next((tensor.device for _, tensor in program.tensors()), torch.device("cpu"))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = (program.example[name] for name in program.input_names)
        there = [mode.from_tensor(part).to(device) if isinstance(part, Tensor) else part for part in given]
        Recorder(program.graph_module).run(*there)
    return found


def written_nodes(program: Program) -> set[fx.Node]:
    """Whose memory nodes of the graph write to: it is not what it was when they are through."""
    found = set()
    for node in program.graph.nodes:
        if writes_in_place(node):
            found |= {owner(part) for part in node.all_input_nodes}
    return found


def owner(node: fx.Node) -> fx.Node:
    """Whose memory ``node`` may be."""
    while node.op == "call_function" and node.all_input_nodes:
        returns = getattr(getattr(node.target, "_schema", None), "returns", ())
        if node.target is not operator.getitem and not any(part.alias_info for part in returns):
            break
        node = node.all_input_nodes[0]
    return node


def origin(node: Any) -> Any:
    """What ``node`` is a view of."""
    while isinstance(node, fx.Node) and node.target in VIEWS:
        node = node.args[0]
    return node


def is_constant(node: Any) -> bool:
    """Whether ``node`` reads a parameter or buffer."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _low_rank(node: fx.Node) -> Chain | None:
    outer = _linear(node)
    inner = _linear(outer[0]) if outer else None
    if outer is None or inner is None or inner[2] is not None:
        return None
    if any(_linear(user) is None for user in outer[0].users):
        return None
    return Chain(LOW_RANK_LINEAR, inner[0], node, (outer[1], inner[1]), bias=outer[2])


def _gauge_fixed(node: fx.Node, shapes: Shapes) -> Chain | None:
    index: tuple[fx.Node, ...] = ()
    cat = node
    if node.target is aten.index_select.default and is_constant(node.args[2]):
        cat, index = node.args[0], (node.args[2],)  # type: ignore[assignment]
    elif any(user.target is aten.index_select.default for user in node.users):
        return None
    if cat.target is not aten.cat.default or (len(cat.users) > 1 and index):
        return None
    parts: list[fx.Node] = list(cat.args[0])  # type: ignore[arg-type]
    places = {origin(part): place for place, part in reversed(list(enumerate(parts)))}
    pairs = [(one, _linear(one)) for one in places]
    for spanned, inner in pairs:
        others = [(other, outer) for other, outer in pairs if outer and outer[0] is spanned]
        if inner is None or inner[2] is not None or len(others) != 1 or len(pairs) != 2:
            continue
        (_, outer), place = others[0], places[spanned]
        assert outer is not None
        start = sum(shapes[part][-1] for part in parts[:place])
        tensors = (inner[1], outer[1], *index)
        settings = (0 if index else start,)
        return Chain(GAUGE_FIXED_LINEAR, inner[0], node, tensors, settings=settings)
    return None


def _block_diagonal(node: fx.Node, shapes: Shapes) -> Chain | None:
    if node.target not in VIEWS:
        return None
    outer = _bmm(origin(node))
    inner = _bmm(origin(outer[0])) if outer else None
    if outer is None or inner is None:
        return None
    if len(shapes[outer[1]]) != 3 or len(shapes[inner[1]]) != 3:
        return None
    (m2, m1, _), (n1, _, n2) = shapes[outer[1]], shapes[inner[1]]
    x = inner[0]
    while x.target in VIEWS and shapes[x][-1] != n1 * n2:
        x = x.all_input_nodes[0]
    if shapes[node] != (*shapes[x][:-1], m1 * m2) or shapes[x][-1] != n1 * n2:
        return None
    return Chain(BLOCK_DIAGONAL_LINEAR, x, node, (outer[1], inner[1]))


def _with_bias(chain: Chain, shapes: Shapes) -> Chain:
    """The chain up to the addition of a constant vector, if that is all that is done with its end."""
    if chain.bias is not None or len(chain.end.users) != 1:
        return chain
    (user,) = chain.end.users
    if user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return chain
    other: Any = user.args[1] if user.args[0] is chain.end else user.args[0]
    if not is_constant(other) or shapes[other] != shapes[chain.end][-1:]:
        return chain
    return replace(chain, end=user, bias=other)


def _linear(node: Any) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(x, W, b) of a linear map whose weight and bias are constants."""
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or node.kwargs:
        return None
    x, weight, bias = (*node.args, None)[:3]
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return None
    return x, weight, bias  # type: ignore[return-value]


def _bmm(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(x, W) of a batched product by a constant."""
    if not isinstance(node, fx.Node) or node.target is not aten.bmm.default:
        return None
    x, weight = node.args[0], origin(node.args[1])
    return (x, weight) if is_constant(weight) else None  # type: ignore[return-value]
