"""The main job end to end on small models: budgets hold, nothing is lost, what is saved comes back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

import geofx
from geofx.errors import (
    ArtifactMismatchError,
    BudgetInfeasibleError,
    ConfigError,
    NumericsError,
    PassError,
    PlanError,
    VerificationError,
)
from geofx.factorizations import Dense, GaugeFixed, LowRank
from geofx.passes.contract import run_passes
from geofx.passes.lower import Lower
from geofx.program import flat_tensors


def batches_for(name: str, count: int = 4) -> list[dict[str, Any]]:
    return [tiny_models.example(name, 4, 24, seed) for seed in range(count)]


@pytest.fixture(params=tiny_models.MODELS, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def llama() -> geofx.Analysis:
    return geofx.analyze(tiny_models.build("llama"), batches_for("llama"))


def test_every_architecture_meets_its_budget_and_comes_back(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = geofx.optimize(
        model, geofx.Budget(size=0.8, scope="factorizable"), calibration=batches_for(name)
    )
    assert result.plan.rewritten
    saved = result.plan.dense.bytes - result.program.size_bytes()
    assert saved >= 0.2 * result.plan.factorizable.bytes
    assert result.program.size_bytes() == result.plan.predicted.bytes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if name == "mixtral":  # its routers are no plain linear maps, its experts run through a custom operator
        with pytest.raises(ConfigError, match="MixtralTopKRouter is neither a plain linear map nor a lookup"):
            result.to_module()
        with pytest.raises(geofx.GeofxError, match="grouped_mm"):
            result.save(tmp_path / "out")
        return
    eager = result.to_module()
    for batch, length in ((1, 1), (3, 17)):
        inputs = tiny_models.example(name, batch, length, seed=9)
        with torch.no_grad():
            graph = flat_tensors(result(**inputs))
        for one, other in zip(graph, tiny_models.run_eager(eager, name, inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    result.save(tmp_path / "out")
    loaded = geofx.load(tmp_path / "out", module=None if hasattr(model, "config") else model)
    assert loaded.plan == result.plan
    noted = [data.get("rewrite.region") for _, data in loaded.program.to_networkx().nodes(data=True)]
    assert set(noted) - {None} == {choice.region for choice in result.plan.rewritten}
    assert loaded.fidelity == result.fidelity
    with torch.no_grad():
        assert all(
            torch.equal(one, other)
            for one, other in zip(flat_tensors(loaded(**inputs)), flat_tensors(result(**inputs)), strict=True)
        )
    for one, other in zip(
        tiny_models.run_eager(loaded.to_module(), name, inputs),
        tiny_models.run_eager(eager, name, inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_row_2_a_budget_that_is_met_changes_nothing(name: str) -> None:
    model = tiny_models.build(name)
    result = geofx.optimize(model, geofx.Budget(size=1.0), calibration=batches_for(name))
    assert not result.plan.rewritten
    inputs = tiny_models.example(name, 3, 11)
    expected = tiny_models.run_eager(model, name, inputs)
    with torch.no_grad():
        actual = flat_tensors(result(**inputs))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert result.fidelity.loss_increase == 0.0


def test_every_matmul_is_annotated(llama: geofx.Analysis) -> None:
    graph = llama.program.to_networkx()
    linear = [data for _, data in graph.nodes(data=True) if "linear" in data["target"]]
    annotated = [data for data in linear if "sensitivity.rank" in data]
    assert len(annotated) == 15  # with the head
    assert all(len(data["sensitivity.spectrum"]) >= data["sensitivity.rank"] > 0 for data in annotated)


def test_rewrites_are_marked_and_dead_parameters_are_gone(llama: geofx.Analysis) -> None:
    result = llama.apply(llama.plan(geofx.Budget(parameters=0.6, scope="factorizable")))
    graph = result.program.to_networkx()
    marked = {data["rewrite.region"] for _, data in graph.nodes(data=True) if "rewrite.region" in data}
    assert marked == {choice.region for choice in result.plan.rewritten}
    stored = {key for key, _ in result.program.graph_module.named_parameters()}
    assert not marked & stored
    assert {key for key, _ in result.program.tensors()} >= stored


def test_include_and_ignore_limit_what_is_rewritten(llama: geofx.Analysis) -> None:
    plan = llama.plan(
        geofx.Budget(size=0.9, scope="factorizable"), include="*mlp*", ignore=["model.layers.0"]
    )
    assert {choice.region for choice in plan.rewritten} <= {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert any(rejection.reason == "IGNORED" for rejection in plan.rejections)
    with pytest.raises(ConfigError, match="nearest"):
        llama.plan(geofx.Budget(size=0.9), ignore=["lm_haed"])


def test_row_8_a_pattern_may_name_what_cannot_be_factorized(llama: geofx.Analysis) -> None:
    plan = llama.plan(geofx.Budget(size=0.9, scope="factorizable"), ignore=["model.embed_tokens"])
    reasons = {rejection.region: rejection.reason for rejection in plan.rejections}
    assert reasons["model.embed_tokens.weight"] == "IGNORED"
    assert plan.rewritten
    assert llama.plan(geofx.Budget(size=0.9, scope="factorizable"), ignore="lm_head").choices == plan.choices


def test_formats_go_by_name_or_by_class(llama: geofx.Analysis) -> None:
    budget = geofx.Budget(size=0.9)
    expected = llama.plan(budget, formats=[LowRank])
    assert llama.plan(budget, formats=["low_rank"]) == expected
    assert llama.plan(budget, formats="low_rank") == expected
    assert llama.plan(budget, formats=LowRank) == expected
    for wrong in (["low_rang"], [LowRank(3)], [3], 3):
        with pytest.raises(ConfigError, match=r"format.*the nearest are"):
            llama.plan(budget, formats=wrong)  # type: ignore[arg-type]


def test_a_pattern_that_matches_nothing_is_found_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geofx.api.trace", lambda *args: pytest.fail("traced"))
    with pytest.raises(ConfigError, match="nearest"):
        geofx.optimize(
            tiny_models.build("llama"),
            geofx.Budget(size=0.9),
            calibration=batches_for("llama"),
            ignore="haed",
        )


def test_a_model_without_matmuls_is_said_so() -> None:
    with pytest.raises(ConfigError, match=r"no matmul to factorize .*UNSUPPORTED_OP"):
        geofx.optimize(
            nn.Sequential(nn.Conv2d(3, 4, 3)), geofx.Budget(size=0.9), calibration=[torch.randn(4, 3, 8, 8)]
        )


def test_rows_56_and_61_few_samples_shrink_the_moments_and_the_promise_stays_honest() -> None:
    """Twenty tokens in 32 dimensions: without shrinkage the prediction would be a thousand times too low."""
    analysis = geofx.analyze(
        tiny_models.build("mlp"), batches_for("mlp", 6), holdout=batches_for("mlp", 40)[6:]
    )
    result = analysis.apply(analysis.plan(geofx.Budget(size=0.8, scope="factorizable")))
    assert result.plan.loss > 0.2 * result.fidelity.loss_increase


def test_row_3_an_impossible_budget_carries_the_smallest_plan(llama: geofx.Analysis) -> None:
    with pytest.raises(BudgetInfeasibleError, match="cannot be met") as caught:
        llama.plan(geofx.Budget(size=1000))
    best = llama.apply(caught.value.best)
    assert best.program.size_bytes() == caught.value.smallest["size"]


def test_a_plan_edited_by_hand_is_applied_and_predicted(llama: geofx.Analysis, tmp_path: Path) -> None:
    plan = llama.plan(geofx.Budget(size=1.0))
    edited = plan.edit({"model.layers.1.mlp.up_proj.weight": LowRank(8)})
    edited.save(tmp_path / "plan.json")
    result = llama.apply(geofx.Plan.load(tmp_path / "plan.json"))
    (choice,) = result.plan.rewritten
    assert choice.factorization == LowRank(8)
    assert result.plan.loss == pytest.approx(llama.regions[choice.region].spectrum.tail(8))


def test_plans_are_for_one_model(llama: geofx.Analysis) -> None:
    plan = llama.plan(geofx.Budget(size=0.9))
    other = geofx.analyze(tiny_models.build("llama", seed=1), batches_for("llama"))
    with pytest.raises(ArtifactMismatchError):
        other.apply(plan)
    broken = geofx.Plan.from_json(plan.to_json().replace("up_proj", "upp_proj"))
    with pytest.raises(PlanError, match="upp_proj"):
        llama.apply(broken)


def test_a_fit_that_fails_is_planned_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first format to fail at a region is refused there, the budget still holds."""

    def fail(self: GaugeFixed, weights: Any, analysis: Any) -> Any:
        raise NumericsError("the window is singular", where=analysis.region.name)

    monkeypatch.setattr(GaugeFixed, "fit", fail)
    budget = geofx.Budget(size=0.95, scope="factorizable")
    result = geofx.optimize(tiny_models.build("mlp"), budget, calibration=batches_for("mlp", 8))
    assert "gauge_fixed" not in {choice.factorization.name for choice in result.plan.choices}
    assert result.plan.rewritten
    assert any(rejection.reason == "FIT_FAILED" for rejection in result.plan.rejections)
    assert result.plan.used["size"] <= result.plan.limits["size"]


def test_an_explicit_plan_that_cannot_be_fitted_is_an_error(
    monkeypatch: pytest.MonkeyPatch, llama: geofx.Analysis
) -> None:
    def fail(self: GaugeFixed, weights: Any, analysis: Any) -> Any:
        raise NumericsError("singular")

    plan = llama.plan(geofx.Budget(size=0.9, scope="factorizable"))
    monkeypatch.setattr(GaugeFixed, "fit", fail)
    with pytest.raises(NumericsError, match="cannot be fitted"):
        llama.apply(plan)


def test_a_result_that_is_larger_than_planned_is_an_error(
    monkeypatch: pytest.MonkeyPatch, llama: geofx.Analysis
) -> None:
    plan = llama.plan(geofx.Budget(size=0.9, scope="factorizable"))
    wide = GaugeFixed.fit
    monkeypatch.setattr(
        GaugeFixed,
        "fit",
        lambda self, weights, analysis: wide(
            GaugeFixed(min(self.rank + 3, min(analysis.region.site.shape) - 1)), weights, analysis
        ),
    )
    with pytest.raises(VerificationError, match="the plan said"):
        llama.apply(plan)


def test_an_analysis_is_saved_and_serves_the_same_plans(llama: geofx.Analysis, tmp_path: Path) -> None:
    llama.save(tmp_path / "analysis")
    loaded = geofx.load_analysis(tmp_path / "analysis", tiny_models.build("llama"))
    for size in (0.9, 0.6):
        budget = geofx.Budget(size=size, scope="factorizable")
        plan = llama.plan(budget)
        assert loaded.plan(budget).to_json() == plan.to_json()
        first, second = llama.apply(plan), loaded.apply(plan)
        assert first.fidelity == second.fidelity
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key])
    with pytest.raises(ArtifactMismatchError, match="other weights"):
        geofx.load_analysis(tmp_path / "analysis", tiny_models.build("llama", seed=1))
    file = tmp_path / "analysis" / "analysis.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(geofx.GeofxError, match="damaged"):
        geofx.load_analysis(tmp_path / "analysis", tiny_models.build("llama"))


def test_row_37_requires_grad_follows_the_weight() -> None:
    model = tiny_models.build("mlp")
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    analysis = geofx.analyze(model, batches_for("mlp", 8))
    plan = analysis.plan(geofx.Budget(size=1.0)).edit({"2.weight": LowRank(8), "0.weight": LowRank(8)})
    flags = {key: value.requires_grad for key, value in analysis.apply(plan).state_dict().items()}
    assert not flags["2.weight_left"]
    assert flags["0.weight_left"]


def test_row_33_a_shared_layer_gets_one_set_of_factors_at_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    analysis = geofx.analyze(Twice(), [torch.randn(64, 16) for _ in range(4)])
    plan = analysis.plan(geofx.Budget(size=1.0)).edit({"layer.weight": LowRank(4)})
    result = analysis.apply(plan)
    assert sorted(result.state_dict()) == ["layer.bias", "layer.weight_left", "layer.weight_right"]
    assert result.plan.dense.flops == 2 * 2 * 16 * 16
    x = torch.randn(5, 16)
    torch.testing.assert_close(result(x), result.to_module()(x))


def test_row_140_optimizing_the_result_again_counts_from_its_true_size() -> None:
    first = geofx.optimize(
        tiny_models.build("llama"), geofx.Budget(size=0.9), calibration=batches_for("llama")
    )
    second = geofx.optimize(first.to_module(), geofx.Budget(size=1.0), calibration=batches_for("llama"))
    assert second.plan.dense.bytes == first.program.size_bytes()
    again = geofx.optimize(
        first.program.graph_module, geofx.Budget(size=1.0), calibration=batches_for("llama")
    )
    assert again.plan.dense.bytes == first.program.size_bytes()


def test_rows_25_and_112_the_result_is_no_module_but_behaves() -> None:
    result = geofx.optimize(
        tiny_models.build("mlp"), geofx.Budget(size=0.9), calibration=batches_for("mlp", 8)
    )
    assert result.eval() is result
    assert result.train(False) is result
    with pytest.raises(ConfigError, match="to_module"):
        result.train()
    with pytest.raises(ConfigError, match="never pickles"):
        pickle.dumps(result)
    assert copy.copy(result.plan) == result.plan


def test_row_137_global_state_is_left_as_it_was(llama: geofx.Analysis) -> None:
    state = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.random.get_rng_state(),
    )
    geofx.optimize(tiny_models.build("mlp"), geofx.Budget(size=0.9), calibration=batches_for("mlp", 8))
    with pytest.raises(geofx.GeofxError):
        geofx.optimize(tiny_models.build("mlp"), geofx.Budget(size=10), calibration=batches_for("mlp", 8))
    after = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.random.get_rng_state(),
    )
    assert state[:3] == after[:3]
    assert torch.equal(state[3], after[3])


def test_a_loss_budget_gives_the_smallest_model_within_it(llama: geofx.Analysis) -> None:
    ceiling = llama.plan(geofx.Budget(size=0.8, scope="factorizable")).loss
    plan = llama.plan(geofx.Budget(loss=ceiling))
    assert plan.loss <= ceiling * (1 + 1e-9)
    assert plan.predicted.bytes <= llama.plan(geofx.Budget(size=0.8, scope="factorizable")).predicted.bytes


def test_half_precision_models_are_factorized_in_their_own_type() -> None:
    """Row 71: bfloat16 in, bfloat16 out, through float64 in between."""
    model = tiny_models.build("llama").bfloat16()
    result = geofx.optimize(
        model, geofx.Budget(size=0.8, scope="factorizable"), calibration=batches_for("llama")
    )
    assert all(
        value.dtype == torch.bfloat16
        for key, value in result.state_dict().items()
        if "_proj" in key and "index" not in key
    )
    assert result.fidelity.relative_l2 < 1.0


def test_passes_are_held_to_their_contract(llama: geofx.Analysis) -> None:
    program = geofx.trace(tiny_models.build("mlp"), tiny_models.example("mlp"))
    with pytest.raises(PassError, match=r"'lower' reads geofx\.site; run 'find_sites'"):
        run_passes(program, [Lower({"0.weight": (Dense(), {})})])

    class Broken:
        name, reads, writes = "broken", (), ()

        def run(self, program: geofx.Program) -> bool:
            raise RuntimeError("oh")

    with pytest.raises(PassError, match=r"'broken' failed: oh .*already run: none"):
        run_passes(program, [Broken()])
