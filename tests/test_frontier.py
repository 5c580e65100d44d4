"""The frontier: each point is the plan of its share, measured ones are the model; the file and the views."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import tiny_models
from rich.console import Console

import geofx
from geofx import Budget
from geofx.analysis import Analysis
from geofx.errors import ArtifactCorruptError, ConfigError, NumericsError, ResourceError
from geofx.frontier import Frontier
from geofx.frontier_views import draw_frontier, frontier_table
from geofx.optimization import optimize_analysis


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    batches = [tiny_models.example("llama", 4, 24, seed) for seed in range(4)]
    return geofx.analyze(tiny_models.build("llama"), batches)


@pytest.fixture(scope="module")
def measured(analysis: Analysis) -> Frontier:
    return analysis.frontier(shares=[0.9, 0.7], measured=[0.8, 0.7], name="tiny")


def test_each_point_is_the_best_plan_of_its_share(analysis: Analysis, measured: Frontier) -> None:
    assert [point.share for point in measured.points] == [0.9, 0.8, 0.7]
    for point in measured.points:
        plan = analysis.plan(Budget(size=point.share))
        assert (point.size_bytes, point.predicted_loss) == (plan.predicted.bytes, plan.loss)
        assert point.kept == pytest.approx(plan.predicted.bytes / plan.dense.bytes)
        assert point.kept <= point.share
        rest = plan.dense.parameters - plan.factorizable.parameters
        assert point.linear_parameters + rest == point.parameters
    losses = [point.predicted_loss for point in measured.points]
    assert losses == sorted(losses)


def test_measured_points_are_the_model(analysis: Analysis, measured: Frontier) -> None:
    assert [point.loss_increase is None for point in measured.points] == [True, False, False]
    fidelity = analysis.apply(analysis.plan(Budget(size=0.7))).fidelity
    assert fidelity is not None
    assert measured.points[2].loss_increase == pytest.approx(fidelity.loss_increase, rel=1e-5)
    assert measured.points[2].kl == pytest.approx(fidelity.kl, rel=1e-5)
    assert measured.tokens == fidelity.tokens


def test_it_ends_at_the_smallest_plan(analysis: Analysis) -> None:
    found = analysis.frontier(shares=[0.5, 0.05, 0.01])
    assert [point.share for point in found.points] == [0.5, 0.05]
    assert found.points[-1].kept > 0.05
    assert "No plan keeps less than" in text_of(found)


@pytest.mark.parametrize(("axis", "field"), [("flops", "flops_per_token"), ("parameters", "parameters")])
def test_by_flops_and_by_numbers_and_of_the_matmuls_alone(analysis: Analysis, axis: str, field: str) -> None:
    found = analysis.frontier(axis, [0.8], scope="factorizable", ignore="*down_proj*")  # type: ignore[arg-type]
    plan = analysis.plan(Budget(**{axis: 0.8}, scope="factorizable"), ignore="*down_proj*")  # type: ignore[arg-type]
    assert getattr(found.points[0], field) == getattr(plan.predicted, axis)


def test_the_file_round_trips_and_a_damaged_one_names_the_field(measured: Frontier, tmp_path: Path) -> None:
    measured.save(tmp_path / "frontier.json")
    text = (tmp_path / "frontier.json").read_text()
    assert Frontier.from_json(text) == measured
    data = json.loads(text)
    data["points"][1]["share"] = "most"
    with pytest.raises(ArtifactCorruptError, match=r"points\.1\.share"):
        Frontier.from_json(data)


def text_of(frontier: Frontier) -> str:
    console = Console(file=io.StringIO(), width=80)
    for part in frontier_table(frontier):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_and_the_chart(measured: Frontier, tmp_path: Path) -> None:
    lines = text_of(measured).splitlines()
    assert lines[0].strip() == "tiny"
    assert any(line.startswith("dense") or " dense " in line for line in lines)
    assert sum("%" in line for line in lines) == 6, "dense and three points, two of them measured"
    assert "…" not in text_of(measured)
    draw_frontier(measured, tmp_path / "frontier.svg")
    drawn = (tmp_path / "frontier.svg").read_text()
    assert f"measured on {measured.tokens} tokens" in drawn
    draw_frontier(measured, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "frontier.svg").read_bytes()
    with pytest.raises(ConfigError, match="chart"):
        draw_frontier(measured, tmp_path / "frontier.xlsx")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": [0.0]}, "not a share"),
        ({"shares": [1.5]}, "not a share"),
        ({"shares": []}, "no share"),
        ({"shares": ["0.5"]}, "not a share"),
        ({"by": "latency"}, "no axis"),
    ],
)
def test_wrong_requests_are_refused(analysis: Analysis, settings: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ConfigError, match=message):
        analysis.frontier(**settings)


def test_shares_below_the_smallest_plan_measure_that(analysis: Analysis) -> None:
    found = analysis.frontier(shares=[0.9], measured=[0.02, 0.01], scope="factorizable", formats="low_rank")
    assert [point.share for point in found.points] == [0.9, 0.02]
    assert found.points[-1].kept > 0.02
    assert found.points[-1].loss_increase is not None


def test_a_result_is_had_without_the_other_sizes(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert optimize_analysis(analysis, Budget(size=0.8)).report.frontier is not None

    def out_of_time(*_: object, **__: object) -> Frontier:
        raise ResourceError("no plan was found within 20 s")

    monkeypatch.setattr("geofx.optimization.frontier_of", out_of_time)
    assert optimize_analysis(analysis, Budget(size=0.8)).report.frontier is None
    assert "no other sizes: no plan was found" in caplog.text


def test_predictions_in_another_unit_are_not_set_beside_measurements() -> None:
    batches = [tiny_models.example("llama", 4, 24, seed) for seed in range(3)]
    made = geofx.analyze(tiny_models.build("llama"), batches, mode="forward")
    with pytest.raises(ConfigError, match="two_sided"):
        made.frontier(measured=[0.9])


def test_a_point_that_cannot_be_made_costs_no_other(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    apply = analysis.apply

    def some(plan: geofx.Plan) -> geofx.OptimizedModel:
        if plan.budget.size == 0.8:
            raise NumericsError("no factors")
        return apply(plan)

    monkeypatch.setattr(analysis, "apply", some)
    found = analysis.frontier(shares=[0.9], measured=[0.9, 0.8])
    assert [point.loss_increase is None for point in found.points] == [False, True]
    assert "no factors" in caplog.text


def test_nothing_to_measure_on_is_said_before_any_work() -> None:
    example = tiny_models.example("mlp", 8)
    bare = geofx.analyze(tiny_models.build("mlp"), mode="data_free", example=example)
    assert len(bare.frontier(shares=[0.9, 0.8]).points) == 2
    with pytest.raises(ConfigError, match="held-out"):
        bare.frontier(shares=[0.9], measured=[0.9])
