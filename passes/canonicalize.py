"""addmm, mm, matmul and t of a constant weight -> linear(x, W, b) or linear(x, t(W), b).

After it, every product with a constant matrix is one aten.linear node whose weight operand is the
attribute itself or one transpose of it, so the other passes look for one pattern only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from geofx.annotations import Key
from geofx.program import Program

aten = torch.ops.aten

_TRANSPOSES = (
    aten.t.default,
    aten.numpy_T.default,
    aten.transpose.int,
    aten.permute.default,
    aten.mT.default,
)
_IDENTITIES = (aten.detach.default, aten.alias.default, aten.contiguous.default)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_PRODUCTS = (aten.mm.default, aten.matmul.default, aten.addmm.default, aten.linear.default)


@dataclass(frozen=True)
class Canonicalize:
    """One form for every product of an activation and a constant matrix.

    view(linear(view(x)), of the leading sizes of x) is linear(x).
    """

    name: ClassVar[str] = "canonicalize"
    reads: ClassVar[tuple[Key[Any], ...]] = ()
    writes: ClassVar[tuple[Key[Any], ...]] = ()

    def run(self, program: Program) -> bool:
        """Rewrite the products, drop dropouts that are off; True when there were any."""
        changed = False
        for node in list(program.graph.nodes):
            if node.target is aten.dropout.default and not node.args[2]:
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
                changed = True
            elif node.target in _PRODUCTS:
                changed |= _canonicalize_product(program, node)
        for node in list(program.graph.nodes):
            if node.target in _VIEWS:
                changed |= _unflatten(program, node)
        program.graph.eliminate_dead_code()
        return changed


def _canonicalize_product(program: Program, node: fx.Node) -> bool:
    operands = _operands(node)
    if operands is None:
        return False
    x, weight, bias, stored_out_in = operands
    found = constant_matrix(program, weight)
    if found is None or constant_matrix(program, x) is not None:
        return False
    attribute, transposed = found
    as_out_in = transposed != stored_out_in  # linear takes (out, in); mm takes (in, out)
    already = attribute if as_out_in else weight
    if (
        node.target is aten.linear.default
        and weight is already
        and (as_out_in or weight.target is aten.t.default)
    ):
        return False
    with program.graph.inserting_before(node):
        operand = attribute if as_out_in else _transpose_of(program, attribute)
        args = (x, operand) if bias is None else (x, operand, bias)
        linear = program.graph.call_function(aten.linear.default, args)
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    program.graph.erase_node(node)
    return True


def _unflatten(program: Program, node: fx.Node) -> bool:
    """Apply a product to x itself where its rows are only flattened before and laid out again after it."""
    product = node.args[0]
    if not isinstance(product, fx.Node) or product.target is not aten.linear.default:
        return False
    flat = product.args[0]
    if not isinstance(flat, fx.Node) or flat.target not in _VIEWS or not isinstance(flat.args[0], fx.Node):
        return False
    source = flat.args[0]
    before, after, inner = (_sizes(item) for item in (source, node, flat))
    alike = len(before) == len(after) and all(
        statically_known_true(one == other) for one, other in zip(before[:-1], after[:-1], strict=True)
    )
    if not alike or before[-1] != inner[-1] or after[-1] != _sizes(product)[-1]:
        return False
    with program.graph.inserting_before(node):
        linear = program.graph.call_function(aten.linear.default, (source, *product.args[1:]))
    linear.meta = {**product.meta, "val": node.meta["val"]}
    node.replace_all_uses_with(linear)
    program.graph.erase_node(node)
    return True


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _operands(node: Any) -> tuple[Any, Any, Any, bool] | None:
    """(x, weight, bias, weight is stored (out, in)), or None where scaled or too short."""
    if node.target is aten.linear.default:
        return node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None, True
    if node.target is aten.addmm.default:
        scaled = any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
        bias, x, weight = node.args
        return None if scaled or bias.meta["val"].dim() != 1 else (x, weight, bias, False)
    return node.args[0], node.args[1], None, False


def _transpose_of(program: Program, attribute: fx.Node) -> fx.Node:
    node = program.graph.call_function(aten.t.default, (attribute,))
    value = attribute.meta.get("val")
    node.meta["val"] = value.t() if isinstance(value, Tensor) else None
    return node


def constant_matrix(program: Program, node: Any) -> tuple[fx.Node, bool] | None:
    """(get_attr node, transposed) where ``node`` is a constant matrix seen through transposes, else None."""
    transposed = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in _TRANSPOSES and _swaps_two(node):
            transposed = not transposed
        elif node.target not in _IDENTITIES:
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = program.attribute(str(node.target))
    return (node, transposed) if isinstance(value, Tensor) and value.dim() == 2 else None


def _swaps_two(node: Any) -> bool:
    if node.target is aten.transpose.int:
        return {dim % 2 for dim in node.args[1:3]} == {0, 1}
    if node.target is aten.permute.default:
        return [dim % 2 for dim in node.args[1]] == [1, 0]
    return True
