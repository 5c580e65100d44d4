"""Low rank beside whole rows: optimality conditions, closed forms, rows found, and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from format_probe import outputs_of
from test_factorizations import analysis_of, random_weight

from geofx.errors import PlanError
from geofx.factorizations import LowRank, LowRankPlusSparse
from geofx.region_analysis import Metric, RegionAnalysis


def kept_rows(form: LowRankPlusSparse, analysis: RegionAnalysis) -> list[int]:
    _, factors = form.fit(analysis.weights, analysis)
    return torch.argsort(factors["index"])[-form.rows :].tolist()


@pytest.mark.parametrize(("rank", "rows"), [(1, 1), (3, 5), (6, 12)])
def test_every_factor_is_at_its_optimum_in_the_metric(rank: int, rows: int) -> None:
    """For the rows that are kept, no step along L, R or D lowers the loss."""
    weight = random_weight(torch.float64)
    analysis = analysis_of(weight)
    form, factors = LowRankPlusSparse(rank, rows).fit(analysis.weights, analysis)
    slope = analysis.metric.gradient(weight - form.to_dense(factors))
    slope = slope[torch.argsort(factors["index"])] / analysis.metric.gradient(weight).norm()
    others = slope[: 24 - rows]
    for part in (slope[24 - rows :], others @ factors["right"].T, factors["left"].T @ others):
        assert part.abs().max() < 1e-12
    kept = torch.argsort(factors["index"])[24 - rows :]
    assert not torch.allclose(factors["kept"], weight[kept], rtol=1e-3)


def test_without_a_metric_kept_rows_are_the_weight_and_the_rest_its_truncation() -> None:
    weight = random_weight(torch.float64)
    analysis = analysis_of(weight, metric=Metric())
    form, factors = LowRankPlusSparse(4, 6).fit(analysis.weights, analysis)
    order = torch.argsort(factors["index"])
    torch.testing.assert_close(factors["kept"], weight[order[18:]], rtol=1e-12, atol=1e-12)
    tail = float(torch.linalg.svdvals(weight[order[:18]])[4:].square().sum())
    assert form.predicted_loss(analysis.region, analysis) == pytest.approx(tail, rel=1e-8)


@pytest.mark.parametrize("side", ["none", "diagonal", "whole"])
def test_the_prediction_is_the_tail_of_the_schur_complement(side: str) -> None:
    """Rows that are free weigh nothing but through what they make good in the others."""
    weight, metric = random_weight(torch.float64), analysis_of(random_weight()).metric
    assert metric.output is not None
    outputs = {"none": None, "diagonal": metric.output.diagonal().clone(), "whole": metric.output}[side]
    analysis = analysis_of(weight, metric=Metric(metric.input, outputs, 0.5))
    form, factors = LowRankPlusSparse(4, 6).fit(analysis.weights, analysis)
    full = torch.eye(24, dtype=torch.float64) if outputs is None else outputs
    full = full.diag() if full.dim() == 1 else full
    others = torch.argsort(factors["index"])[:18]
    schur = torch.linalg.inv(torch.linalg.inv(full)[others][:, others])
    assert metric.input is not None
    roots = torch.linalg.cholesky(schur), torch.linalg.cholesky(metric.input)
    tail = torch.linalg.svdvals(roots[0].T @ weight[others] @ roots[1])[4:].square().sum()
    assert form.predicted_loss(analysis.region, analysis) == pytest.approx(0.5 * float(tail), rel=1e-8)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_rows_that_do_not_fit_are_found_however_large(size: float) -> None:
    rows = [2, 3, 9, 17, 22]
    weight = random_weight(torch.float64, (24, 4), 1) @ random_weight(torch.float64, (4, 20), 2)
    weight[rows] = size * random_weight(torch.float64, (5, 20), 3)
    analysis = analysis_of(weight)
    form = LowRankPlusSparse(4, 5)
    assert kept_rows(form, analysis) == rows
    assert form.predicted_loss(analysis.region, analysis) < 1e-20 * analysis.metric.loss(weight)


def test_it_beats_low_rank_of_the_same_size_where_few_rows_stand_out() -> None:
    weight = random_weight(torch.float64, (24, 3), 1) @ random_weight(torch.float64, (3, 20), 2)
    weight += 0.1 * random_weight(torch.float64, (24, 20), 4)
    weight[:4] = random_weight(torch.float64, (4, 20), 3)
    analysis = analysis_of(weight)
    mixed = LowRankPlusSparse(3, 4)
    numbers = sum(shape[0] * shape[1] for shape in list(mixed.factor_shapes(analysis.region).values())[:3])
    alone = LowRank(-(-numbers // 44))
    rival = alone.predicted_loss(analysis.region, analysis)
    assert mixed.predicted_loss(analysis.region, analysis) < 0.7 * rival


def test_candidates_keep_more_rows_the_larger_they_are() -> None:
    analysis = analysis_of(random_weight(shape=(96, 64)))
    forms = list(LowRankPlusSparse.candidates(analysis.region, analysis))
    assert [form.rows for form in forms] == sorted(form.rows for form in forms)
    assert forms[0].rows <= 2
    assert forms[-1].rows > 80


@pytest.mark.parametrize(("rank", "rows"), [(1, 0), (1, 24), (0, 2), (5, 20), (1, -2)])
def test_settings_outside_the_weight_are_refused(rank: int, rows: int) -> None:
    with pytest.raises(PlanError, match=r"outside 1\.\."):
        LowRankPlusSparse(rank, rows).factor_shapes(analysis_of(random_weight()).region)


def test_onnx_runtime_agrees_at_batch_shapes_not_exported(tmp_path: Path) -> None:
    analysis = analysis_of(random_weight())
    form, factors = LowRankPlusSparse(3, 5).fit(analysis.weights, analysis)
    for found, expected in outputs_of(form, factors, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
