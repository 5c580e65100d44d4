"""What a comparison does again and what it does not: failures that pass, failures that last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import geofx
from geofx import compare_latency, recipes
from geofx.analysis import Analysis
from geofx.compare_latency import Stopwatch
from geofx.compare_run import compare_analysis
from geofx.comparison import Comparison, Latency, Row
from geofx.errors import (
    ArtifactError,
    CaptureError,
    ExportError,
    MissingDependencyError,
    NumericsError,
    ResourceError,
    lasting,
)
from geofx.factorizations import LowRank
from geofx.method import Form
from geofx.region_analysis import RegionAnalysis

NO_MEMORY = (
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return geofx.analyze(tiny_models.build("mlp"), [tiny_models.example("mlp", 64, seed=n) for n in range(4)])


def run(analysis: Analysis, folder: Path, **settings: Any) -> Comparison:
    settings = {"formats": ["low_rank"], "recipes": "none", "latency": (), "rounds": 1, **settings}
    return compare_analysis(analysis, 0.8, cache=folder, **settings)


def uniform(comparison: Comparison) -> Row:
    (row,) = (row for row in comparison.rows if row.allocation == "uniform")
    return row


def failing(monkeypatch: pytest.MonkeyPatch, analysis: Analysis, error: Exception) -> list[str]:
    """One region cannot be fitted, for as long as this holds; the regions that were tried."""
    fit, broken, tried = LowRank.fit, list(analysis.regions)[1], list[str]()

    def failed(self: LowRank, weights: Any, region: RegionAnalysis) -> Any:
        tried.append(region.region.name)
        if region.region.name == broken:
            raise error
        return fit(self, weights, region)

    monkeypatch.setattr(LowRank, "fit", failed)
    return tried


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_lack_of_memory_stops_the_comparison_and_leaves_no_trace(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def listing(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        failing(patched, analysis, error)
        with pytest.raises(type(error)):
            run(analysis, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(LowRank, "candidates", listing)
        with pytest.raises(type(error)):
            run(analysis, tmp_path)
    again = uniform(run(analysis, tmp_path))
    assert (again.rewritten, again.notes) == (3, ())


def test_a_failure_that_may_pass_is_tried_anew(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        failing(patched, analysis, RuntimeError("the device is busy"))
        first = uniform(run(analysis, tmp_path))
    assert (first.rewritten, first.notes) == (2, ("1 x RuntimeError: the device is busy",))
    again = uniform(run(analysis, tmp_path))
    assert (again.rewritten, again.notes) == (3, ())


def test_a_failure_that_would_recur_is_kept(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = failing(monkeypatch, analysis, NumericsError("its values are not finite"))
    first = uniform(run(analysis, tmp_path))
    assert first.notes == ("1 x its values are not finite",)
    tried.clear()
    assert uniform(run(analysis, tmp_path)) == first
    assert tried == []


def test_an_engine_that_cannot_run_a_model_is_not_tried_again(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: Any) -> Any:
        raise ExportError("an operator is not supported")

    lowered: list[object] = []
    lower = analysis.lower
    monkeypatch.setattr(analysis, "lower", lambda *given: lowered.append(given) or lower(*given))
    monkeypatch.setattr(Stopwatch, "_onnx", failed)
    twin = recipes.Recipe("twin", (Form("low_rank"),), paper=recipes.svd().paper, differs="Nothing.")
    made = run(analysis, tmp_path, latency=("torch", "onnx"), recipes=[twin])
    assert {row.notes for row in made.rows} == {("onnx: an operator is not supported",)}
    lowered.clear()
    assert run(analysis, tmp_path, latency=("torch", "onnx"), recipes=[twin]).rows == made.rows
    assert lowered == []


def test_an_engine_that_fails_in_passing_is_tried_again(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: Any) -> Any:
        raise ResourceError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Stopwatch, "_onnx", failed)
        assert uniform(run(analysis, tmp_path, latency="onnx")).notes == ("onnx: the disk is full",)
    monkeypatch.setattr(Stopwatch, "_onnx", lambda *_: Latency(1.0, 2.0))
    again = uniform(run(analysis, tmp_path, latency="onnx"))
    assert again.figures
    assert (again.figures.latency, again.notes) == ({"onnx": Latency(1.0, 2.0)}, ())


def test_an_engine_that_is_not_installed_is_timed_once_it_is(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingDependencyError("onnx is not installed")

    lowered: list[object] = []
    lower = analysis.lower
    monkeypatch.setattr(analysis, "lower", lambda *given: lowered.append(given) or lower(*given))
    monkeypatch.setattr(Stopwatch, "_onnx", lambda *_: Latency(1.0, 2.0))
    with monkeypatch.context() as patched:
        patched.setattr(compare_latency, "require_onnx", missing)
        first = run(analysis, tmp_path, latency="onnx")
        assert uniform(first).notes == ("onnx: onnx is not installed",)
        lowered.clear()
        assert run(analysis, tmp_path, latency="onnx").rows == first.rows
        assert lowered == []
    again = uniform(run(analysis, tmp_path, latency="onnx"))
    assert again.figures
    assert (set(again.figures.latency), again.notes) == ({"onnx"}, ())


def test_what_lasts_is_in_the_numbers_and_what_passes_in_the_machine() -> None:
    for error in (NumericsError("x"), ValueError("x"), torch.linalg.LinAlgError("singular")):
        assert lasting(error)
    others = ArtifactError("x"), MissingDependencyError("x"), OSError("x"), RuntimeError("x")
    assert not any(lasting(error) for error in (*NO_MEMORY, *others))
    wrapped = CaptureError("x")
    wrapped.__cause__ = NO_MEMORY[1]
    assert not lasting(wrapped)
