"""The nesting of a graph's inputs and outputs as JSON: tuple, list, dict, Hugging Face's output classes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from geofx.errors import ArtifactError

logger = logging.getLogger(__name__)

Spec: TypeAlias = pytree.TreeSpec
_LEAF: Spec = pytree.tree_structure(0)
_SEQUENCES: dict[str, type] = {"tuple": tuple, "list": list}


def input_specs(graph: fx.Graph, count: int) -> tuple[list[Spec], Spec | None]:
    """The nesting of each of ``count`` inputs, and of the output; None where the output is returned as it is.

    Raises:
        ArtifactError: the graph takes another number of inputs.
    """
    codegen = graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        specs, output = [_LEAF for node in graph.nodes if node.op == "placeholder"], None
    else:
        args, kwargs = _children(codegen.pytree_info.in_spec)
        specs, output = [*_children(args), *_children(kwargs)], codegen.pytree_info.out_spec
    if len(specs) != count:
        raise ArtifactError(
            f"the graph takes {len(specs)} inputs, and {count} are named", fix="report this as a bug"
        )
    return specs, output


def inputs_spec(names: Sequence[str], specs: Sequence[Spec]) -> Spec:
    """The nesting of a call with the inputs ``names`` given by name."""
    return pytree.TreeSpec(tuple, None, [pytree.TreeSpec(tuple, None, []), _dict_spec(dict, names, specs)])


def tree_to_json(spec: Spec, where: str) -> Any:
    """``spec`` as JSON: "*" for a leaf, else an object with one key, the kind.

    A class that is not Hugging Face's becomes a dict of its fields, with a warning.
    """
    children = _children(spec)
    if not children and spec.num_leaves == 1:
        return "*"
    for kind, sequence in _SEQUENCES.items():
        if spec.type is sequence:
            return {kind: [tree_to_json(child, where) for child in children]}
    names = _field_names(spec, len(children))
    fields = [[name, tree_to_json(child, where)] for name, child in zip(names, children, strict=True)]
    if spec.type is dict:
        return {"dict": fields}
    if output_classes().get(_class_name(spec)) is spec.type:
        return {"class": [_class_name(spec), fields]}
    logger.warning(
        "%s is a %s, which a saved folder cannot name; it loads as a dict", where, _class_name(spec)
    )
    return {"dict": fields}


def tree_from_json(data: Any) -> Spec:
    """The nesting that ``data`` describes; a class that this machine lacks becomes a dict, with a warning.

    Raises:
        ValueError, TypeError, LookupError: it describes none.
    """
    if data == "*":
        return _LEAF
    [(kind, content)] = data.items()
    if kind in _SEQUENCES:
        return pytree.TreeSpec(_SEQUENCES[kind], None, [tree_from_json(child) for child in content])
    name, fields = content if kind == "class" else ("", content)
    if kind not in ("class", "dict") or not all(isinstance(key, (str, int)) for key, _ in fields):
        raise ValueError(f"nesting of kind {kind!r}")
    output = output_classes().get(name, dict) if kind == "class" else dict
    if kind == "class" and output is dict:
        logger.warning("transformers has no %r here; a dict stands for it", name[:80])
    return _dict_spec(output, [key for key, _ in fields], [tree_from_json(child) for _, child in fields])


@cache
def output_classes() -> dict[str, type]:
    """Hugging Face's output classes by name; empty where transformers is not installed."""
    try:
        from transformers import modeling_outputs
        from transformers.utils.generic import ModelOutput
    except ImportError:
        return {}
    members = vars(modeling_outputs).items()
    return {
        name: member
        for name, member in members
        if isinstance(member, type) and issubclass(member, ModelOutput) and member is not ModelOutput
    }


def _dict_spec(kind: type, names: Sequence[str | int], children: Sequence[Spec]) -> Spec:
    if len(set(names)) < len(names):
        raise ValueError("a field appears twice")
    return pytree.TreeSpec(kind, list(names), list(children))


def _children(spec: Spec) -> list[Spec]:
    # torch 2.9 has the list as an attribute only.
    return list(spec.children()) if hasattr(spec, "children") else list(spec.children_specs)


def _field_names(spec: Spec, count: int) -> list[str | int]:
    names: Any = getattr(spec.context, "_fields", spec.context)
    if isinstance(names, (list, tuple)) and names and isinstance(names[0], (list, tuple)):
        names = names[0]  # a registered dataclass: (fields present, fields that are None)
    plain = isinstance(names, (list, tuple)) and all(isinstance(name, (str, int)) for name in names)
    return list(names) if plain and len(names) == count else [str(index) for index in range(count)]


def _class_name(spec: Spec) -> str:
    named = spec.context if isinstance(spec.context, type) else spec.type
    return str(getattr(named, "__name__", named))
