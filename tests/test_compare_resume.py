"""What a comparison does again and what it does not: failures that pass, failures that last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import geofx
from geofx.analysis import Analysis
from geofx.compare_run import compare_analysis
from geofx.comparison import Comparison, Row
from geofx.errors import ArtifactError, CaptureError, MissingDependencyError, NumericsError, lasting
from geofx.factorizations import LowRank
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


def test_what_lasts_is_in_the_numbers_and_what_passes_in_the_machine() -> None:
    for error in (NumericsError("x"), ValueError("x"), torch.linalg.LinAlgError("singular")):
        assert lasting(error)
    others = ArtifactError("x"), MissingDependencyError("x"), OSError("x"), RuntimeError("x")
    assert not any(lasting(error) for error in (*NO_MEMORY, *others))
    wrapped = CaptureError("x")
    wrapped.__cause__ = NO_MEMORY[1]
    assert not lasting(wrapped)
