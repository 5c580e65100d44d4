"""Attention heads that a linear's outputs are cut into, or its inputs joined from, by graph pattern alone."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

aten = torch.ops.aten

_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
_THROUGH = (
    *(aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default),
    *(aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.dropout.default),
    *(aten.mul.Tensor, aten.div.Tensor, aten.layer_norm.default, aten.rms_norm.default),
)
_PIECES = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.slice.Tensor)
_JOINS_HEADS_ITSELF = (aten.scaled_dot_product_attention.default, aten.einsum.default)

Step = Callable[[fx.Node], Iterable[fx.Node]]


def find_heads(nodes: Iterable[fx.Node], shape: tuple[int, int]) -> int:
    """+h where the outputs of the linear ``nodes`` are cut into h heads, -h where their inputs are joined.

    A cut is a reshape of the last dim into (..., heads, head_dim) after which the heads trade places with
    another dim, as attention needs; a fused q, k, v counts the heads of all three. 0 where there is none, or
    where head sizes differ.
    """
    found = list(nodes)
    rows, columns = shape
    cut = {size for node in found for size in _head_sizes(node, _users)}
    if len(cut) == 1 and rows % (size := cut.pop()) == 0:
        return rows // size
    joined = {size for node in found for size in _head_sizes(node, _inputs)}
    if len(joined) == 1 and columns % (size := joined.pop()) == 0:
        return -(columns // size)
    return 0


def _head_sizes(linear: fx.Node, step: Step) -> Iterator[int]:
    """Head sizes of the cuts that ``step`` leads to from ``linear`` through maps that keep channels whole."""
    for node in _reach(linear, step, _keeps_channels):
        if node.target not in _RESHAPES:
            continue
        before, after = _shape(node.args[0]), _shape(node)
        whole, parts = (before, after) if step is _users else (after, before)
        if _splits(whole, parts) and _heads_move(node, parts, step):
            yield parts[-1]


def _splits(whole: tuple[int, ...], parts: tuple[int, ...]) -> bool:
    """Whether two or more trailing dims of ``parts`` multiply to the last of ``whole``."""
    products = [math.prod(parts[-count:]) for count in range(2, len(parts)) if min(parts[-count:]) > 0]
    return bool(whole) and len(parts) > 2 and whole[-1] in products


def _heads_move(cut: fx.Node, parts: tuple[int, ...], step: Step) -> bool:
    """Whether the heads, the last dim but one, are transposed or attended to before they meet a product."""

    def keeps_heads(node: fx.Node) -> bool:
        return not _swaps_heads(node) and _shape(node)[-2:-1] == parts[-2:-1]

    return any(
        _swaps_heads(node) or node.target in _JOINS_HEADS_ITSELF for node in _reach(cut, step, keeps_heads)
    )


def _swaps_heads(node: fx.Node) -> bool:
    count = len(_shape(node))
    if node.target is aten.transpose.int:
        first, second = (dim % count for dim in node.args[1:3])  # type: ignore[operator]
        return first != second and count - 2 in (first, second)
    if node.target is aten.permute.default:
        return bool(node.args[1][-2] % count != count - 2)  # type: ignore[index, operator]
    return False


def _keeps_channels(node: fx.Node) -> bool:
    if node.target in _RESHAPES:
        before, after = _shape(node.args[0]), _shape(node)
        return before[-1:] == after[-1:]
    return node.target in _THROUGH or node.target in _PIECES or node.target is operator.getitem


def _reach(start: fx.Node, step: Step, passes: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """The nodes that ``step`` leads to from ``start``, going on from those that let it pass."""
    queue, seen = list(step(start)), {start}
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            yield node
            queue += step(node) if passes(node) else ()


def _users(node: fx.Node) -> Iterable[fx.Node]:
    return node.users


def _inputs(node: fx.Node) -> Iterable[fx.Node]:
    return node.all_input_nodes


def _shape(node: object) -> tuple[int, ...]:
    """Sizes of the value, 0 for those that are symbols; () where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(size if isinstance(size, int) else 0 for size in value.shape)
