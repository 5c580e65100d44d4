"""A plan into the graph: trace each chosen ``apply`` at its node, inline it, attach the factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from geofx.annotations import REWRITE, SENSITIVITY, SITE, Key, Rewrite
from geofx.factorizations import Dense, Factored, Lookup, Narrowing
from geofx.program import Program

aten = torch.ops.aten

Rewrites = Mapping[str, Factored]


@dataclass(frozen=True)
class Lower:
    """linear(x, W, b) -> apply(x, factors) + b and embedding(W, i) -> lookup(i, factors), region by region.

    Sites of a region read the same shared factors, and what they compute alike is computed once.
    """

    rewrites: Rewrites = field(default_factory=dict)

    name: ClassVar[str] = "lower"
    reads: ClassVar[tuple[Key[Any], ...]] = (SITE,)
    writes: ClassVar[tuple[Key[Any], ...]] = (REWRITE,)

    def run(self, program: Program) -> bool:
        """Rewrite every node whose site has a factorization other than dense."""
        owners: dict[str, tuple[_Lowering, int]] = {}
        for region, factored in self.rewrites.items():
            if not isinstance(factored.factorization, Dense):
                lowering = _Lowering(program, region, factored)
                owners |= {weight: (lowering, site) for site, weight in enumerate(factored.weights)}
        nodes = [node for node in program.graph.nodes if SITE.name in node.meta]
        chosen = [node for node in nodes if SITE.get(node).weight in owners]
        for node in chosen:
            lowering, site = owners[SITE.get(node).weight]
            lowering.lower(node, site)
        return bool(chosen)


class _Lowering:
    """One region on its way into the graph: its factors attached, its nodes so far."""

    def __init__(self, program: Program, region: str, factored: Factored) -> None:
        self.program, self.region, self.factored = program, region, factored
        self.seen: dict[tuple[Any, ...], fx.Node] = {}

    def lower(self, node: fx.Node, site: int) -> None:
        """Replace one use of one site."""
        form, weight = self.factored.factorization, self.factored.weights[site]
        is_lookup = node.target is aten.embedding.default
        data: Any = node.args[1] if is_lookup else node.args[0]
        bias: Any = None if is_lookup else (*node.args, None)[2]
        if isinstance(form, Narrowing) and form.kept_inputs(site, len(self.factored.weights)) is not None:
            _revalue(data)
        with self.program.graph.inserting_before(node):
            stored = self._attributes(data, self.program.weight(weight).requires_grad)
            names = sorted(stored)

            def body(x: Tensor, *parts: Tensor) -> Tensor:
                factors = dict(zip(names, parts, strict=True))
                if not is_lookup:
                    return form.apply(x, factors, site)
                assert isinstance(form, Lookup)
                return form.lookup(x, factors)

            def narrow(whole: Tensor, *parts: Tensor) -> Tensor:
                assert isinstance(form, Narrowing)
                return form.narrow_bias(whole, dict(zip(names, parts, strict=True)))

            result = self._inline(node, body, [data, *(stored[name] for name in names)])
            if bias is not None:
                value = result.meta["val"]
                if isinstance(form, Narrowing) and bias.meta["val"].shape[0] != value.shape[-1]:
                    bias = self._inline(node, narrow, [bias, *(stored[name] for name in names)])
                result = self.program.graph.call_function(aten.add.Tensor, (result, bias))
                result.meta["val"] = value
        REWRITE.set(result, Rewrite(self.region, form.name))
        for key in (SITE, SENSITIVITY):
            if key.name in node.meta:
                result.meta[key.name] = node.meta[key.name]
        node.replace_all_uses_with(result)
        self.program.graph.erase_node(node)

    def _attributes(self, data: Any, trainable: bool) -> dict[str, fx.Node]:
        """A node per factor, before the current one; tensors are stored at the region's first node."""
        found = {}
        for name, attribute in self.factored.attributes.items():
            if (attribute,) not in self.seen:
                self.program.set_tensor(attribute, self.factored.factors[name], trainable=trainable)
                node = self.program.graph.get_attr(attribute)
                node.meta["val"] = _fake_like(data, self.factored.factors[name])
                self.seen[(attribute,)] = node
            found[name] = self.seen[(attribute,)]
        return found

    def _inline(self, node: fx.Node, body: Any, inputs: list[Any]) -> fx.Node:
        """Copy the traced ``body`` in before ``node``; what an earlier site computed alike is reused."""
        with torch.no_grad():
            traced = make_fx(body, pre_dispatch=True)(*(item.meta["val"] for item in inputs))
        traced.graph.eliminate_dead_code()
        copies = dict(
            zip((item for item in traced.graph.nodes if item.op == "placeholder"), inputs, strict=True)
        )
        for item in traced.graph.nodes:
            if item.op == "output":
                return copies[item.args[0]]  # type: ignore[no-any-return]
            if item.op != "placeholder":
                copies[item] = self._copy(item, copies, node.meta.get("nn_module_stack", {}))
        raise AssertionError("a traced graph has an output")

    def _copy(self, item: fx.Node, copies: Mapping[fx.Node, fx.Node], stack: Any) -> fx.Node:
        args = fx.map_arg(item.args, copies.__getitem__)
        kwargs = fx.map_arg(item.kwargs, copies.__getitem__)
        key = (item.target, repr(args), repr(kwargs))
        if item.op == "get_attr" or key not in self.seen:
            copied = self.program.graph.node_copy(item, copies.__getitem__)
            copied.meta = {"val": item.meta.get("val"), "nn_module_stack": stack}
            self.seen[key] = copied
        return self.seen[key]


def _revalue(node: fx.Node) -> None:
    """Values of what stands between rewritten sites and ``node``, whose last dim they have narrowed."""
    if node.op != "call_function" or REWRITE.name in node.meta:
        return
    for argument in node.all_input_nodes:
        _revalue(argument)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: item.meta["val"])
    with node.meta["val"].fake_mode:
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _fake_like(x: Any, value: Tensor) -> Tensor:
    """``value`` without its data, in the fake mode of the node ``x``."""
    return x.meta["val"].fake_mode.from_tensor(value, static_shapes=True)  # type: ignore[no-any-return]
