"""Regions of several weights: one joint metric, and a spectrum that is of it whichever side is decomposed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from factorization_cases import random
from test_factorizations import analysis_of

from geofx import region_analysis
from geofx.linalg import eigh_psd
from geofx.region_analysis import Metric, RegionAnalysis


def wide() -> RegionAnalysis:
    """Twelve outputs of twenty inputs: the output's side is the smaller."""
    return analysis_of(*(random(4, 20, seed=site) for site in range(3)), kind="shared_input")


def test_the_joint_metric_is_built_once() -> None:
    analysis = wide()
    assert analysis.metric is analysis.metric
    assert wide().metric is not analysis.metric


def test_a_metric_that_is_remembered_does_not_keep_its_region() -> None:
    analysis = wide()
    assert analysis.metric.blocks
    there = weakref.ref(analysis)
    del analysis
    gc.collect()
    assert there() is None


@pytest.mark.parametrize("limit", [8, 16384])
def test_spectrum_and_loss_are_of_one_metric_beyond_the_solvers_limit(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(region_analysis, "FULL_DECOMPOSITION_LIMIT", limit, raising=False)
    analysis = wide()
    found, weight = analysis.truncation, analysis.weight
    assert analysis.spectrum.total == pytest.approx(analysis.metric.loss(weight), rel=1e-10)
    for rank in (1, 5, 11):
        change = weight - found.left[:, :rank] @ found.right[:rank]
        assert analysis.spectrum.tail(rank) == pytest.approx(analysis.metric.loss(change), rel=1e-9)


def test_blocks_stand_for_the_matrix_that_they_are_the_diagonal_of() -> None:
    analysis, diagonal = wide(), random(4, seed=9).square()
    metrics = {**analysis.metrics, "layer1.weight": Metric(analysis.metrics["layer.weight"].input, diagonal)}
    mixed = RegionAnalysis(analysis.region, analysis.weights, metrics)
    outputs = [metric.output for metric in metrics.values() if metric.output is not None]
    whole = torch.block_diag(*(part.diag() if part.dim() == 1 else part for part in outputs))  # type: ignore[no-untyped-call]
    weight, inputs = mixed.weight, metrics["layer.weight"].input
    assert inputs is not None
    torch.testing.assert_close(mixed.metric.left(weight), whole @ weight)
    root = torch.linalg.cholesky(whole)
    squares = eigh_psd(root.T @ weight @ inputs @ weight.T @ root)[0]
    torch.testing.assert_close(torch.from_numpy(mixed.spectrum.squares), squares, rtol=1e-9, atol=1e-12)
