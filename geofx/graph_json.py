"""A Program as JSON and named tensors, and back: data only, so that reading one runs nothing."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from geofx.annotations import NOTES, annotations_of
from geofx.errors import ArtifactCorruptError, ArtifactError, GeofxError
from geofx.graph_ops import function_name, named_function
from geofx.graph_tree import input_specs, inputs_spec, tree_from_json, tree_to_json
from geofx.program import Program

logger = logging.getLogger(__name__)

_PLAIN = (str, int, float)
EXAMPLE_PREFIX = "example/"
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PART = re.compile(r"[\w\-+:/@ ]+")
_DEVICE = re.compile(r"[a-z]{2,16}(:[0-9]{1,3})?")
_MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    AssertionError,
    SyntaxError,
    GeofxError,
)
_RESERVED = frozenset(dir(nn.Module()))
_RESERVED_TOP = frozenset(dir(fx.GraphModule)) | {"_graph", "_in_spec", "_out_spec"}
_TORCH_KINDS = (torch.dtype, torch.layout, torch.memory_format)
_TORCH = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, _TORCH_KINDS)
}


def graph_to_json(program: Program) -> dict[str, Any]:
    """Everything of ``program`` but its numbers, which `graph_tensors` gives under the names used here.

    Raises:
        ArtifactError: the graph calls what is not plain data, such as a submodule or a custom operator.
    """
    _check_attributes(program)
    specs, output = input_specs(program.graph, len(program.input_names))
    first = _first_names(program)
    return {
        "inputs": [
            [name, tree_to_json(spec, f"input {name!r}")]
            for name, spec in zip(program.input_names, specs, strict=True)
        ],
        "output": None if output is None else tree_to_json(output, "output"),
        "nodes": [_node_to_json(node) for node in program.graph.nodes],
        "tensors": {name: _tensor_to_json(tensor, first[name]) for name, tensor in program.tensors()},
        "example": {name: _encode(value, EXAMPLE_PREFIX + name) for name, value in program.example.items()},
        "dynamic_shapes": {
            name: {str(dim): label for dim, label in dims.items()}
            for name, dims in program.dynamic_shapes.items()
        },
        "aliases": dict(program.aliases),
    }


def graph_tensors(program: Program) -> dict[str, Tensor]:
    """The tensors of ``program`` by name, tied ones once, and those of its example under ``example/``."""
    first = _first_names(program)
    found = {name: tensor.detach() for name, tensor in program.tensors() if first[name] == name}
    for name, value in program.example.items():
        _encode(value, EXAMPLE_PREFIX + name, found)
    return found


def graph_from_json(data: Any, tensors: Mapping[str, Tensor]) -> Program:
    """The Program that `graph_to_json` and `graph_tensors` took apart; of node metadata, what geofx noted.

    Raises:
        ArtifactCorruptError: the data is not such a graph, or its tensors are not exactly ``tensors``.
    """
    try:
        return _program(data, tensors)
    except ArtifactError:
        raise
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise ArtifactCorruptError(f"the graph is not well formed: {reason}", where="graph.json") from error


def _program(data: Any, tensors: Mapping[str, Tensor]) -> Program:
    names = tuple(_identifier(name) for name, _ in data["inputs"])
    read = _Tensors(tensors)
    attributes = _attributes(data["tensors"], read)
    example = {
        name: _decode(data["example"][name], _no_node, read) for name in names if name in data["example"]
    }
    if read.left or len(example) < len(data["example"]):
        raise ValueError(f"tensors or examples that the graph does not use: {sorted(read.left)[:3]}")
    graph = _graph(data["nodes"], attributes)
    specs = [tree_from_json(tree) for _, tree in data["inputs"]]
    if sum(spec.num_leaves for spec in specs) != sum(node.op == "placeholder" for node in graph.nodes):
        raise ValueError("inputs and placeholders differ")
    if data["output"] is not None:
        info = _PyTreeInfo(list(names), inputs_spec(names, specs), tree_from_json(data["output"]))
        graph.set_codegen(_PyTreeCodeGen(info))
    module = fx.GraphModule(attributes, graph, class_name="Program")
    dynamic = {
        name: {int(dim): str(label) for dim, label in dims.items()}
        for name, dims in data["dynamic_shapes"].items()
    }
    program = Program(
        module, names, example, dynamic, {str(key): str(name) for key, name in data["aliases"].items()}
    )
    program.check()
    return program


def constant_to_json(value: Any, where: str) -> Any:
    """A value without tensors as JSON, such as a flag among a batch's inputs.

    Raises:
        ArtifactError: it is not plain data.
    """
    return _encode(value, where)


def constant_from_json(value: Any) -> Any:
    """Inverse of `constant_to_json`; ValueError, TypeError or LookupError for what it never gives."""
    return _decode(value, _no_node, _no_tensor)


# --- tensors


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr() if tensor.numel() else id(tensor), tensor.shape, tensor.stride(), tensor.dtype)


def _first_names(program: Program) -> dict[str, str]:
    """For each tensor that the graph reads, the first name that holds the same one."""
    first: dict[tuple[Any, ...], str] = {}
    return {name: first.setdefault(_identity(tensor), name) for name, tensor in program.tensors()}


def _tensor_to_json(tensor: Tensor, first: str) -> dict[str, Any]:
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
    return {
        "stored_as": first,
        "parameter": isinstance(tensor, nn.Parameter),
        "trainable": tensor.requires_grad,
        # Strides choose kernels, and kernels choose the last bits.
        "order": order if tensor.permute(order).is_contiguous() else list(range(tensor.dim())),
    }


class _Tensors:
    """The tensors of a file; remembers which were not asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.left = set(tensors)

    def __call__(self, name: str) -> Tensor:
        self.left.discard(name)
        return self._tensors[name]


def _attributes(data: Any, read: _Tensors) -> dict[str, Any]:
    made: dict[tuple[str, bool, bool], Tensor] = {}
    result: dict[str, Any] = {}
    for name, entry in data.items():
        key = (entry["stored_as"], entry["parameter"], entry["trainable"])
        if key not in made:
            order = entry["order"]
            inverse = [order.index(dim) for dim in range(len(order))]
            tensor = read(key[0]).permute(order).contiguous().permute(inverse)
            made[key] = (
                nn.Parameter(tensor, requires_grad=key[2]) if key[1] else tensor.requires_grad_(key[2])
            )
        result[_path(name)] = made[key]
    return result


# --- nodes


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        raise ArtifactError(
            f"the graph has a {node.op} of {node.target}, which a saved folder cannot hold",
            where=node.name,
            fix="trace the model with geofx.trace, which leaves tensor operators only",
        )
    target = function_name(node.target, node.name) if node.op == "call_function" else node.target
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [_encode(value, node.name) for value in node.args],
        "kwargs": {name: _encode(value, node.name) for name, value in node.kwargs.items()},
        "notes": {name: value for name, value in annotations_of(node).items() if isinstance(value, _PLAIN)},
    }


def _graph(data: Any, attributes: Mapping[str, Any]) -> fx.Graph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for entry in data:
        name, op, target = _identifier(entry["name"]), entry["op"], entry["target"]
        args = _decode({"tuple": entry["args"]}, made.__getitem__, _no_tensor)
        kwargs = {
            _identifier(key): _decode(value, made.__getitem__, _no_tensor)
            for key, value in entry["kwargs"].items()
        }
        made[name] = graph.create_node(op, _target(op, target, attributes), args, kwargs, name=name)
        made[name].meta[NOTES] = _notes(entry["notes"])
        if made[name].name != name:
            raise ValueError(f"node name {name!r} cannot be used")
    if [entry["op"] == "output" for entry in data].index(True) != len(data) - 1:
        raise ValueError("the output is not the last node")
    return graph


def _notes(data: Any) -> dict[str, Any]:
    if not all(isinstance(value, _PLAIN) for value in data.values()):
        raise ValueError("a note is not a plain value")
    return dict(data)


def _target(op: str, target: Any, attributes: Mapping[str, Any]) -> Any:
    if op == "call_function":
        return named_function(target)
    if op == "placeholder":
        return _identifier(target)
    if (op == "get_attr" and target in attributes) or op == target == "output":
        return target
    raise ValueError(f"{op!r} of {target!r}")


def _identifier(name: str) -> str:
    """``name``, which torch.fx writes into Python source, if that is safe."""
    if not _IDENTIFIER.fullmatch(name) or iskeyword(name) or len(name) > 1000:
        raise ValueError(f"{name[:80]!r} is not a name")
    return name


def _path(name: str) -> str:
    """``name``, which torch.fx writes into Python source and onto a module, if that is safe."""
    parts = name.split(".")
    reserved = parts[0] in _RESERVED_TOP or any(part in _RESERVED or iskeyword(part) for part in parts)
    if reserved or len(name) > 1000 or not all(_PART.fullmatch(part) for part in parts):
        raise ValueError(f"{name[:200]!r} cannot be the name of a tensor")
    return name


# --- arguments


def _check_attributes(program: Program) -> None:
    for target in (node.target for node in program.graph.nodes if node.op == "get_attr"):
        value = program.attribute(target)
        if not isinstance(value, Tensor):
            raise ArtifactError(
                f"the graph reads a {type(value).__name__}; only tensors are saved", where=target
            )
        try:
            _path(target)
        except ValueError as error:
            raise ArtifactError(str(error), where=target, fix="rename the module or parameter") from error


def _encode(value: Any, where: str, store: dict[str, Tensor] | None = None) -> Any:
    """An argument as JSON; what JSON lacks becomes an object with one key, its kind."""
    if value is None or isinstance(value, (bool, str)) or (type(value) is int and -(2**63) <= value < 2**63):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, list):
        return [_encode(item, f"{where}.{index}", store) for index, item in enumerate(value)]
    if isinstance(value, (tuple, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        encoded = [(key, _encode(item, f"{where}.{key}", store)) for key, item in items]
        return (
            {"dict": [list(pair) for pair in encoded]}
            if isinstance(value, dict)
            else {"tuple": [v for _, v in encoded]}
        )
    if isinstance(value, slice):
        return {"slice": [_encode(bound, where) for bound in (value.start, value.stop, value.step)]}
    if isinstance(value, Tensor) and where.startswith(EXAMPLE_PREFIX):
        if store is not None:
            store[where] = value.detach()
        return {"tensor": where}
    return _encode_atom(value, where)


def _encode_atom(value: Any, where: str) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, _TORCH_KINDS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, complex):
        return {"complex": [_encode(value.real, where), _encode(value.imag, where)]}
    raise ArtifactError(f"a {type(value).__name__} cannot be saved as an argument", where=where)


def _decode(value: Any, node: Callable[[str], Any], tensor: Callable[[str], Any]) -> Any:
    if isinstance(value, list):
        return [_decode(item, node, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind in ("tuple", "slice", "complex") and isinstance(content, list):
        make: Callable[..., Any] = {"slice": slice, "complex": complex}.get(kind, lambda *items: items)
        return make(*(_decode(item, node, tensor) for item in content))
    if kind == "dict":
        return {_key(key): _decode(item, node, tensor) for key, item in content}
    atoms: dict[str, Callable[[Any], Any]] = {
        "node": node,
        "tensor": tensor,
        "torch": _TORCH.__getitem__,
        "device": _device,
        "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}.__getitem__,
    }
    return atoms[kind](content)


def _key(key: Any) -> str | int:
    if not isinstance(key, (str, int)):
        raise TypeError(f"a {type(key).__name__} as a key")
    return key


def _device(name: str) -> torch.device:
    if not _DEVICE.fullmatch(name):
        raise ValueError(f"device {name[:40]!r}")
    return torch.device(name)


def _no_node(name: str) -> Any:
    raise ValueError(f"node {name!r} in an example")


def _no_tensor(name: str) -> Any:
    raise ValueError(f"tensor {name!r} in the arguments of a node")
