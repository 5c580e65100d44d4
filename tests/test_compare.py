"""The comparison: equal bytes, figures that hold against the eager model, a cache that can be trusted."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from compared import BATCHES, BIASES, BLOCKS, figures_of, row_of, run

import geofx
from geofx import compare_run, recipes
from geofx.analysis import Analysis
from geofx.cache import Cache, default_folder
from geofx.compare_subjects import reads_directions, subjects
from geofx.comparison import Comparison, Figures
from geofx.comparison_figures import draw_chart
from geofx.errors import ArtifactError, ConfigError
from geofx.factorizations import GaugeFixed, LowRank
from geofx.method import Form, Method
from geofx.region_analysis import RegionAnalysis


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_models.build("mlp")


@pytest.fixture(scope="module")
def analysis(model: torch.nn.Module) -> Analysis:
    return geofx.analyze(model, BATCHES)


@pytest.fixture(scope="module")
def decoder() -> Analysis:
    batches = [tiny_models.example("llama", 4, 24, seed) for seed in range(3)]
    return geofx.analyze(tiny_models.build("llama"), batches)


def test_figures_hold_against_the_eager_model(
    analysis: Analysis, model: torch.nn.Module, tmp_path: Path
) -> None:
    """Every figure of one row again, from the definitions and the eager modules alone."""
    figures = figures_of(run(analysis, tmp_path), "low_rank")
    rebuilt, distance, ranks = copy.deepcopy(model), 0.0, []
    singles = {name: item for name, item in analysis.regions.items() if item.region.kind == "single"}
    for name, region in singles.items():
        weight = region.weights[name]
        rank = max(
            r
            for r in range(1, min(weight.shape))
            if r * sum(weight.shape) <= 0.8 * weight.numel() and r % 1 == 0
        )
        forms = [form for form in LowRank.candidates(region.region, region) if form.rank <= rank]
        fitted, factors = forms[-1].fit(region.weights, region)
        dense = fitted.to_dense(factors)
        distance += float((weight - dense).abs().sum())
        ranks.append((forms[-1].rank, weight.shape))
        rebuilt.get_parameter(name).data.copy_(dense)
    stored = sum(rank * sum(shape) for rank, shape in ranks)
    assert (figures.linear_parameters, figures.parameters) == (stored, stored + BIASES)
    assert figures.size_bytes == 4 * (stored + BIASES)
    assert figures.flops_per_token == 2 * stored
    assert figures.compression_ratio == pytest.approx((BLOCKS - stored) / (stored + BIASES))
    assert figures.parameter_mae == pytest.approx(distance / (BLOCKS + BIASES), rel=1e-5)
    with torch.no_grad():
        outputs = [(model(**held), rebuilt(**held)) for held in analysis.holdout]
    error = sum(float((one - other).square().sum()) for one, other in outputs)
    power = sum(float(one.square().sum()) for one, _ in outputs)
    assert figures.loss_increase == pytest.approx(error / power, rel=1e-3)
    assert row_of(run(analysis, tmp_path), "low_rank").kept == pytest.approx(stored / BLOCKS)


def test_uniform_rows_keep_at_most_the_share_and_plans_lose_no_more(
    analysis: Analysis, tmp_path: Path
) -> None:
    made = run(analysis, tmp_path, (0.9, 0.7, 0.5), formats=["low_rank", "gauge_fixed"])
    assert len(made.rows) == 2 * 2 * 3
    for name in ("low_rank", "gauge_fixed"):
        for keep in (0.9, 0.7, 0.5):
            uniform, planned = (row_of(made, name, allocation, keep) for allocation in ("uniform", "planned"))
            assert uniform.figures
            assert planned.figures
            assert uniform.rewritten == 3
            assert 0.8 * keep < (uniform.kept or 0.0) <= keep
            assert (planned.kept or 1.0) <= keep
            assert planned.figures.predicted_loss <= uniform.figures.predicted_loss * (1 + 1e-6)
    losses = [figures_of(made, "low_rank", "uniform", keep).predicted_loss for keep in (0.9, 0.7, 0.5)]
    assert losses == sorted(losses)


def test_a_plan_draws_on_the_settings_fitted_at_every_share(analysis: Analysis, tmp_path: Path) -> None:
    """A format without closed form is fitted at the given shares only, and mixes those."""
    made = run(analysis, tmp_path, (0.9, 0.7, 0.5), formats=["monarch"])
    for keep in (0.9, 0.7, 0.5):
        uniform, planned = (figures_of(made, "monarch", kind, keep) for kind in ("uniform", "planned"))
        assert planned.predicted_loss <= uniform.predicted_loss * (1 + 1e-9)


def test_equal_fits_are_measured_once(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = recipes.Recipe("twin", (Form("low_rank"),), paper=recipes.svd().paper, differs="Nothing.")
    lowered: list[object] = []
    lower = analysis.lower
    monkeypatch.setattr(analysis, "lower", lambda *given: lowered.append(given) or lower(*given))
    made = run(analysis, tmp_path, recipes=[twin])
    assert len(lowered) == 2
    assert row_of(made, "twin").figures == row_of(made, "low_rank").figures


def test_the_original_runs_once_on_each_held_out_batch(analysis: Analysis, tmp_path: Path) -> None:
    seen: list[object] = []
    hook = analysis.original.graph_module.register_forward_pre_hook(lambda *given: seen.append(given))
    made = run(analysis, tmp_path, latency=())
    hook.remove()
    assert sum(row.figures is not None for row in made.rows) > 1
    assert len(seen) == 2 * len(analysis.holdout)  # as reference, and beside itself for its own loss


def test_a_region_that_cannot_be_fitted_stays_dense_with_a_reason(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, broken = LowRank.fit, list(analysis.regions)[1]

    def failing(self: LowRank, weights: Any, region: RegionAnalysis) -> Any:
        if region.region.name == broken:
            raise RuntimeError("this one\nis difficult")
        return fit(self, weights, region)

    monkeypatch.setattr(LowRank, "fit", failing)
    made = run(analysis, tmp_path, formats=["low_rank", "gauge_fixed"])
    row, others = row_of(made, "low_rank"), row_of(made, "gauge_fixed")
    assert row.notes == ("1 x RuntimeError: this one is difficult",)
    assert (row.rewritten, others.rewritten, others.notes) == (2, 3, ())
    planned = row_of(made, "low_rank", "planned")
    assert planned.figures is None or planned.rewritten <= 2
    assert planned.notes


def test_what_failed_by_accident_is_tried_again(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("geofx.compare_run.verify", lambda *_: (_ for _ in ()).throw(OSError("a full disk")))
        patch.setattr(compare_run._Run, "_original", lambda _: (Figures(1, 1, 1, 1.0), 0))
        assert row_of(run(analysis, tmp_path), "low_rank").notes == ("OSError: a full disk",)
    assert row_of(run(analysis, tmp_path), "low_rank").figures is not None


def test_a_comparison_of_nothing_is_refused(analysis: Analysis, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        run(analysis, tmp_path, formats="none")


def test_methods_that_have_no_model_say_why(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr(GaugeFixed, "candidates", broken)
    chosen = ["tt_embedding", "basis_sharing", "svd"]
    made = run(analysis, tmp_path, 0.01, formats=["gauge_fixed"], recipes=chosen)
    assert all(row.figures is None for row in made.rows)
    reasons = {row.name: row.notes for row in made.rows}
    assert "3 x ZeroDivisionError: by design" in reasons["gauge_fixed"]
    assert "the model has no embedding" in reasons["tt_embedding"][0]
    assert "the model has no stack" in reasons["basis_sharing"][0]
    assert reasons["svd"] == ("3 x no setting within 1% of the weight",)


def test_an_embedding_is_compared_on_its_own(decoder: Analysis, tmp_path: Path) -> None:
    made = run(decoder, tmp_path)
    table, blocks = row_of(made, "low_rank/embedding"), row_of(made, "low_rank")
    assert (table.scope, table.rewritten, blocks.scope, blocks.rewritten) == ("embedding", 1, "blocks", 14)
    assert table.figures
    assert blocks.figures
    dense = 128 * 64
    saved = made.original.parameters - table.figures.parameters
    assert table.figures.linear_parameters == dense - saved
    assert table.kept == pytest.approx(1 - saved / dense)
    assert (table.figures.kl or -1.0) >= 0.0
    assert 0.0 <= (table.figures.top1_agreement or -1.0) <= 1.0


def test_regions_of_several_weights_are_rewritten_once(decoder: Analysis, tmp_path: Path) -> None:
    """q, k, v together and gate, up together: 2 + 2 regions, and o and down alone."""
    row = row_of(run(decoder, tmp_path), "low_rank/shared_input")
    assert row.rewritten == 2 * (1 + 1) + 2 * 2
    assert 0.7 < (row.kept or 0.0) <= 0.8


def test_latency_is_timed_in_turns_with_the_original(analysis: Analysis, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    timed = run(analysis, tmp_path, latency=("torch", "onnx"), rounds=2)
    found = figures_of(timed, "low_rank").latency
    assert set(found) == {"torch", "onnx"}
    assert all(item.seconds > 0.0 and item.ratio == item.seconds / item.original_s for item in found.values())
    assert run(analysis, tmp_path, latency=("torch",), rounds=2).rows == timed.rows


def test_python_front_door_compares_and_draws(model: torch.nn.Module, tmp_path: Path) -> None:
    made = geofx.compare(
        model, BATCHES, [0.8, 0.5], formats=["low_rank"], recipes=["svd"], cache=tmp_path, rounds=1
    )
    assert [row.name for row in made.rows] == ["low_rank"] * 4 + ["svd"] * 2
    assert made.methods["recipe svd"]["paper"]["year"] == 2020
    assert Comparison.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False))) == made
    for suffix in (".svg", ".png"):
        draw_chart(made, tmp_path / f"chart{suffix}")
    assert "low_rank*" in (tmp_path / "chart.svg").read_text()
    given = {"formats": iter([LowRank]), "recipes": (name for name in ["svd"])}
    again = geofx.compare(model, BATCHES, [0.8, 0.5], **given, cache=tmp_path, rounds=1)  # type: ignore[arg-type]
    assert again.rows == made.rows
    one = geofx.compare(model, BATCHES, formats=LowRank, recipes="none", latency=(), cache=tmp_path)  # type: ignore[arg-type]
    assert [row.name for row in one.rows] == ["low_rank"] * 2
    with pytest.raises(ConfigError, match="not a chart file"):
        draw_chart(made, tmp_path / "chart.txt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.0}, "a share of 1.0"),
        ({"keep": []}, "no share"),
        ({"keep": None}, "a share of None"),
        ({"keep": "0.8"}, "a share of '0.8'"),
        ({"keep": [0.8, "0.6"]}, "a share of '0.6'"),
        ({"formats": [LowRank(3)]}, r"no format LowRank\(rank=3"),
        ({"recipes": "svd_lm"}, "no recipe 'svd_lm'"),
        ({"latency": "tensorrt"}, "no engine 'tensorrt'"),
        ({"formats": ["low_rang"]}, "the nearest are 'low_rank'"),
        ({"formats": None}, "no format None"),
        ({"recipes": [recipes.svd(), replace(recipes.fwsvd(), name="svd")]}, "two recipes are named 'svd'"),
        ({"recipes": ["svd_lm"]}, "the nearest are 'svd_llm'"),
        ({"latency": ["tensorrt"]}, "no engine 'tensorrt'"),
    ],
)
def test_wrong_settings_are_refused_before_work(
    analysis: Analysis, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(analysis, tmp_path, **settings)


def test_settings_of_one_recipe_are_recipes_apart(analysis: Analysis, tmp_path: Path) -> None:
    chosen = [recipes.asvd(power) for power in (0.5, 3.0)]
    both = run(analysis, tmp_path / "both", 0.6, formats="none", recipes=chosen)
    assert [row.name for row in both.rows] == ["asvd", "asvd-3"]
    for recipe, row in zip(chosen, both.rows, strict=True):
        (alone,) = run(analysis, tmp_path / recipe.name, 0.6, formats="none", recipes=recipe).rows
        assert row.figures
        assert alone.figures
        assert row.figures.predicted_loss == alone.figures.predicted_loss


def test_methods_of_one_name_do_not_share_their_candidates(analysis: Analysis, tmp_path: Path) -> None:
    """A format and a recipe may be namesakes."""
    namesake = replace(recipes.svd(), name="low_rank")
    made = run(analysis, tmp_path, recipes=[namesake])
    rows = made.rows
    assert ["paper" in made.methods[f"{role} low_rank"] for role in ("format", "recipe")] == [False, True]
    (mine,) = (row for row in rows if row.role == "recipe")
    (svd,) = run(analysis, tmp_path, formats="none", recipes=["svd"]).rows
    assert mine.figures == svd.figures


def test_every_format_has_a_subject_for_each_kind_of_region(decoder: Analysis) -> None:
    found = subjects("all", "none", decoder.regions)
    names = [subject.method.name for subject in found]
    assert {"low_rank", "low_rank/shared_input", "low_rank/embedding", "gauge_fixed"} <= set(names)
    assert len(names) == len(set(names))
    assert "dense" not in names
    assert len(subjects("none", "all", decoder.regions)) == len(recipes.all())
    assert reads_directions("all", "none")
    assert reads_directions(["low_rank"], [recipes.espace("nmse")])
    assert not reads_directions(["low_rank"], ["svd"])


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "geofx" / "compare"
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="give another folder"):
        Cache(tmp_path / "file" / "below")


def test_a_method_of_ones_own_can_be_compared(analysis: Analysis, tmp_path: Path) -> None:
    assert Method("m", (Form("low_rank"),)).allocation == "uniform"
    mine = recipes.Recipe(
        "mine", (Form.of("low_rank", weighting="none"),), paper=recipes.svd().paper, differs="All."
    )
    made = run(analysis, tmp_path, formats="none", recipes=[mine, "svd"])
    assert row_of(made, "mine").figures == row_of(made, "svd").figures
