"""A plan into the graph: trace each chosen ``apply`` at its node, inline it, attach the factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from geofx.annotations import REWRITE, SENSITIVITY, SITE, Key, Rewrite
from geofx.factorizations import Dense, Factorization, Factors
from geofx.program import Program

aten = torch.ops.aten

Rewrites = Mapping[str, tuple[Factorization, Factors]]


@dataclass(frozen=True)
class Lower:
    """linear(x, W, b) -> apply(x, factors) + b for every weight in ``rewrites``."""

    rewrites: Rewrites = field(default_factory=dict)

    name: ClassVar[str] = "lower"
    reads: ClassVar[tuple[Key[Any], ...]] = (SITE,)
    writes: ClassVar[tuple[Key[Any], ...]] = (REWRITE,)

    def run(self, program: Program) -> bool:
        """Rewrite every node whose site has a factorization other than dense."""
        changed = False
        for node in list(program.graph.nodes):
            if SITE.name not in node.meta:
                continue
            site = SITE.get(node)
            factorization, factors = self.rewrites.get(site.weight, (Dense(), {}))
            if isinstance(factorization, Dense):
                continue
            _lower_node(program, node, site.weight, factorization, factors)
            changed = True
        return changed


def factor_name(weight: str, factor: str) -> str:
    """Attribute under which a factor is stored: the weight's name and the factor's."""
    return f"{weight}_{factor}"


def _lower_node(
    program: Program, node: fx.Node, weight: str, factorization: Factorization, factors: Factors
) -> None:
    trainable = program.weight(weight).requires_grad
    for name, value in factors.items():
        program.set_tensor(factor_name(weight, name), value, trainable=trainable)
    graph = program.graph
    with graph.inserting_before(node):
        stored = {name: graph.get_attr(factor_name(weight, name)) for name in factors}
        for name, attribute in stored.items():
            attribute.meta["val"] = _fake_like(node.args[0], factors[name])
        result = _inline(graph, node, factorization, stored)
        if len(node.args) > 2 and node.args[2] is not None:
            value = result.meta["val"]
            result = graph.call_function(aten.add.Tensor, (result, node.args[2]))
            result.meta["val"] = value
    REWRITE.set(result, Rewrite(weight, factorization.name))
    for key in (SITE, SENSITIVITY):
        if key.name in node.meta:
            result.meta[key.name] = node.meta[key.name]
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _inline(
    graph: fx.Graph, node: fx.Node, factorization: Factorization, stored: Mapping[str, fx.Node]
) -> fx.Node:
    """Copy the traced ``apply`` in before ``node``."""
    names = sorted(stored)
    x = node.args[0]

    def body(x: Tensor, *parts: Tensor) -> Tensor:
        return factorization.apply(x, dict(zip(names, parts, strict=True)))

    fakes = [x.meta["val"], *(stored[name].meta["val"] for name in names)]  # type: ignore[union-attr]
    with torch.no_grad():
        traced = make_fx(body, pre_dispatch=True)(*fakes)
    traced.graph.eliminate_dead_code()
    inner = [item for item in traced.graph.nodes if item.op == "placeholder"]
    values = dict(zip(inner, (x, *(stored[name] for name in names)), strict=True))
    result = graph.graph_copy(traced.graph, values)
    assert isinstance(result, fx.Node)
    for item in (*traced.graph.nodes,):
        copied = values.get(item)
        if isinstance(copied, fx.Node) and item.op == "call_function":
            copied.meta = {
                "val": item.meta.get("val"),
                "nn_module_stack": node.meta.get("nn_module_stack", {}),
            }
    return result


def _fake_like(x: Any, value: Tensor) -> Tensor:
    """``value`` without its data, in the fake mode of the node ``x``."""
    return x.meta["val"].fake_mode.from_tensor(value, static_shapes=True)  # type: ignore[no-any-return]
