"""Factorized chains into operations that run as one kernel, where that is said to be faster."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from geofx.annotations import REWRITE, Key
from geofx.ops import BLOCK_DIAGONAL_LINEAR, GAUGE_FIXED_LINEAR, LOW_RANK_LINEAR, FusedOp
from geofx.program import Program

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.flatten.using_ints,
        aten.narrow.default,
        aten.slice.Tensor,
    }
)
TOLERANCE = 1e-4
"""Of a chain against its operation, relative to the largest output, in float32: a wrong match is off by far
more, and orders of summation by far less."""

Pays = Callable[[FusedOp, tuple[Any, ...]], bool]
"""Whether an operation beats its chain; x, the first argument, is a tensor without storage."""


@dataclass(frozen=True)
class Fuse:
    """y = (x Rᵀ) Lᵀ + b, its gauge-fixed form and two block-diagonal products, as one operation each.

    Low-rank maps of one x that share R become one, their L stacked and y split. A chain is found by its
    operations, whatever format wrote it, and replaced only where the operation gives the same numbers.
    """

    pays: Pays

    name: ClassVar[str] = "fuse"
    reads: ClassVar[tuple[Key[Any], ...]] = ()
    writes: ClassVar[tuple[Key[Any], ...]] = ()

    def run(self, program: Program) -> bool:
        """Replace the chains that pay; True when there was one."""
        fusing = _Fusing(program)
        changed = False
        for group in _groups(fusing.chains()):
            made = fusing.operation(group)
            x = torch.empty(fusing.shapes[group[0].x], dtype=fusing.dtype(made), device="meta")
            if self.pays(group[0].op, (x, *made[1:])) and all(fusing.holds(chain) for chain in group):
                fusing.replace(group, made)
                changed = True
        return changed


@dataclass(frozen=True)
class _Chain:
    """Nodes that an operation stands for: from ``x`` to ``end``, with the constants between."""

    op: FusedOp
    x: fx.Node
    end: fx.Node
    tensors: tuple[fx.Node, ...]
    start: int = 0
    bias: fx.Node | None = None


def _groups(chains: Iterator[_Chain]) -> list[list[_Chain]]:
    """Low-rank chains of one x and one R together, every other chain by itself."""
    groups: dict[Any, list[_Chain]] = defaultdict(list)
    for chain in chains:
        shares = chain.op is LOW_RANK_LINEAR
        groups[(chain.x, str(chain.tensors[1].target)) if shares else chain.end].append(chain)
    return list(groups.values())


class _Fusing:
    """One program on the way; what its nodes give is known from a run without storage."""

    def __init__(self, program: Program) -> None:
        self.program, self.count = program, 0
        self.shapes, self.written = _shapes(program), _written(program)

    def chains(self) -> Iterator[_Chain]:
        """Every chain, its bias included."""
        matched: set[fx.Node] = set()
        for node in list(self.program.graph.nodes):
            for match in (self._low_rank, self._gauge_fixed, self._block_diagonal):
                chain = match(node)
                if chain is not None and chain.end not in matched and _origin(chain.x) not in self.written:
                    matched.add(chain.end)
                    yield self._with_bias(chain)

    def operation(self, group: list[_Chain]) -> tuple[Any, ...]:
        """The arguments of the one operation, x as its node and constants as tensors."""
        first = group[0]
        parts = [self._tensor(node) for node in first.tensors]
        biases = [None if chain.bias is None else self._tensor(chain.bias) for chain in group]
        bias = biases[0]
        if first.op is LOW_RANK_LINEAR and len(group) > 1:
            lefts = [self._tensor(chain.tensors[0]) for chain in group]
            parts[0] = torch.cat(lefts)
            if any(one is not None for one in biases):
                pairs = zip(biases, lefts, strict=True)
                bias = torch.cat([left.new_zeros(len(left)) if one is None else one for one, left in pairs])
        if first.op is not GAUGE_FIXED_LINEAR:
            return first.x, *parts, bias
        basis, mix, *index = parts
        places = torch.argsort(index[0]).to(torch.int32) if index else None
        return first.x, basis, mix, bias, places, first.start

    def dtype(self, made: tuple[Any, ...]) -> torch.dtype:
        """Of the factors, and so of x."""
        return next(part.dtype for part in made if isinstance(part, Tensor))

    def holds(self, chain: _Chain) -> bool:
        """Whether the operation gives the chain's numbers, tried on noise in float32."""
        x, *others = _widened(self.operation([chain]))
        device = self._tensor(chain.tensors[0]).device
        noise = torch.randn(self.shapes[x], generator=torch.Generator(device).manual_seed(0), device=device)
        known: dict[fx.Node, Any] = {x: noise}
        with torch.no_grad():
            wanted, found = self._value(chain.end, known), chain.op.chain(noise, *others)
        if wanted.shape != found.shape:
            return False
        return bool((wanted - found).abs().max() <= TOLERANCE * wanted.abs().max())

    def replace(self, group: list[_Chain], made: tuple[Any, ...]) -> None:
        """Put the operation where the first of the group ended."""
        graph = self.program.graph
        order = {node: place for place, node in enumerate(graph.nodes)}
        with graph.inserting_before(min((chain.end for chain in group), key=order.__getitem__)):
            arguments = [self._stored(part) if isinstance(part, Tensor) else part for part in made]
            whole = graph.call_function(group[0].op.overload, tuple(arguments))
            parts, start = [whole], 0
            if len(group) > 1:
                parts = []
                for chain in group:
                    rows = self.shapes[chain.end][-1]
                    parts.append(graph.call_function(aten.narrow.default, (whole, -1, start, rows)))
                    start += rows
        for chain, part in zip(group, parts, strict=True):
            part.meta = dict(chain.end.meta)
            _carry_rewrite(chain, part)
            chain.end.replace_all_uses_with(part)
        if len(group) > 1:
            whole.meta = {key: value for key, value in group[0].end.meta.items() if key == "nn_module_stack"}

    def _stored(self, part: Tensor) -> fx.Node:
        """A node that reads ``part``: under its own name, or a new one where it was made here."""
        names = {id(tensor): name for name, tensor in self.program.tensors()}
        name = names.get(id(part))
        if name is None:
            name = f"fused_{self.count}"
            while self.program.holds(name):
                self.count += 1
                name = f"fused_{self.count}"
            self.program.set_tensor(name, part, trainable=False)
        return self.program.graph.get_attr(name)

    def _tensor(self, node: fx.Node) -> Tensor:
        value: Tensor = self.program.attribute(str(node.target))
        return value

    def _low_rank(self, node: fx.Node) -> _Chain | None:
        outer = _linear(node)
        inner = _linear(outer[0]) if outer else None
        if outer is None or inner is None or inner[2] is not None:
            return None
        if any(_linear(user) is None for user in outer[0].users):
            return None
        return _Chain(LOW_RANK_LINEAR, inner[0], node, (outer[1], inner[1]), bias=outer[2])

    def _gauge_fixed(self, node: fx.Node) -> _Chain | None:
        index: tuple[fx.Node, ...] = ()
        cat = node
        if node.target is aten.index_select.default and _is_constant(node.args[2]):
            cat, index = node.args[0], (node.args[2],)  # type: ignore[assignment]
        elif any(user.target is aten.index_select.default for user in node.users):
            return None
        if cat.target is not aten.cat.default or (len(cat.users) > 1 and index):
            return None
        parts: list[fx.Node] = list(cat.args[0])  # type: ignore[arg-type]
        places = {_origin(part): place for place, part in reversed(list(enumerate(parts)))}
        pairs = [(one, _linear(one)) for one in places]
        for spanned, inner in pairs:
            others = [(other, outer) for other, outer in pairs if outer and outer[0] is spanned]
            if inner is None or inner[2] is not None or len(others) != 1 or len(pairs) != 2:
                continue
            (_, outer), place = others[0], places[spanned]
            assert outer is not None
            start = sum(self.shapes[part][-1] for part in parts[:place])
            tensors = (inner[1], outer[1], *index)
            return _Chain(GAUGE_FIXED_LINEAR, inner[0], node, tensors, 0 if index else start)
        return None

    def _block_diagonal(self, node: fx.Node) -> _Chain | None:
        if node.target not in VIEWS:
            return None
        outer = _bmm(_origin(node))
        inner = _bmm(_origin(outer[0])) if outer else None
        if outer is None or inner is None:
            return None
        (m2, m1, _), (n1, _, n2) = self.shapes[outer[1]], self.shapes[inner[1]]
        x = inner[0]
        while x.target in VIEWS and self.shapes[x][-1] != n1 * n2:
            x = x.all_input_nodes[0]
        if self.shapes[node] != (*self.shapes[x][:-1], m1 * m2) or self.shapes[x][-1] != n1 * n2:
            return None
        return _Chain(BLOCK_DIAGONAL_LINEAR, x, node, (outer[1], inner[1]))

    def _with_bias(self, chain: _Chain) -> _Chain:
        """The chain up to the addition of a constant vector, if that is all that is done with its end."""
        if chain.bias is not None or len(chain.end.users) != 1:
            return chain
        (user,) = chain.end.users
        if user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
            return chain
        other = user.args[1] if user.args[0] is chain.end else user.args[0]
        if not _is_constant(other) or self.shapes[other] != self.shapes[chain.end][-1:]:
            return chain
        return replace(chain, end=user, bias=other)

    def _value(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """What ``node`` gives, from what is known."""
        if node not in known:
            if node.op == "get_attr":
                known[node] = _widened((self._tensor(node),))[0]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: self._value(item, known))
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[node]


def _shapes(program: Program) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of each node's tensor on the program's example."""
    found: dict[fx.Node, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                found[n] = tuple(value.shape)
            return value

    device = next((tensor.device for _, tensor in program.tensors()), torch.device("cpu"))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = (program.example[name] for name in program.input_names)
        there = [
            mode.from_tensor(part).to(device) if isinstance(part, Tensor) else part  # type: ignore[arg-type]
            for part in given
        ]
        Recorder(program.graph_module).run(*there)
    return found


def _written(program: Program) -> set[fx.Node]:
    """What nodes of the graph write to: it is not what it was when they are through."""
    found = set()
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable:
            found |= {_origin(part) for part in node.all_input_nodes}
    return found


def _linear(node: Any) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(x, W, b) of a linear map whose weight and bias are constants."""
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or node.kwargs:
        return None
    x, weight, bias = (*node.args, None)[:3]
    if not _is_constant(weight) or not (bias is None or _is_constant(bias)):
        return None
    return x, weight, bias  # type: ignore[return-value]


def _bmm(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(x, W) of a batched product by a constant."""
    if not isinstance(node, fx.Node) or node.target is not aten.bmm.default:
        return None
    x, weight = node.args[0], _origin(node.args[1])
    return (x, weight) if _is_constant(weight) else None  # type: ignore[return-value]


def _origin(node: Any) -> Any:
    """What ``node`` is a view of."""
    while isinstance(node, fx.Node) and node.target in VIEWS:
        node = node.args[0]
    return node


def _is_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _widened(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating tensors in float32."""
    return tuple(
        part.detach().float() if isinstance(part, Tensor) and part.is_floating_point() else part
        for part in parts
    )


def _carry_rewrite(chain: _Chain, part: fx.Node) -> None:
    """A bias that was absorbed may have stood behind the node that is annotated."""
    for node in (chain.end, *chain.end.all_input_nodes):
        if REWRITE.name in node.meta:
            REWRITE.set(part, REWRITE.get(node))
            return
