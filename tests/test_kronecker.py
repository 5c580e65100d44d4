"""Kronecker sums against torch.kron, Van Loan and Pitsianis' closed form, and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from factorization_cases import random
from format_probe import curvature, outputs_of
from test_factorizations import analysis_of, random_weight
from torch import Tensor

from geofx.errors import PlanError
from geofx.factorizations.contract import factored_loss
from geofx.factorizations.kronecker import Kronecker, _inverse, _sides
from geofx.region_analysis import Metric

ROWS, COLUMNS = (6, 4), (5, 4)


def rearranged(weight: Tensor) -> np.ndarray:
    """One row per block of the weight, written with plain slices."""
    array = weight.numpy()
    return np.stack(
        [array[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(-1) for i in range(6) for j in range(5)]
    )


@pytest.mark.parametrize("terms", [1, 3, 16])
def test_without_a_metric_the_error_is_van_loans(terms: int) -> None:
    weight = random_weight(torch.float64)
    analysis = analysis_of(weight, metric=Metric())
    form, factors = Kronecker(terms, ROWS, COLUMNS).fit(analysis.weights, analysis)
    values = np.linalg.svd(rearranged(weight), compute_uv=False)
    error = float((weight - form.to_dense(factors)).square().sum())
    assert error == pytest.approx(float((values[terms:] ** 2).sum()), rel=1e-8, abs=1e-18)


def test_to_dense_is_the_sum_of_numpys_kron() -> None:
    analysis = analysis_of(random_weight(torch.float64))
    form, factors = Kronecker(3, ROWS, COLUMNS).fit(analysis.weights, analysis)
    left, right = factors["left"].numpy(), factors["right"].numpy()
    expected = sum(np.kron(left[:, k], right[k]) for k in range(3))
    np.testing.assert_allclose(form.to_dense(factors).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [(6, 4), (24, 1), (2, 12)])
@pytest.mark.parametrize("columns", [(5, 4), (1, 20), (10, 2)])
def test_a_separable_metric_is_met_in_closed_form(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """Whitening by the four parts turns the loss into a Frobenius norm, whose optimum is known."""
    parts = [part @ part.T + torch.eye(len(part)) for part in map(_square, (*rows, *columns), range(4))]
    outputs, inputs = torch.kron(parts[0], parts[1]), torch.kron(parts[2], parts[3])
    weight = random_weight(torch.float64)
    analysis = analysis_of(weight, metric=Metric(inputs, outputs))
    roots = [torch.linalg.cholesky(part) for part in parts]
    whitened = torch.kron(roots[0], roots[1]).T @ weight @ torch.kron(roots[2], roots[3])
    folded = whitened.reshape(*rows, *columns).transpose(1, 2).reshape(rows[0] * columns[0], -1)
    tail = torch.linalg.svdvals(folded)[1:].square().sum()
    assert Kronecker(1, rows, columns).predicted_loss(analysis.region, analysis) == pytest.approx(
        float(tail), rel=1e-8, abs=1e-10
    )


@pytest.mark.parametrize("name", ["left", "right"])
def test_the_preconditioner_is_the_inverse_where_the_metric_is_separable(name: str) -> None:
    parts = [part @ part.T + torch.eye(len(part)) for part in map(_square, (6, 4, 5, 4), range(4))]
    metric = Metric(torch.kron(parts[2], parts[3]), torch.kron(parts[0], parts[1]))
    form = Kronecker(3, ROWS, COLUMNS)
    factors = {"left": random(6, 3, 5, seed=1), "right": random(3, 4, 4, seed=2)}
    slope = random(*factors[name].shape, seed=3)
    found = _inverse(_sides(metric, ROWS, COLUMNS), name, factors)(slope)
    curved = curvature(form.to_dense, factors, name, metric, found)
    torch.testing.assert_close(curved / curved.norm(), slope / slope.norm(), rtol=1e-4, atol=1e-4)


def _square(size: int, seed: int) -> Tensor:
    return torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", ["input", "output", "diagonal"])
def test_a_metric_of_one_side_or_of_diagonals_is_used(side: str) -> None:
    whole = analysis_of(random_weight(torch.float64)).metric
    metric = {
        "input": Metric(whole.input),
        "output": Metric(None, whole.output),
        "diagonal": Metric(torch.arange(1.0, 21).double(), torch.arange(1.0, 25).double()),
    }[side]
    weight = random_weight(torch.float64)
    plain, weighted = analysis_of(weight, metric=Metric()), analysis_of(weight, metric=metric)
    form = Kronecker(4, ROWS, COLUMNS)
    without = factored_loss(*form.fit(plain.weights, plain), weighted)
    assert factored_loss(*form.fit(weighted.weights, weighted), weighted) < 0.95 * without


@pytest.mark.parametrize("folds", [((6, 5), (5, 4)), ((6, 4), (5, 5)), ((0, 4), (5, 4)), ((-6, -4), (5, 4))])
def test_folds_that_do_not_multiply_to_the_shape_are_refused(
    folds: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    region = analysis_of(random_weight()).region
    with pytest.raises(PlanError, match="do not multiply"):
        Kronecker(1, *folds).factor_shapes(region)


@pytest.mark.parametrize("terms", [0, 17])
def test_more_terms_than_the_rearranged_rank_are_refused(terms: int) -> None:
    with pytest.raises(PlanError, match=r"outside 1\.\.16"):
        Kronecker(terms, ROWS, COLUMNS).factor_shapes(analysis_of(random_weight()).region)


def test_onnx_runtime_agrees_at_two_batch_shapes(tmp_path: Path) -> None:
    analysis = analysis_of(random_weight())
    form, factors = Kronecker(4, ROWS, COLUMNS).fit(analysis.weights, analysis)
    for found, expected in outputs_of(form, factors, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
