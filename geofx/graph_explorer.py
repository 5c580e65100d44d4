"""A graph for Google's Model Explorer: nested like the modules, with what geofx knows of each node."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import fx

from geofx.annotations import annotations_of
from geofx.graph_block import LAYER
from geofx.graph_text import operation_name
from geofx.passes.chains import Shapes, shapes_of
from geofx.program import Program
from geofx.report import RegionRow, Report
from geofx.report_rows import plain

Path = tuple[str, ...]
"""Names of modules, from the outermost to the innermost."""


def graph_model_explorer(program: Program, report: Report | None = None) -> str:
    """The graph in the JSON format of Model Explorer, every node in the module that its weight's name tells.

    Shapes are those on the program's example. Of a rewritten weight the last node carries the choice, and
    with a ``report`` its rank, its share of the numbers and the loss that is predicted of it.
    """
    paths, shapes = _paths(program), shapes_of(program)
    rows = {row.name: row for row in report.regions} if report else {}
    unit = report.calibration.unit if report and report.calibration else ""
    nodes = [
        {
            "id": node.name,
            "label": _label(node),
            "namespace": plain("/".join(paths[node])),
            "attrs": [
                {"key": plain(key), "value": plain(value)} for key, value in sorted(_facts(node, rows, unit))
            ],
            "incomingEdges": [
                {"sourceNodeId": source.name, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
                for place, source in enumerate(node.all_input_nodes)
            ],
            "outputsMetadata": _outputs(node, shapes),
        }
        for node in program.graph.nodes
    ]
    return json.dumps({"graphs": [{"id": "geofx", "nodes": nodes}]})


def _label(node: fx.Node) -> str:
    return plain(str(node.target).rpartition(".")[2]) if node.op == "get_attr" else operation_name(node)


def _facts(node: fx.Node, rows: Mapping[str, RegionRow], unit: str) -> Iterator[tuple[str, str]]:
    """The annotations that are one number or word, and what the report says of the region."""
    notes = annotations_of(node)
    yield from ((key, str(value)) for key, value in notes.items() if isinstance(value, str | int | float))
    row = rows.get(notes.get("rewrite.region", ""))
    if row is None:
        return
    if row.rank is not None:
        yield "rewrite.rank", str(row.rank)
    yield "rewrite.kept_ratio", f"{row.kept_ratio:.4g}"
    if row.loss is not None:
        yield "rewrite.predicted_loss", f"{row.loss:.4g} {unit}".rstrip()


def _outputs(node: fx.Node, shapes: Shapes) -> list[dict[str, Any]]:
    if node not in shapes:
        return []
    return [{"id": "0", "attrs": [{"key": "tensor_shape", "value": str(list(shapes[node]))}]}]


def _paths(program: Program) -> dict[fx.Node, Path]:
    """The module of each node: that of the tensor it reads, else the one around what it reads from.

    Saved graphs know no modules but those in the names of weights. Between the factors of a rewritten
    weight and its last node everything belongs to that weight.
    """
    ends = {node: str(note) for node in program.graph.nodes if (note := _rewritten(node))}
    factors = tuple(f"{weight}_" for weight in ends.values())
    paths: dict[fx.Node, Path] = {}
    inside: set[fx.Node] = set()
    for node in program.graph.nodes:
        read = next((str(part.target) for part in (node, *node.all_input_nodes) if part.op == "get_attr"), "")
        if node in ends:
            paths[node], within = _modules(ends[node]), False
        elif read:
            paths[node], within = _modules(read), read.startswith(factors)
        else:
            paths[node], within = _around(node, paths, inside)
        if within:
            inside.add(node)
    return paths


def _rewritten(node: fx.Node) -> str | None:
    notes = annotations_of(node)
    return notes.get("site.weight") if "rewrite.region" in notes else None


def _modules(name: str) -> Path:
    return tuple(name.split("."))[:-1]


def _around(node: fx.Node, paths: Mapping[fx.Node, Path], inside: set[fx.Node]) -> tuple[Path, bool]:
    """What the inputs of the last numbered layer have in common, and whether ``node`` is within a rewrite."""
    layers = {source: _layer(paths[source]) for source in sorted(node.all_input_nodes)}
    last = next((layer for layer in reversed(layers.values()) if layer), "")
    near = [source for source, layer in layers.items() if layer == last]
    if near and all(source in inside for source in near):
        return paths[near[0]], True
    return _common([_outside(source, paths) for source in near]), False


def _common(paths: Sequence[Path]) -> Path:
    """What all ``paths`` begin with; of none, nothing."""
    same = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return tuple(names[0] for names in same)


def _layer(path: Path) -> str:
    found = LAYER.match(".".join((*path, "")))
    return found[1] if found else ""


def _outside(source: fx.Node, paths: Mapping[fx.Node, Path]) -> Path:
    """The module in which what comes after ``source`` stands: around the one whose weight that read."""
    reads = any(part.op == "get_attr" for part in source.all_input_nodes)
    return paths[source][:-1] if reads else paths[source]
