"""Butterflies against their sparse factors written out, the transforms that they hold, and closed forms."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import scipy.linalg
import torch
from format_probe import outputs_of
from test_factorizations import analysis_of, random_weight
from torch import Tensor

from geofx.errors import PlanError
from geofx.factorizations import Butterfly, Factors
from geofx.factorizations.contract import factored_loss
from geofx.region_analysis import Metric

SETTINGS = [((24, 20), 2, 3), ((32, 64), 5, 2), ((64, 32), 4, 3), ((32, 32), 3, 8)]


def random_factors(shape: tuple[int, int], form: Butterfly) -> dict[str, Tensor]:
    region = analysis_of(random_weight(torch.float64, shape)).region
    return {
        name: random_weight(torch.float64, size, seed)  # type: ignore[arg-type]
        for seed, (name, size) in enumerate(form.factor_shapes(region).items())
    }


def written_out(factors: Factors, levels: int) -> Tensor:
    """Π B_l, entry by entry: bits before l are those of the input, after l those of the output."""
    result = None
    for level in range(1, levels + 1):
        factor = factors[f"factor{level}"]
        above, below = factor.shape[1] // 2, factor.shape[2] // 2
        matrix = torch.zeros(2**levels * above, 2**levels * below, dtype=factor.dtype)
        after = 2 ** (levels - level)
        for block, i, j in product(range(2 ** (levels - 1)), range(2), range(2)):
            row, column = (((block // after) * 2 + bit) * after + block % after for bit in (i, j))
            piece = factor[block, i * above : (i + 1) * above, j * below : (j + 1) * below]
            matrix[row * above : (row + 1) * above, column * below : (column + 1) * below] = piece
        result = matrix if result is None else result @ matrix
    assert result is not None
    return result


@pytest.mark.parametrize(("shape", "levels", "rank"), SETTINGS)
def test_it_is_the_product_of_sparse_factors(shape: tuple[int, int], levels: int, rank: int) -> None:
    form = Butterfly(levels, rank)
    factors = random_factors(shape, form)
    expected = written_out(factors, levels)
    scale = float(expected.abs().max())
    torch.testing.assert_close(form.to_dense(factors), expected, rtol=1e-12, atol=1e-13 * scale)
    x = random_weight(torch.float64, (5, shape[1]), 3).reshape(5, 1, shape[1])
    torch.testing.assert_close(form.apply(x, factors), x @ expected.T, rtol=1e-11, atol=1e-12 * scale)


@pytest.mark.parametrize(("shape", "levels", "rank"), SETTINGS)
def test_a_butterfly_of_any_depth_is_found_again(shape: tuple[int, int], levels: int, rank: int) -> None:
    form = Butterfly(levels, rank)
    weight = form.to_dense(random_factors(shape, form))
    analysis = analysis_of(weight)
    _, factors = form.fit(analysis.weights, analysis)
    assert (form.to_dense(factors) - weight).norm() / weight.norm() < 1e-10


def test_the_hadamard_transform_takes_n_log_n_numbers() -> None:
    """Dao et al. (2019): 2 n log₂ n numbers hold the fast transform, and the splits find them."""
    weight = torch.from_numpy(scipy.linalg.hadamard(64)).double()
    analysis = analysis_of(weight)
    form, factors = Butterfly(6, 1).fit(analysis.weights, analysis)
    assert sum(part.numel() for part in factors.values()) == 2 * 64 * 6
    torch.testing.assert_close(form.to_dense(factors), weight, rtol=1e-12, atol=1e-12)


def quarters(matrix: Tensor) -> list[Tensor]:
    """The submatrices with j_1 and i_2 given, of two levels: every other run of rows, half the columns."""
    rows, columns = (side // 4 for side in matrix.shape)
    runs = torch.arange(4 * rows).reshape(2, 2, rows)
    return [
        matrix[runs[:, i].flatten()][:, 2 * columns * j : 2 * columns * (j + 1)]
        for i in range(2)
        for j in range(2)
    ]


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_two_levels_are_optimal_without_a_metric(rank: int) -> None:
    """Le et al. (2022): the two-factor problem is solved exactly, by each submatrix's truncation."""
    weight = random_weight(torch.float64, (24, 16))
    tails = sum(float(torch.linalg.svdvals(part)[rank:].square().sum()) for part in quarters(weight))
    analysis = analysis_of(weight, metric=Metric())
    found = Butterfly(2, rank).predicted_loss(analysis.region, analysis)
    assert found == pytest.approx(tails, rel=1e-8)


def test_a_metric_of_diagonal_blocks_is_met_in_closed_form() -> None:
    weight, whole = random_weight(torch.float64), analysis_of(random_weight(torch.float64)).metric
    rows, columns = torch.arange(24) // 6 % 2, torch.arange(20) // 10
    metric = Metric(
        whole.input * (columns[:, None] == columns), whole.output * (rows[:, None] == rows), scale=2.0
    )
    roots = torch.linalg.cholesky(metric.output), torch.linalg.cholesky(metric.input)
    tails = sum(
        float(torch.linalg.svdvals(part)[2:].square().sum())
        for part in quarters(roots[0].T @ weight @ roots[1])
    )
    analysis = analysis_of(weight, metric=metric)
    found = Butterfly(2, 2).predicted_loss(analysis.region, analysis)
    assert found == pytest.approx(2.0 * tails, rel=1e-8)


@pytest.mark.parametrize(("shape", "levels", "rank"), [((32, 64), 5, 2), ((64, 32), 4, 2), ((32, 32), 3, 3)])
def test_deep_products_gain_from_the_metric(shape: tuple[int, int], levels: int, rank: int) -> None:
    weight, form = random_weight(torch.float64, shape), Butterfly(levels, rank)
    plain, weighted = analysis_of(weight, metric=Metric()), analysis_of(weight)
    without = factored_loss(*form.fit(plain.weights, plain), weighted)
    assert factored_loss(*form.fit(weighted.weights, weighted), weighted) < 0.9 * without


def test_candidates_have_three_levels_where_the_sides_allow_it() -> None:
    for shape, levels in (((32, 64), {3}), ((24, 20), {2}), ((18, 20), set())):
        analysis = analysis_of(random_weight(shape=shape))
        assert {form.levels for form in Butterfly.candidates(analysis.region, analysis)} == levels


@pytest.mark.parametrize("levels", [1, 0, -3, 3, 2**40])
def test_levels_that_do_not_fit_are_refused(levels: int) -> None:
    with pytest.raises(PlanError, match="levels do not fit"):
        Butterfly(levels, 1).factor_shapes(analysis_of(random_weight()).region)


@pytest.mark.parametrize("rank", [0, 11])
def test_ranks_beyond_a_submatrix_are_refused(rank: int) -> None:
    with pytest.raises(PlanError, match=r"outside 1\.\.10"):
        Butterfly(2, rank).factor_shapes(analysis_of(random_weight()).region)


def test_onnx_runtime_agrees_at_batch_shapes_not_exported(tmp_path: Path) -> None:
    analysis = analysis_of(random_weight(shape=(16, 24)))
    form, factors = Butterfly(3, 2).fit(analysis.weights, analysis)
    for found, expected in outputs_of(form, factors, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
