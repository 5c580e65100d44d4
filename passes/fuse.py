"""Factorized chains into operations that run as one kernel, where that is said to be faster."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from geofx.annotations import REWRITE, Key
from geofx.ops import GAUGE_FIXED_LINEAR, LOW_RANK_LINEAR, TENSOR_TRAIN_LOOKUP, TOKEN_MPS_LOOKUP, FusedOp
from geofx.passes.chains import Chain, find_linear_chains, owner, shapes_of, written_nodes
from geofx.passes.lookups import find_lookups
from geofx.program import Program

aten = torch.ops.aten

LOOKUPS = TENSOR_TRAIN_LOOKUP, TOKEN_MPS_LOOKUP
TOLERANCE = 1e-4
"""Of a chain against its operation, relative to the largest output, in float32: a wrong match is off by far
more, and orders of summation by far less."""

Pays = Callable[[FusedOp, tuple[Any, ...]], bool]
"""Whether an operation beats its chain; x, the first argument, is a tensor without storage."""


@dataclass(frozen=True)
class Fuse:
    """y = (x Rᵀ) Lᵀ + b, its gauge-fixed form, two block-diagonal products, lookups: one operation each.

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
        for found in fusing.groups():
            group = [chain for chain in found if chain.end.users]
            if not group:
                continue
            made = fusing.operation(group)
            if not self.pays(group[0].op, (fusing.x_of(group[0], "meta"), *made[1:])):
                continue
            held = [chain for chain in group if fusing.holds(chain)]
            if held:
                fusing.replace(held, made if held == group else fusing.operation(held))
                changed = True
        return changed


class _Fusing:
    """One program on the way; what its nodes give is known from a run without storage."""

    def __init__(self, program: Program) -> None:
        self.program, self.count = program, 0
        self.shapes, self.written = shapes_of(program), written_nodes(program)
        self.names = {id(tensor): name for name, tensor in program.tensors()}
        self.order = {node: place for place, node in enumerate(program.graph.nodes)}

    def groups(self) -> list[list[Chain]]:
        """Low-rank chains of one x and one R together, every other chain by itself; the last to end first.

        What reads the end of a chain is so replaced before that chain is.
        """
        groups: dict[Any, list[Chain]] = defaultdict(list)
        for chain in self._chains():
            shares = chain.op is LOW_RANK_LINEAR
            groups[(chain.x, str(chain.tensors[1].target)) if shares else chain.end].append(chain)
        return sorted(groups.values(), key=lambda group: -min(self.order[chain.end] for chain in group))

    def _chains(self) -> Iterator[Chain]:
        """Chains of one dtype whose x and constants stay what they are."""
        for find in (find_linear_chains, find_lookups):
            for chain in find(self.program, self.shapes):
                constants = [node for node in (*chain.tensors, chain.bias) if node is not None]
                dtypes = {self._tensor(node).dtype for node in constants}
                alike = len({dtype for dtype in dtypes if dtype.is_floating_point}) == 1
                if alike and not {owner(chain.x), *constants} & self.written:
                    yield chain

    def operation(self, group: list[Chain]) -> tuple[Any, ...]:
        """The arguments of the one operation, x as its node and constants as tensors."""
        first = group[0]
        parts = [self._tensor(node) for node in first.tensors]
        if first.op in LOOKUPS:
            return (first.x, parts) if first.op is TENSOR_TRAIN_LOOKUP else (first.x, *parts, *first.settings)
        biases = [None if chain.bias is None else self._tensor(chain.bias) for chain in group]
        bias = biases[0]
        if len(group) > 1:
            lefts = [self._tensor(chain.tensors[0]) for chain in group]
            parts[0] = torch.cat(lefts)
            if any(one is not None for one in biases):
                pairs = zip(biases, lefts, strict=True)
                bias = torch.cat([left.new_zeros(len(left)) if one is None else one for one, left in pairs])
        if first.op is not GAUGE_FIXED_LINEAR:
            return first.x, *parts, bias
        basis, mix, *index = parts
        places = torch.argsort(index[0]).to(torch.int32) if index else None
        return first.x, basis, mix, bias, places, *first.settings

    def x_of(self, chain: Chain, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """Something in the shape of x: noise, or ids of the first row."""
        shape = self.shapes[chain.x]
        if chain.op in LOOKUPS:
            return torch.zeros(shape, dtype=torch.int64, device=device)
        kind = dtype or self._tensor(chain.tensors[0]).dtype
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=kind, device=device)
        return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device, dtype=kind)

    def holds(self, chain: Chain) -> bool:
        """Whether the operation gives the chain's numbers, tried on noise in float32."""
        device = self._tensor(chain.tensors[0]).device
        x, others = self.x_of(chain, device, torch.float32), _widened(self.operation([chain])[1:])
        if chain.op in LOOKUPS:
            x = torch.randint(self._rows(chain), x.shape, device=device)
        known: dict[fx.Node, Any] = {chain.x: x}
        try:
            with torch.no_grad():
                wanted, found = self._value(chain.end, known), chain.op.chain(x, *others)
        except (RuntimeError, IndexError):  # constants of other shapes than the operation takes
            return False
        if wanted.shape != found.shape:
            return False
        return bool((wanted - found).abs().max() <= TOLERANCE * wanted.abs().max())

    def replace(self, group: list[Chain], made: tuple[Any, ...]) -> None:
        """Put the operation where the first of the group ended."""
        graph = self.program.graph
        with graph.inserting_before(min((chain.end for chain in group), key=self.order.__getitem__)):
            arguments = pytree.tree_map_only(Tensor, self._stored, made)
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
            for user in part.users:
                if user.target is aten.view.default:  # a part of y is not in one run of memory
                    user.target = aten.reshape.default
        if len(group) > 1:
            whole.meta = {key: value for key, value in group[0].end.meta.items() if key == "nn_module_stack"}

    def _stored(self, part: Tensor) -> fx.Node:
        """A node that reads ``part``: under its own name, or a new one where it was made here."""
        name = self.names.get(id(part))
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

    def _rows(self, chain: Chain) -> int:
        """How many rows the table of a lookup has."""
        shapes = [self.shapes[node] for node in chain.tensors]
        if chain.op is TOKEN_MPS_LOOKUP:
            return shapes[0][0]
        return math.prod(shape[1] for shape in shapes)

    def _value(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """What ``node`` gives, from what is known."""
        if node not in known:
            if node.op == "get_attr":
                known[node] = _widened((self._tensor(node),))[0]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: self._value(item, known))
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[node]


def _widened(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating tensors in float32."""
    return pytree.tree_map_only(  # type: ignore[no-any-return]
        Tensor, lambda part: part.detach().float() if part.is_floating_point() else part, parts
    )


def _carry_rewrite(chain: Chain, part: fx.Node) -> None:
    """A bias that was absorbed may have stood behind the node that is annotated."""
    for node in (chain.end, *chain.end.all_input_nodes):
        if REWRITE.name in node.meta:
            REWRITE.set(part, REWRITE.get(node))
            return
