"""Hidden units dropped with refit: the path against direct solutions, the regions, the way to a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import tiny_models
import torch
from test_factorizations import analysis_of, random_weight
from torch import Tensor, nn

import geofx
from geofx import Budget
from geofx.errors import GeofxError, PlanError
from geofx.factorizations import DroppedUnits, from_json, to_json
from geofx.factorizations.contract import factored_loss, widened
from geofx.plan import Plan
from geofx.program import flat_tensors
from geofx.region_analysis import RegionAnalysis

MODELS = ["llama", "gpt2", "qwen3", "bert", "vit"]


def mlp_analysis() -> RegionAnalysis:
    weights = [random_weight(torch.float64, (40, 20), seed) for seed in (1, 2)]
    return analysis_of(*weights, random_weight(torch.float64, (20, 40), 3), kind="gated_mlp")


def direct_loss(analysis: RegionAnalysis, keep: Tensor) -> tuple[float, Tensor]:
    """Least squares in the square roots of both moments, by an independent solver."""
    last = analysis.region.weights[-1]
    weight, metric = analysis.weights[last], analysis.metrics[last]
    assert metric.input is not None
    assert metric.output is not None
    inputs, outputs = (torch.linalg.cholesky(side) for side in (metric.input, metric.output))
    solved = torch.linalg.lstsq(inputs.T[:, keep], inputs.T @ weight.T, driver="gelsd").solution.T
    wide = torch.zeros_like(weight)
    wide[:, keep] = solved
    return float((outputs.T @ (weight - wide) @ inputs).square().sum()), solved


@pytest.mark.parametrize("units", [39, 33, 21, 8, 1])
def test_the_refit_and_its_loss_are_those_of_least_squares(units: int) -> None:
    analysis = mlp_analysis()
    form, factors = DroppedUnits(units).fit(analysis.weights, analysis)
    assert len(form.indices) == units
    loss, solved = direct_loss(analysis, form.indices)
    torch.testing.assert_close(factors["weight@2"], solved, rtol=1e-7, atol=1e-9)
    assert form.predicted_loss(analysis.region, analysis) == pytest.approx(loss, rel=1e-7)
    assert factored_loss(form, factors, analysis) == pytest.approx(loss, rel=1e-7)
    for site in (0, 1):
        weight = analysis.weights[analysis.region.weights[site]]
        assert torch.equal(factors[f"weight@{site}" if site else "weight"], weight[form.indices])


def test_the_first_unit_dropped_is_the_cheapest_and_the_greedy_choice_beats_the_smallest_norms() -> None:
    analysis = mlp_analysis()
    every = torch.arange(40)
    singles = [direct_loss(analysis, every[every != unit])[0] for unit in range(40)]
    form, _ = DroppedUnits(39).fit(analysis.weights, analysis)
    assert set(every.tolist()) - set(form.indices.tolist()) == {singles.index(min(singles))}
    weight = analysis.weights[analysis.region.weights[-1]]
    largest = weight.norm(dim=0).argsort(descending=True)[:16].sort().values
    chosen = DroppedUnits(16).predicted_loss(analysis.region, analysis)
    assert chosen < direct_loss(analysis, largest)[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_mlps_of_every_architecture_are_found(name: str) -> None:
    analysis = geofx.analyze(tiny_models.build(name), [tiny_models.example(name, 2, 8)])
    found = [item.region for item in analysis.regions.values() if item.region.kind == "gated_mlp"]
    assert len(found) == 2
    for region in found:
        *before, last = region.sites
        assert {site.shape for site in before} == {(96, 64) if name != "gpt2" else (256, 64)}
        assert last.shape == before[0].shape[::-1]


class _Mixed(nn.Module):
    """An MLP whose units see each other, or are seen, or are scaled one by one."""

    def __init__(self, between: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(16, 24), nn.Linear(24, 16), between
        self.norm, self.scale = nn.LayerNorm(24), nn.Parameter(torch.rand(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x), self))


@pytest.mark.parametrize(
    ("between", "found"),
    [
        (lambda h, _: torch.relu(h), 1),
        (lambda h, _: torch.nn.functional.gelu(h) * h.sigmoid() + 1.0, 1),
        (lambda h, _: torch.softmax(h, -1), 0),
        (lambda h, module: module.norm(h), 0),
        (lambda h, module: h * module.scale, 0),
        (lambda h, _: h + h.mean(-1, keepdim=True), 0),
        (lambda h, _: h.flip(-1), 0),
        (lambda h, _: torch.relu(h) + torch.arange(24), 0),
    ],
)
def test_only_units_that_act_one_by_one_make_a_region(between: Any, found: int) -> None:
    torch.manual_seed(0)
    analysis = geofx.analyze(_Mixed(between), [torch.randn(32, 16) for _ in range(2)])
    kinds = [item.region.kind for item in analysis.regions.values()]
    assert kinds.count("gated_mlp") == found


@pytest.mark.parametrize("name", MODELS)
def test_from_the_plan_to_files_and_back(name: str, tmp_path: Path) -> None:
    model, example = tiny_models.build(name), tiny_models.example(name, 2, 10)
    analysis = geofx.analyze(model, [tiny_models.example(name, 4, 24, seed) for seed in range(3)])
    plan = analysis.plan(Budget(size=0.75, scope="factorizable"), formats="dropped_units")
    assert Plan.from_json(plan.to_json()) == plan
    result = analysis.apply(plan)
    assert {choice.kind for choice in result.plan.rewritten} == {"gated_mlp"}
    assert all(choice.factorization.kept for choice in result.plan.rewritten)  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = flat_tensors(result(**example))
        module = result.to_module()
        others = {"module": module(**example)}
        result.save(tmp_path / "saved")
        loaded = geofx.load(tmp_path / "saved")
        others["loaded"] = loaded(**example)
        others["rebuilt"] = loaded.to_module()(**example)
        module.save_pretrained(tmp_path / "checkpoint")  # type: ignore[operator]
        others["checkpoint"] = type(model).from_pretrained(tmp_path / "checkpoint")(**example)  # type: ignore[attr-defined]
    for kind, output in others.items():
        for one, other in zip(flat_tensors(output), expected, strict=True):
            assert float((one - other).abs().max()) < 1e-5, kind
    rewritten = result.parameter_space()
    for factored in result.rewrites.values():
        for weight in factored.weights:
            assert (rewritten.slice(weight) == 0).any(), (
                "a dropped unit is zero at the original's coordinates"
            )
    result.to_onnx(tmp_path / "model.onnx")
    result.to_torchscript(tmp_path / "model.pt")
    assert onnxruntime.InferenceSession(str(tmp_path / "model.onnx")) is not None


def test_units_compete_with_single_matrices_in_one_plan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 24))
    with torch.no_grad():
        model[0].weight[::2], model[0].bias[::2] = 0.0, -1.0  # type: ignore[index]
    analysis = geofx.analyze(model, [torch.randn(4096, 24) for _ in range(3)])
    plan = analysis.plan(Budget(size=0.55))
    assert [choice.factorization.name for choice in plan.rewritten] == ["dropped_units"]
    assert plan.loss == pytest.approx(0.0, abs=1e-3)
    assert analysis.apply(plan).fidelity.loss_increase == pytest.approx(0.0, abs=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": 41}, "outside 1"),
        ({"units": 3, "kept": "//8="}, "16 units named are not 3 of 40"),
        ({"units": 1, "kept": "AAAAAAAB"}, "1 units named are not 1 of 40"),
        ({"units": 3, "kept": "?"}, "base64"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        DroppedUnits(**settings).factor_shapes(mlp_analysis().region)


def test_settings_survive_json() -> None:
    analysis = mlp_analysis()
    form, factors = DroppedUnits(10).fit(analysis.weights, analysis)
    again = from_json(to_json(form))
    assert again == form
    wide = widened(again, factors, 2, (20, 40))
    assert torch.equal(wide[:, form.indices], factors["weight@2"])
    assert int((wide != 0).any(0).sum()) == 10


def test_a_zero_second_moment_is_an_error_of_geofx() -> None:
    analysis = mlp_analysis()
    last = analysis.region.weights[-1]
    metric = analysis.metrics[last]
    assert metric.input is not None
    analysis.metrics[last].input.zero_()  # type: ignore[union-attr]
    with pytest.raises(GeofxError, match="positive definite"):
        DroppedUnits(10).predicted_loss(analysis.region, analysis)
