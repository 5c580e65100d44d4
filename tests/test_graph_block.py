"""One block before and after: what is drawn, and of which layer."""

from __future__ import annotations

import pytest
from tiny_models import build, example

import geofx
from geofx import graph_block
from geofx.block_figure import block_svg
from geofx.graph_block import Block, Box, block_of


def optimized(name: str, kept: float = 0.6) -> geofx.OptimizedModel:
    analysis = geofx.analyze(build(name), example(name))
    budget = geofx.Budget(parameters=kept, scope="factorizable")
    return analysis.apply(analysis.plan(budget, formats=["gauge_fixed"]))


def block(name: str) -> Block:
    found = optimized(name).report.block
    assert found is not None
    return found


def test_a_decoder_block_is_its_matmuls_and_what_joins_them() -> None:
    found = block("llama")
    assert found.title in ("model.layers.0", "model.layers.1")
    labels = [box.label for box in found.before]
    assert labels == [
        "self attn.q proj\n64 × 64",
        "self attn.k proj\n32 × 64",
        "self attn.v proj\n32 × 64",
        "attention",
        "self attn.o proj\n64 × 64",
        "add",
        "mlp.gate proj\n96 × 64",
        "silu",
        "mlp.up proj\n96 × 64",
        "mul",
        "mlp.down proj\n64 × 96",
        "add",
    ]
    boxes = {box.name: box for box in found.before}
    attention = next(box for box in found.before if box.label == "attention")
    assert [boxes[name].label.split()[1] for name in attention.inputs] == ["attn.q", "attn.k", "attn.v"]


def test_what_differs_is_told() -> None:
    found = block("llama")
    gone = {box.label for box in found.before if box.changed}
    new = {box.label for box in found.after if box.changed}
    assert gone
    assert new
    assert not gone & new
    assert "attention" not in gone | new
    kept = {box.label for box in found.after if not box.changed}
    assert kept == {box.label for box in found.before if not box.changed}


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3", "bert", "vit"])
def test_both_residuals_of_a_block_are_there(name: str) -> None:
    found = block(name)
    for boxes in (found.before, found.after):
        assert [box.label for box in boxes].count("add") == 2
        assert [box.label for box in boxes].count("attention") == 1
        seen: set[str] = set()
        for box in boxes:
            assert seen.issuperset(box.inputs)
            seen.add(box.name)


def test_nothing_is_drawn_where_nothing_was_rewritten_or_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = optimized("llama", 1.0)
    assert (whole.report.block is None) == (whole.plan.rewritten == ())
    program = optimized("llama")
    original = program._original(None)
    assert block_of(original, original) is None
    monkeypatch.setattr(graph_block, "MOST_BOXES", 5)
    assert block_of(original, program.program) is None


def test_the_drawing_is_escaped_and_names_what_it_shows() -> None:
    boxes = (Box("a", "<img src=x>\n2 × 2"), Box("b", "add", ("a",), changed=True))
    drawing = block_svg(Block("layers.0", boxes[:1], boxes))
    assert "<img" not in drawing
    assert "&lt;img src=x&gt;" in drawing
    assert "var(--changed)" in drawing
    assert drawing == block_svg(Block("layers.0", boxes[:1], boxes))
