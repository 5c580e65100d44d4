"""The graph as Model Explorer reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import geofx
from geofx.annotations import NOTES, REWRITE
from geofx.cli import main
from geofx.factorizations import GaugeFixed, LowRank
from geofx.graph_explorer import graph_model_explorer
from geofx.model import OptimizedModel

DOWN = "model.layers.0.mlp.down_proj.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def result() -> OptimizedModel:
    analysis = geofx.analyze(tiny_models.build("llama"), tiny_models.example("llama"))
    plan = analysis.plan(geofx.Budget(parameters=1.0))
    return analysis.apply(plan.edit({DOWN: GaugeFixed(9), Q: LowRank(4)}))


def nodes_of(text: str) -> dict[str, dict[str, Any]]:
    (graph,) = json.loads(text)["graphs"]
    found = {node["id"]: node for node in graph["nodes"]}
    assert len(found) == len(graph["nodes"])
    return found


def attributes(node: dict[str, Any]) -> dict[str, str]:
    return {item["key"]: item["value"] for item in node["attrs"]}


def test_every_node_edge_and_shape_is_there(result: OptimizedModel) -> None:
    nodes = nodes_of(graph_model_explorer(result.program))
    assert list(nodes) == [node.name for node in result.program.graph.nodes]
    for node in result.program.graph.nodes:
        edges = nodes[node.name]["incomingEdges"]
        assert [edge["sourceNodeId"] for edge in edges] == [part.name for part in node.all_input_nodes]
        assert [edge["targetNodeInputId"] for edge in edges] == [str(at) for at in range(len(edges))]
    shape = {"id": "0", "attrs": [{"key": "tensor_shape", "value": "[2, 16, 4]"}]}
    (inner,) = (node for node in nodes.values() if node["outputsMetadata"] == [shape])
    assert (inner["label"], inner["namespace"]) == ("aten.linear", "model/layers/1/self_attn/q_proj")


def test_nodes_stand_in_the_modules_of_the_weights(result: OptimizedModel) -> None:
    nodes = nodes_of(graph_model_explorer(result.program))

    def labels(namespace: str) -> list[str]:
        return [node["label"] for node in nodes.values() if node["namespace"] == namespace]

    gauge_fixed = ["aten.linear", "aten.linear", "aten.narrow", "aten.narrow", "aten.cat"]
    assert labels("model/layers/0/mlp/down_proj") == ["weight_basis", "weight_mix", *gauge_fixed]
    assert labels("model/layers/1/mlp/down_proj") == ["weight", "aten.linear"]
    assert labels("model/layers/1/mlp") == ["aten.silu", "aten.mul.Tensor"]
    for layer in "01":
        assert "aten.scaled_dot_product_attention" in labels(f"model/layers/{layer}/self_attn")
    assert nodes["input_ids"]["namespace"] == ""


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_that_are_alike_are_nested_alike(name: str) -> None:
    """Residuals come from another layer, before or after what is added to them."""
    nodes = nodes_of(graph_model_explorer(geofx.trace(tiny_models.build(name), tiny_models.example(name))))
    layers: dict[str, list[tuple[str, str]]] = {"0": [], "1": []}
    for node in nodes.values():
        if found := re.fullmatch(r".*/(?:layers|h)/(\d)/(attn|self_attn|mlp)(/.*)?", node["namespace"]):
            layers[found[1]].append((found[2] + (found[3] or ""), node["label"]))
    assert layers["0"] == layers["1"]
    assert "aten.add.Tensor" in [label for _, label in layers["1"]]


def test_a_rewrite_says_what_the_report_knows_of_it(result: OptimizedModel) -> None:
    nodes = nodes_of(graph_model_explorer(result.program, result.report))
    rows = {row.name: row for row in result.report.regions}
    changed = [node for node in result.program.graph.nodes if REWRITE.name in node.meta]
    assert {REWRITE.get(node).region for node in changed} == {DOWN, Q}
    for node in changed:
        row, found = rows[REWRITE.get(node).region], attributes(nodes[node.name])
        assert found["rewrite.factorization"] == row.factorization
        assert found["rewrite.rank"] == str(row.rank)
        assert found["rewrite.predicted_loss"] == f"{row.loss:.4g} nats per token"
        assert float(found["rewrite.kept_ratio"]) == pytest.approx(row.kept_ratio, rel=1e-3)
        assert float(found["sensitivity.effective_rank"]) == row.effective_rank
        assert "rewrite.rank" not in attributes(nodes_of(graph_model_explorer(result.program))[node.name])


def test_a_saved_graph_gives_the_same(result: OptimizedModel, tmp_path: Path) -> None:
    saved, file = result.save(tmp_path / "out"), tmp_path / "graph.json"
    assert main(["inspect", str(saved), "--model-explorer", str(file)]) == 0
    assert file.read_text() == graph_model_explorer(result.program, result.report)


def test_names_drive_nothing(result: OptimizedModel) -> None:
    """What a saved folder brings along is shown without control and direction characters."""
    program = result.program.clone()
    last = next(node for node in program.graph.nodes if REWRITE.name in node.meta)
    last.meta = {NOTES: {"rewrite.region": "\x1b[31m", "site.weight": "a\u202e.\x07b", "\x9b": "\x00"}}
    text = graph_model_explorer(program, result.report)
    assert text.isascii()
    node = nodes_of(text)[last.name]
    assert node["namespace"] == "a�"
    assert attributes(node) == {"rewrite.region": "�[31m", "site.weight": "a�.�b", "�": "�"}
