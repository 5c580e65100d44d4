"""Monarch against permutation matrices written out, the paper's closed-form projection, and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factorization_cases import random
from format_probe import curvature, outputs_of
from test_factorizations import analysis_of, random_weight
from torch import Tensor

from geofx.errors import NumericsError, PlanError
from geofx.factorizations import Butterfly, Factorization, Kronecker
from geofx.factorizations.block_tensor_train import BlockTensorTrain
from geofx.factorizations.blocks import _block_inverse
from geofx.factorizations.contract import factored_loss
from geofx.factorizations.monarch import Monarch
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site


def permutation(order: Tensor) -> Tensor:
    return torch.eye(order.numel(), dtype=torch.float64)[order]


@pytest.mark.parametrize(("rank", "blocks"), [(1, 4), (2, 4), (3, 2), (7, 1)])
def test_to_dense_is_p_l_pt_r(rank: int, blocks: int) -> None:
    """Block-diagonal matrices and permutation matrices, multiplied out."""
    analysis = analysis_of(random_weight(torch.float64))
    form, factors = Monarch(rank, blocks).fit(analysis.weights, analysis)
    left, right = (torch.block_diag(*factors[name]) for name in ("left", "right"))
    dealt = torch.arange(blocks * blocks * rank).reshape(blocks, blocks, rank).transpose(0, 1).flatten()
    interleaved = torch.arange(24).reshape(blocks, 24 // blocks).T.flatten()
    expected = permutation(interleaved) @ left @ permutation(dealt) @ right
    torch.testing.assert_close(form.to_dense(factors), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rank", "blocks"), [(1, 4), (3, 4), (5, 4), (2, 2)])
def test_without_a_metric_the_error_is_the_blocks_tails(rank: int, blocks: int) -> None:
    """The projection of Dao et al.: each block's truncation, all at once."""
    weight = random_weight(torch.float64)
    analysis = analysis_of(weight, metric=Metric())
    tails = sum(
        float(torch.linalg.svdvals(weight[row::blocks, start : start + 20 // blocks])[rank:].square().sum())
        for row in range(blocks)
        for start in range(0, 20, 20 // blocks)
    )
    found = Monarch(rank, blocks).predicted_loss(analysis.region, analysis)
    assert found == pytest.approx(tails, rel=1e-8, abs=1e-18)


def test_one_block_is_low_rank_in_the_metric() -> None:
    """There the weighted start is the optimum of every rank, so nothing is left to refine."""
    analysis = analysis_of(random_weight(torch.float64))
    found = Monarch(6, 1).predicted_loss(analysis.region, analysis)
    assert found == pytest.approx(analysis.spectrum.tail(6), rel=1e-8)


def test_a_metric_of_diagonal_blocks_is_met_in_closed_form() -> None:
    """Where neither moment joins two blocks, the loss is a sum over blocks whose optima are known."""
    weight, whole = random_weight(torch.float64), analysis_of(random_weight(torch.float64)).metric
    same_rows = torch.arange(24)[:, None] % 4 == torch.arange(24) % 4
    same_columns = torch.arange(20)[:, None] // 5 == torch.arange(20) // 5
    metric = Metric(whole.input * same_columns, whole.output * same_rows)
    roots = torch.linalg.cholesky(metric.output), torch.linalg.cholesky(metric.input)
    whitened = roots[0].T @ weight @ roots[1]
    tails = sum(
        float(torch.linalg.svdvals(whitened[row::4, start : start + 5])[2:].square().sum())
        for row in range(4)
        for start in range(0, 20, 5)
    )
    analysis = analysis_of(weight, metric=metric)
    assert Monarch(2, 4).predicted_loss(analysis.region, analysis) == pytest.approx(tails, rel=1e-8)


@pytest.mark.parametrize("name", ["left", "right"])
def test_the_preconditioner_is_the_inverse_where_the_moment_joins_no_two_blocks(name: str) -> None:
    whole = analysis_of(random_weight(torch.float64)).metric
    apart = torch.arange(24)[:, None] % 4 == torch.arange(24) % 4, torch.eye(4).repeat_interleave(5, 0)
    outputs = whole.output * apart[0] if name == "left" else whole.output
    inputs = whole.input * (apart[1] @ apart[1].T > 0) if name == "right" else whole.input
    factors = {"left": random(4, 6, 8, seed=1), "right": random(4, 8, 5, seed=2)}
    slope = random(*factors[name].shape, seed=3)
    found = _block_inverse(outputs, inputs, (6, 4), (4, 5))(name, factors)(slope)
    curved = curvature(Monarch(2, 4).to_dense, factors, name, Metric(inputs, outputs), found)
    torch.testing.assert_close(curved, slope, rtol=1e-3, atol=1e-3)


def test_a_singular_moment_costs_the_weighted_start_only() -> None:
    weight = random_weight(torch.float64)
    dead = torch.ones(20, dtype=torch.float64)
    dead[3:9] = 0.0
    plain, weighted = (analysis_of(weight, metric=metric) for metric in (Metric(), Metric(dead)))
    form = Monarch(1, 4)
    without = factored_loss(*form.fit(plain.weights, plain), weighted)
    assert factored_loss(*form.fit(weighted.weights, weighted), weighted) < without


@pytest.mark.parametrize(
    "form",
    [
        Monarch(1, 2),
        BlockTensorTrain(1, (2, 8194), (2, 2)),
        Kronecker(1, (2, 8194), (2, 2)),
        Butterfly(2, 1),
    ],
    ids=lambda form: form.name,
)
def test_outputs_beyond_the_dense_solvers_are_refused_before_their_metric_is_written_out(
    form: Factorization,
) -> None:
    """A vocabulary's G is a diagonal; as a matrix it would take gigabytes."""
    weights = {"head": random(16388, 4).float()}
    region = Region("head", "single", (Site("head", (16388, 4)),))
    analysis = RegionAnalysis(region, weights, {"head": Metric(output=torch.ones(16388))})
    with pytest.raises(NumericsError, match="16388 x 16388 is beyond"):
        form.fit(weights, analysis)


def test_it_is_the_square_grid_of_block_tensor_train() -> None:
    analysis = analysis_of(random_weight(torch.float64))
    _, monarch = Monarch(2, 4).fit(analysis.weights, analysis)
    _, other = BlockTensorTrain(2, (6, 4), (4, 5)).fit(analysis.weights, analysis)
    assert all(torch.equal(monarch[name], other[name]) for name in monarch)


@pytest.mark.parametrize(("rank", "blocks"), [(1, 3), (1, 0), (1, -4)])
def test_blocks_that_do_not_divide_the_sides_are_refused(rank: int, blocks: int) -> None:
    with pytest.raises(PlanError, match="do not divide"):
        Monarch(rank, blocks).factor_shapes(analysis_of(random_weight()).region)


@pytest.mark.parametrize("rank", [0, 6])
def test_ranks_beyond_a_block_are_refused(rank: int) -> None:
    with pytest.raises(PlanError, match=r"outside 1\.\.5"):
        Monarch(rank, 4).factor_shapes(analysis_of(random_weight()).region)


def test_onnx_runtime_agrees_at_batch_shapes_not_exported(tmp_path: Path) -> None:
    analysis = analysis_of(random_weight())
    form, factors = Monarch(2, 4).fit(analysis.weights, analysis)
    for found, expected in outputs_of(form, factors, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
