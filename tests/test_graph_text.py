"""Graphs as text: what a rewrite changed, and DOT."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_models

import geofx
from geofx.cli import main
from geofx.factorizations import GaugeFixed, LowRank
from geofx.graph_text import graph_diff, graph_dot, graph_lines
from geofx.model import OptimizedModel

DIFF = """\
--- original
+++ optimized
@@ -106,4 +106,8 @@
 mul_19 = aten.mul.Tensor(silu, linear_5)
-linear_6 = aten.linear(mul_19, model.layers.0.mlp.down_proj.weight[64, 96])
-add_9 = aten.add.Tensor(to_9, linear_6)
+linear_15 = aten.linear(mul_19, model.layers.0.mlp.down_proj.weight_basis[9, 96])
+linear_16 = aten.linear(linear_15, model.layers.0.mlp.down_proj.weight_mix[55, 9])
+narrow = aten.narrow(linear_16, -1, 0, 28)
+narrow_1 = aten.narrow(linear_16, -1, 28, 27)
+cat_5 = aten.cat([narrow, linear_15, narrow_1], -1)
+add_9 = aten.add.Tensor(to_9, cat_5)
 to_11 = aten.to.dtype(add_9, torch.float32)
@@ -116,4 +120,5 @@
 mul_21 = aten.mul.Tensor(model.layers.1.input_layernorm.weight[64], to_12)
-linear_7 = aten.linear(mul_21, model.layers.1.self_attn.q_proj.weight[64, 64])
-view_3 = aten.view(linear_7, [sym_size_int_12, sym_size_int_15, -1, 16])
+linear_17 = aten.linear(mul_21, model.layers.1.self_attn.q_proj.weight_right[4, 64])
+linear_18 = aten.linear(linear_17, model.layers.1.self_attn.q_proj.weight_left[64, 4])
+view_3 = aten.view(linear_18, [sym_size_int_12, sym_size_int_15, -1, 16])
 transpose_4 = aten.transpose.int(view_3, 1, 2)
"""


@pytest.fixture(scope="module")
def result() -> OptimizedModel:
    analysis = geofx.analyze(tiny_models.build("llama"), tiny_models.example("llama"))
    plan = analysis.plan(geofx.Budget(parameters=1.0))
    forms = {
        "model.layers.0.mlp.down_proj.weight": GaugeFixed(9),
        "model.layers.1.self_attn.q_proj.weight": LowRank(4),
    }
    return analysis.apply(plan.edit(forms))


def test_the_rewritten_subgraphs_as_a_diff(result: OptimizedModel, tmp_path: Path) -> None:
    assert result.original is not None
    loaded = geofx.load(result.save(tmp_path / "out"))
    for program in (result.program, loaded.program):
        found = "".join(f"{line}\n" for line in graph_diff(result.original, program))
        assert found == DIFF
    assert not list(graph_diff(result.program, loaded.program))


def test_a_line_per_operation(result: OptimizedModel) -> None:
    nodes = [node for node in result.program.graph.nodes if node.op != "get_attr"]
    lines = graph_lines(result.program)
    assert [line.split(" = ")[0] for line in lines] == [node.name for node in nodes]
    assert lines[0] == "input_ids = input()"


def test_dot_names_every_node_and_edge(result: OptimizedModel) -> None:
    text = graph_dot(result.program)
    nodes = list(result.program.graph.nodes)
    assert len(re.findall(r"^  .* \[label=", text, re.MULTILINE)) == len(nodes)
    assert text.count(" -> ") == sum(len(node.all_input_nodes) for node in nodes)
    assert 'label="model.layers.1.self_attn.q_proj.weight_left[64, 4]", style=rounded' in text


def test_on_the_command_line(
    result: OptimizedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, dot = result.save(tmp_path / "out"), tmp_path / "graph.dot"
    tiny_models.build("llama").save_pretrained(tmp_path / "original")
    assert main(["inspect", str(saved), "--diff", str(tmp_path / "original"), "--dot", str(dot)]) == 0
    assert capsys.readouterr().out == DIFF
    assert dot.read_text().startswith("digraph geofx {")
    tiny_models.build("llama", seed=1).save_pretrained(tmp_path / "other")
    assert main(["inspect", str(saved), "--diff", str(tmp_path / "other")]) == 2
