"""What a comparison keeps on disk: not done again, checked, and another where anything differs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from compared import BATCHES, figures_of, row_of, run

import geofx
from geofx import compare_fits
from geofx.analysis import Analysis
from geofx.cache import Cache
from geofx.digest import digest
from geofx.factorizations import GaugeFixed, Hybrid, Monarch, TensorTrain
from geofx.program import flat_tensors
from geofx.region_analysis import RegionAnalysis


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_models.build("mlp")


@pytest.fixture(scope="module")
def analysis(model: torch.nn.Module) -> Analysis:
    return geofx.analyze(model, BATCHES)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The regions that were fitted, in order."""
    done: list[str] = []
    fit = compare_fits.Fits._fit

    def counted(self: Any, key: str, form: Any, analysis: RegionAnalysis) -> Any:
        done.append(analysis.region.name)
        return fit(self, key, form, analysis)

    monkeypatch.setattr(compare_fits.Fits, "_fit", counted)
    return done


def test_what_was_done_is_not_done_again(analysis: Analysis, tmp_path: Path, fits: list[str]) -> None:
    first = run(analysis, tmp_path, formats=["low_rank", "gauge_fixed"])
    assert len(fits) >= 6
    assert not list(tmp_path.glob("*.safetensors"))
    fits.clear()
    assert run(analysis, tmp_path, formats=["low_rank", "gauge_fixed"]).rows == first.rows
    assert fits == []


def test_an_interrupted_run_goes_on_where_it_was(
    analysis: Analysis, tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(analysis, tmp_path / "whole", formats=["low_rank", "gauge_fixed"])
    expected = len(fits)
    fits.clear()
    fit, broken = GaugeFixed.fit, list(analysis.regions)[1]

    def killed(self: GaugeFixed, weights: Any, region: RegionAnalysis) -> Any:
        if region.region.name == broken:
            raise KeyboardInterrupt
        return fit(self, weights, region)

    with monkeypatch.context() as patched:
        patched.setattr(GaugeFixed, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            run(analysis, tmp_path / "parts", formats=["low_rank", "gauge_fixed"])
    resumed = run(analysis, tmp_path / "parts", formats=["low_rank", "gauge_fixed"])
    assert len(fits) == expected + 1
    for before, after in zip(whole.rows, resumed.rows, strict=True):
        assert before.figures
        assert after.figures
        assert before.figures.loss_increase == after.figures.loss_increase


@pytest.mark.parametrize("damage", ["cut", "changed", "not JSON", "empty"])
def test_damaged_entries_are_computed_again(
    analysis: Analysis, tmp_path: Path, fits: list[str], damage: str
) -> None:
    first = run(analysis, tmp_path)
    for file in tmp_path.glob("*.json"):
        text = file.read_text()
        file.write_text(
            {"cut": text[:-40], "changed": text.replace("0.", "1."), "not JSON": "{", "empty": ""}[damage]
        )
    fits.clear()
    again = run(analysis, tmp_path)
    assert len(fits) >= 3
    assert [row.kept for row in again.rows] == [row.kept for row in first.rows]
    assert figures_of(again, "low_rank").loss_increase == figures_of(first, "low_rank").loss_increase


def test_what_goes_wrong_on_the_way_is_tried_anew(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(analysis, "lower", full)
        assert row_of(run(analysis, tmp_path), "low_rank").notes == ("OSError: no space left",)
    again = row_of(run(analysis, tmp_path), "low_rank")
    assert again.figures
    assert again.notes == ()


@pytest.mark.parametrize(
    "module", ["geofx.factorizations.blocks", "geofx.factorizations.folded", "geofx.linalg"]
)
def test_a_change_of_code_that_formats_share_is_another_fit(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, source = compare_fits.code_of.__wrapped__(Monarch), inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda it: source(it) + "\n" * (it.__name__ == module))
    assert compare_fits.code_of.__wrapped__(Monarch) != before


def test_a_change_of_a_part_is_another_fit_of_the_sum_and_of_no_other_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    formats = Hybrid, TensorTrain, Monarch
    before, source = [compare_fits.code_of.__wrapped__(form) for form in formats], inspect.getsource
    part = TensorTrain.__module__
    monkeypatch.setattr(inspect, "getsource", lambda it: source(it) + "\n" * (it.__name__ == part))
    after = [compare_fits.code_of.__wrapped__(form) for form in formats]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True]


def test_factors_fitted_again_come_with_the_form_that_they_were_fitted_in(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that are nearly as good may change places with the number of threads."""
    region = next(item for item in analysis.regions.values() if item.region.kind == "single")
    fits = compare_fits.Fits(Cache(tmp_path), "a model")
    first = fits.get(GaugeFixed(4), region)
    fits.drop()
    monkeypatch.setattr("geofx.factorizations.gauge_fixed.WINDOWS", 2)
    found = fits.factored(first, region)
    fitted, factors = GaugeFixed(4).fit(region.weights, region)
    assert fitted != first.form
    assert found.factorization == fitted
    assert all(torch.equal(found.factors[name], factors[name]) for name in factors)


def _interrupted(value: object) -> str:
    raise KeyboardInterrupt


def test_factors_that_are_damaged_or_gone_are_fitted_again(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), digest("a key")
    cache.write(key, {"loss": 1.5}, {"left": torch.arange(6.0).reshape(2, 3), "index": torch.arange(2)})
    found = cache.read_tensors(key)
    assert found is not None
    assert torch.equal(found["left"], torch.arange(6.0).reshape(2, 3))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    assert cache.read_tensors(key) is None
    cache.write(key, {"loss": 2.5}, {"left": torch.ones(2)})
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("geofx.cache.strict_json.dumps", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.write(key, {"loss": 3.5}, {"left": torch.zeros(2)})
    kept = cache.read_tensors(key)
    assert cache.read(key) == {"loss": 2.5}
    assert kept is not None
    assert torch.equal(kept["left"], torch.ones(2))
    cache.write(key, {"loss": 1.5}, {"left": torch.ones(2)})
    cache.drop_tensors([key])
    assert (cache.read_tensors(key), cache.read(key)) == (None, {"loss": 1.5})
    assert cache.read(digest("another")) is None


def test_other_data_or_other_weights_share_nothing(
    analysis: Analysis, tmp_path: Path, fits: list[str]
) -> None:
    run(analysis, tmp_path)
    fits.clear()
    other = geofx.analyze(tiny_models.build("mlp", seed=1), BATCHES)
    run(other, tmp_path)
    assert len(fits) >= 3
    fits.clear()
    run(geofx.analyze(tiny_models.build("mlp"), [tiny_models.example("mlp", 64, seed=9)] * 3), tmp_path)
    assert len(fits) >= 3


def test_another_loss_shares_no_measurement(model: torch.nn.Module, tmp_path: Path) -> None:
    """In forward mode the moments are the same under any loss; what is measured is not."""

    def analysed(power: float) -> Analysis:
        loss = lambda output, batch: flat_tensors(output)[0].abs().pow(power).mean()  # noqa: E731
        return geofx.analyze(model, BATCHES, mode="forward", loss=loss)

    first, second = (run(analysed(power), tmp_path / "both") for power in (1.0, 2.0))
    alone = run(analysed(2.0), tmp_path / "alone")
    assert figures_of(first, "low_rank").loss != figures_of(second, "low_rank").loss
    assert figures_of(second, "low_rank").loss == figures_of(alone, "low_rank").loss
    assert (first.unit, first.measured_unit) == ("relative squared error of site outputs", "loss per term")


def test_a_saved_analysis_finds_what_was_done(
    analysis: Analysis, model: torch.nn.Module, tmp_path: Path, fits: list[str]
) -> None:
    first = run(analysis, tmp_path / "cache")
    analysis.save(tmp_path / "analysis")
    fits.clear()
    assert run(geofx.load_analysis(tmp_path / "analysis", model), tmp_path / "cache").rows == first.rows
    assert fits == []
