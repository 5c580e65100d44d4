"""One block of a model, before and after it was rewritten, short enough to be drawn."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from geofx.graph_text import operation_name
from geofx.program import Program

aten = torch.ops.aten

MOST_BOXES = 48
"""Of a drawing: more is not looked at."""

PRODUCTS = frozenset(
    {
        aten.linear.default,
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.matmul.default,
        aten.einsum.default,
        aten.embedding.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.scaled_dot_product_attention.default,
    }
)
ACTIVATIONS = frozenset(
    {
        aten.gelu.default,
        aten.silu.default,
        aten.relu.default,
        aten.sigmoid.default,
        aten.softmax.int,
        aten.tanh.default,
    }
)

LAYER = re.compile(r"((?:[^.\d][^.]*\.)*\d+)\.")
"""What comes before and with the first number in the name of a weight."""


@dataclass(frozen=True)
class Box:
    """An operation: a product, an activation, or where several of them meet.

    Attributes:
        inputs: names of the boxes of the same drawing that it reads; what comes from elsewhere is left out.
        changed: the other drawing has none like it.
    """

    name: str
    label: str
    inputs: tuple[str, ...] = ()
    changed: bool = False


@dataclass(frozen=True)
class Block:
    """The same part of two graphs; ``title`` is what the names of its weights begin with."""

    title: str
    before: tuple[Box, ...]
    after: tuple[Box, ...]


def block_of(original: Program, optimized: Program) -> Block | None:
    """The layer in which most was rewritten, of several such the middle one.

    Norms, views, masks and positions are not drawn: a box stands for a product with its weight, an
    activation, or an operation that joins what several boxes give. What has no layer number is one layer.
    None where nothing was rewritten, or the layer is too large to look at.
    """
    before, after = _layers(original), _layers(optimized)
    new = {layer: _unlike(boxes, before.get(layer, [])) for layer, boxes in after.items()}
    most = max(map(len, new.values()), default=0)
    if most == 0:
        return None
    fullest = [layer for layer, boxes in new.items() if len(boxes) == most]
    title = fullest[len(fullest) // 2]
    old = before.get(title, [])
    if max(len(old), len(after[title])) > MOST_BOXES:
        return None
    return Block(title, _drawn(old, _unlike(old, after[title])), _drawn(after[title], new[title]))


def _layers(program: Program) -> dict[str, list[Box]]:
    """The boxes of each layer, in the order in which they run."""
    found: dict[str, list[Box]] = defaultdict(list)
    read: dict[fx.Node, tuple[str, ...]] = {}
    stored: dict[fx.Node, tuple[str, ...]] = {}
    layers: dict[str, str] = {}
    for node in program.graph.nodes:
        boxes = _union(read, node)
        weights = (str(node.target),) if node.op == "get_attr" else _union(stored, node)
        read[node] = () if isinstance(node.meta.get("val"), torch.SymInt) else boxes
        stored[node] = () if boxes else weights
        if not _is_drawn(node, boxes, weights):
            continue
        weight = max(weights, key=lambda name: program.attribute(name).dim(), default="")
        numbered = LAYER.match(weight)
        own = numbered[1] if numbered else ""
        layer = own if weight or not boxes else layers[max(boxes, key=list(layers).index)]
        read[node], stored[node], layers[node.name] = (node.name,), (), layer
        label = _label(program, node, weight, weight[numbered.end() if numbered else 0 :])
        found[layer].append(Box(node.name, label, boxes))
    return found


def _union(known: Mapping[fx.Node, tuple[str, ...]], node: fx.Node) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in node.all_input_nodes for name in known[part]))


def _is_drawn(node: fx.Node, read: tuple[str, ...], weights: tuple[str, ...]) -> bool:
    if node.op == "placeholder":
        value = node.meta.get("val")
        return isinstance(value, Tensor) and value.is_floating_point()
    if node.target in PRODUCTS:
        return bool(read or weights)
    return len(read) > 1 or (len(read) == 1 and node.target in ACTIVATIONS)


def _label(program: Program, node: fx.Node, weight: str, short: str) -> str:
    if node.target in PRODUCTS and weight:
        shape = " × ".join(map(str, program.attribute(weight).shape))
        return f"{short.replace('.weight', '').replace('_', ' ')}\n{shape}"
    operation = operation_name(node).removeprefix("aten.").removeprefix("transformers.")
    return "attention" if "attention" in operation else operation.partition(".")[0]


def _unlike(boxes: list[Box], others: list[Box]) -> set[str]:
    """Names of the boxes whose label the others do not have, or not as often."""
    left, found = Counter(box.label for box in others), set()
    for box in boxes:
        if left[box.label]:
            left[box.label] -= 1
        else:
            found.add(box.name)
    return found


def _drawn(boxes: list[Box], changed: set[str]) -> tuple[Box, ...]:
    there = {box.name for box in boxes}
    return tuple(
        replace(box, inputs=tuple(filter(there.__contains__, box.inputs)), changed=box.name in changed)
        for box in boxes
    )
