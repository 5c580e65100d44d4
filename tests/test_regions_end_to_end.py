"""Regions of several sites and tables through everything: plan, graph, module, folder, ONNX, TorchScript."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

import geofx
from geofx.factorizations import Factorization, LowRank, SharedBasis, SharedWeight, TensorTrain

PAIR = "model.layers.{0,1}."
ATTENTION, MLP = (
    "model.layers.0.self_attn.{q_proj,k_proj,v_proj}.weight",
    "model.layers.1.mlp.{gate_proj,up_proj}.weight",
)
CHOICES: dict[str, dict[str, Factorization]] = {
    "shared_input": {ATTENTION: LowRank(12), MLP: LowRank(20)},
    "stack": {
        f"{PAIR}mlp.down_proj.weight": SharedBasis(24),
        f"{PAIR}self_attn.o_proj.weight": SharedWeight(),
    },
    "tied_embedding": {"model.embed_tokens.weight": LowRank(24)},
    "tied_embedding of cores": {"model.embed_tokens.weight": TensorTrain((16, 8), (8, 8), (32,))},
}


@pytest.fixture(scope="module")
def analysis() -> geofx.Analysis:
    torch.manual_seed(0)
    batches = [tiny_models.example("llama", batch=2, length=16, seed=seed) for seed in range(4)]
    return geofx.analyze(tiny_models.build("llama"), batches)


def planned(analysis: geofx.Analysis, changes: dict[str, Factorization]) -> geofx.Plan:
    """All dense but for ``changes``, whose regions take the place of their sites' own."""
    dense = analysis.plan(geofx.Budget(size=1.0))
    return dense.edit(changes, [item.region for item in analysis.regions.values()])


@pytest.fixture(params=CHOICES)
def result(request: pytest.FixtureRequest, analysis: geofx.Analysis) -> geofx.OptimizedModel:
    return analysis.apply(planned(analysis, CHOICES[request.param]))


def expected_logits(
    analysis: geofx.Analysis, result: geofx.OptimizedModel, ids: torch.Tensor
) -> torch.Tensor:
    """The dense model with every rewritten weight multiplied out, site by site."""
    model = tiny_models.build("llama")
    named = dict(model.named_parameters())
    with torch.no_grad():
        for factored in result.rewrites.values():
            for site, weight in enumerate(factored.weights):
                named[weight].copy_(factored.factorization.to_dense(factored.factors, site))
        return model(ids).logits


def test_graph_and_module_compute_what_the_factors_multiply_out_to(
    analysis: geofx.Analysis, result: geofx.OptimizedModel
) -> None:
    ids = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(3))
    expected = expected_logits(analysis, result, ids)
    for run in (result, result.to_module()):
        torch.testing.assert_close(run(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_what_sites_share_is_stored_and_computed_once(
    analysis: geofx.Analysis, result: geofx.OptimizedModel
) -> None:
    assert result.program.size_bytes() == result.plan.predicted.bytes
    assert result.program.size_bytes() < analysis.original.size_bytes()
    attributes = [node for node in result.program.graph.nodes if node.op == "get_attr"]
    shared = [node for node in attributes if "right" in str(node.target)]
    for node in shared:
        assert sum(other.target == node.target for other in attributes) == 1
    if ATTENTION in result.rewrites:
        (bases,) = (node for node in shared if "layers.0" in str(node.target))
        assert len(bases.users) == 1, "x Rᵀ is computed once for q, k and v"
    module = result.to_module()
    stored = result.program.graph_module.parameters()
    assert sum(part.numel() for part in module.parameters()) == sum(part.numel() for part in stored)


def test_plan_and_folder_come_back(
    analysis: geofx.Analysis, result: geofx.OptimizedModel, tmp_path: Path
) -> None:
    assert geofx.Plan.from_json(result.plan.to_json()) == result.plan
    result.save(tmp_path / "saved")
    loaded = geofx.load(tmp_path / "saved")
    ids = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(4))
    expected = result(input_ids=ids).logits
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    torch.testing.assert_close(loaded.to_module()(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_exports_are_checked_and_hold_the_factors_only(result: geofx.OptimizedModel, tmp_path: Path) -> None:
    """Both exporters compare with the graph themselves, and ONNX Runtime's bytes with the planned ones."""
    report = result.to_onnx(tmp_path / "model.onnx")
    assert report.optimized_bytes <= report.planned_bytes
    result.to_torchscript(tmp_path / "model.pt")


def test_tables_stay_whole_unless_they_are_named(analysis: geofx.Analysis) -> None:
    budget, table = geofx.Budget(parameters=0.75), "model.embed_tokens.weight"
    plan = analysis.plan(budget)
    assert table not in {choice.region for choice in plan.choices}
    assert "NOT_NAMED" in {item.reason for item in plan.rejections if item.region == table}
    assert table in {choice.region for choice in analysis.plan(budget, include="*").choices}
    little = geofx.Budget(parameters=0.97)
    assert {choice.region for choice in analysis.plan(little, include=table).rewritten} == {table}


def test_a_plan_of_its_own_accord(analysis: geofx.Analysis) -> None:
    """Overlapping regions in one exact plan: every weight is rewritten at most once."""
    plan = analysis.plan(geofx.Budget(parameters=0.7), include="*", formats=[LowRank, SharedBasis])
    weights = [weight for choice in plan.choices for weight in choice.weights]
    assert len(weights) == len(set(weights)) == 15
    assert any(choice.kind in ("shared_input", "stack") for choice in plan.rewritten)
    assert analysis.apply(plan).program.parameter_count() <= 0.7 * analysis.original.parameter_count()
