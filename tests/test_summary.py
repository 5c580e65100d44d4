"""The report says what a reader must know: where the model is from, its weight, what it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models

import geofx
from geofx.sources import Source
from geofx.summary import summarize, with_source


@pytest.fixture(scope="module")
def analysis() -> geofx.Analysis:
    return geofx.analyze(
        tiny_models.build("mlp"), [tiny_models.example("mlp", 32, seed=seed) for seed in range(4)]
    )


@pytest.mark.parametrize("same", [True, False])
def test_held_out_data_that_is_calibration_data_is_said_to_be(
    same: bool, analysis: geofx.Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "holdout_is_calibration", same, raising=False)
    plan = analysis.plan(geofx.Budget(size=0.9))
    notes = summarize(analysis, plan, analysis.original, None).notes
    assert any("held-out batches are calibration batches" in note for note in notes) == same


@pytest.mark.parametrize("note", ["", "the original is the float32 expansion of a Q4_1 GGUF file"])
def test_the_source_is_described_and_both_models_are_weighed_alike(
    note: str, analysis: geofx.Analysis, tmp_path: Path
) -> None:
    result = analysis.apply(analysis.plan(geofx.Budget(size=0.8)))
    source = Source(tiny_models.build("mlp"), None, "a model", note=note)
    report = with_source(result.report, source, analysis.original, result.program, tmp_path / "out")
    assert report.model == "a model"
    assert report.notes == (*([note] if note else []), *result.report.notes)
    result.save(tmp_path / "out")
    unchanged: Any = analysis.apply(analysis.plan(geofx.Budget(size=1.0)))
    unchanged.save(tmp_path / "original")
    for side, folder in ((report.optimized, "out"), (report.original, "original")):
        assert side.disk_bytes == (tmp_path / folder / "geofx.safetensors").stat().st_size
        assert side.size_bytes is not None
        assert side.disk_bytes > side.size_bytes
