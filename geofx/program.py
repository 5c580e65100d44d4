"""The traced graph with what is needed to run, clone, check and look at it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import networkx
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from geofx.annotations import annotations_of
from geofx.errors import CaptureError, ConfigError

logger = logging.getLogger(__name__)

OUTPUTS_LIMIT = 2 * 2**30
"""Bytes of outputs that are kept lest they be computed again."""


@dataclass(frozen=True, eq=False)
class Program:
    """A plain `fx.GraphModule` and the example it was traced with.

    Attributes:
        graph_module: the graph; the only thing in geofx that changes, and only on a `clone`.
        input_names: the forward arguments that were traced, in order.
        example: those inputs, batch >= 2 and sequence >= 2.
        dynamic_shapes: per input, the dims that may vary (names), for re-export.
        aliases: further names of a weight -> the name it has in the graph (tied weights).
    """

    graph_module: fx.GraphModule
    input_names: tuple[str, ...]
    example: Mapping[str, Any]
    dynamic_shapes: Mapping[str, Mapping[int, str]]
    aliases: Mapping[str, str]

    @property
    def graph(self) -> fx.Graph:
        """The graph of `graph_module`."""
        return self.graph_module.graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on what the model took; returns what the model returned."""
        return self.graph_module(**self.bind(args, kwargs))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, a missing ``attention_mask`` filled with ones.

        Raises:
            ConfigError: an argument that was not traced, or one that is missing.
        """
        if len(args) > len(self.input_names):
            raise ConfigError(
                f"{len(args)} positional arguments", fix=f"pass at most {', '.join(self.input_names)}"
            )
        given = dict(zip(self.input_names, args, strict=False)) | {
            k: v for k, v in kwargs.items() if v is not None
        }
        unknown = sorted(given.keys() - set(self.input_names))
        if unknown:
            fix = f"pass {', '.join(self.input_names)}, or use to_module() for the whole signature"
            raise ConfigError(f"argument {unknown[0]!r} is not an input of the traced graph", fix=fix)
        if "attention_mask" in self.input_names and "attention_mask" not in given and "input_ids" in given:
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        missing = [name for name in self.input_names if name not in given]
        if missing:
            raise ConfigError(f"input {missing[0]!r} is missing", fix=f"pass {', '.join(self.input_names)}")
        return {name: given[name] for name in self.input_names}

    @property
    def takes_sequences(self) -> bool:
        """Whether an input has an axis of tokens."""
        return any("sequence" in dims.values() for dims in self.dynamic_shapes.values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every distinct parameter and buffer that the graph reads, by name."""
        seen: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target not in seen:
                seen.add(node.target)
                value = self.attribute(node.target)
                if isinstance(value, Tensor):
                    yield node.target, value

    def attribute(self, name: str) -> Any:
        """The attribute with dotted ``name``; KeyError where there is none."""
        owner: Any = self.graph_module
        for part in name.split("."):
            if not hasattr(owner, part):
                raise KeyError(name)
            owner = getattr(owner, part)
        return owner

    def weight(self, name: str) -> Tensor:
        """The parameter or buffer ``name``; a tied name gives the one it is tied to."""
        value = self.attribute(self.aliases.get(name, name))
        if not isinstance(value, Tensor):
            raise KeyError(name)
        return value

    def holds(self, name: str) -> bool:
        """Whether there is a parameter or buffer ``name``."""
        try:
            return isinstance(self.attribute(name), Tensor)
        except KeyError:
            return False

    def set_tensor(self, name: str, value: Tensor, *, trainable: bool) -> None:
        """Store ``value`` under dotted ``name``: a parameter, or a buffer if not floating or one already."""
        *path, leaf = name.split(".")
        owner: torch.nn.Module = self.graph_module
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        if leaf not in owner._buffers and (value.is_floating_point() or value.is_complex()):
            owner.register_parameter(leaf, torch.nn.Parameter(value.detach(), requires_grad=trainable))
        else:
            owner.register_buffer(leaf, value)

    def clone(self) -> Program:
        """A program with a graph of its own; tensors are shared until a pass replaces them."""
        memo = {
            id(tensor): tensor for tensor in (*self.graph_module.parameters(), *self.graph_module.buffers())
        }
        module = copy.deepcopy(self.graph_module, memo)
        for old, new in zip(self.graph.nodes, module.graph.nodes, strict=True):
            new.meta = dict(old.meta)
        return replace(self, graph_module=module)

    def on_cpu(self) -> Program:
        """This program, or a clone where parameters have left the CPU with the model that shares them."""
        return self.moved("cpu")

    def moved(self, device: str) -> Program:
        """This program, or a clone with all tensors on ``device``, those that the graph makes too."""
        known = torch.device(device).type
        elsewhere = [(name, tensor) for name, tensor in self.tensors() if tensor.device.type != known]
        if not elsewhere:
            return self
        clone = self.clone()
        for name, tensor in elsewhere:
            clone.set_tensor(name, tensor.detach().to(device), trainable=tensor.requires_grad)
        make_on(clone.graph, device)
        clone.graph_module.recompile()
        return clone

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """Buffers that the graph writes to are put back bit for bit, also on failure."""
        saved = [(buffer, buffer.clone()) for buffer in self.graph_module.buffers()]
        try:
            yield
        finally:
            for buffer, value in saved:
                buffer.copy_(value)

    def check(self) -> None:
        """Lint the graph and check that every attribute exists; recompile.

        Raises:
            CaptureError: the graph is not well formed.
        """
        try:
            self.graph.lint()
            for node in self.graph.nodes:
                if node.op == "get_attr":
                    self.attribute(node.target)
            self.graph_module.recompile()
        except (RuntimeError, KeyError, SyntaxError) as error:
            raise CaptureError(
                f"the graph is not well formed: {error}", fix="report this as a bug"
            ) from error

    def size_bytes(self) -> int:
        """Bytes of all distinct tensors that the graph reads; tied weights count once."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())

    def parameter_count(self) -> int:
        """Floating-point numbers in all distinct tensors that the graph reads."""
        return sum(tensor.numel() for _, tensor in self.tensors() if tensor.is_floating_point())

    def to_networkx(self) -> networkx.DiGraph:
        """The graph with op, target, shape, dtype and every geofx annotation as node attributes."""
        result = networkx.DiGraph()
        for node in self.graph.nodes:
            value = node.meta.get("val")
            shape = str(tuple(value.shape)) if isinstance(value, Tensor) else ""
            result.add_node(
                node.name, op=node.op, target=str(node.target), shape=shape, **annotations_of(node)
            )
            result.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return result


def writes_in_place(node: fx.Node) -> bool:
    """Whether ``node`` writes to the memory of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def make_on(graph: fx.Graph, device: str) -> None:
    """Have the tensors that the nodes of ``graph`` make by themselves made on ``device``."""

    def placed(argument: Any) -> Any:
        return torch.device(device) if isinstance(argument, torch.device) else argument

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, placed)
        node.kwargs = fx.node.map_aggregate(node.kwargs, placed)


@dataclass(eq=False)
class Remembered:
    """What ``run`` gives on batches that were asked for before, up to ``limit`` bytes of tensors."""

    run: Callable[[Any], Any]
    limit: int = OUTPUTS_LIMIT
    _known: dict[int, tuple[Any, Any]] = field(default_factory=dict, init=False)

    def __call__(self, batch: Any) -> Any:
        """The outputs on a batch, which is told by identity."""
        if id(batch) in self._known:
            return self._known[id(batch)][1]
        outputs = self.run(batch)
        size = sum(tensor.nbytes for tensor in flat_tensors(outputs))
        if size <= self.limit:
            self.limit -= size
            self._known[id(batch)] = batch, outputs
        return outputs


def flat_tensors(value: Any) -> list[Tensor]:
    """The tensors in a (nested) output, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
