"""CP beyond the laws: alternating least squares as tensorly has it, its starts, hard tensors, ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factorization_cases import random
from format_probe import outputs_of
from format_probe import torch_backend as torch_backend
from tensorly.cp_tensor import CPTensor, cp_to_tensor
from tensorly.decomposition import parafac
from test_factorizations import analysis_of
from torch import Tensor

from geofx.errors import PlanError
from geofx.factorizations.contract import factored_loss
from geofx.factorizations.cp import CP, alternate, best_of_starts, khatri_rao, orthogonal_terms
from geofx.region_analysis import Metric


def multiplied(factors: list[Tensor]) -> Tensor:
    return khatri_rao(factors).sum(1).reshape([len(part) for part in factors])


@pytest.mark.parametrize("sweeps", [1, 2, 10])
@pytest.mark.parametrize("shape", [(6, 4, 20), (20, 4, 6), (6, 4, 5, 4), (24, 20)])
def test_alternating_least_squares_is_tensorlys_sweep_by_sweep(shape: tuple[int, ...], sweeps: int) -> None:
    tensor, rank = random(*shape), 4
    start = [random(size, rank, seed=1 + mode) for mode, size in enumerate(shape)]
    init = CPTensor((torch.ones(rank, dtype=torch.float64), [part.clone() for part in start]))
    expected = cp_to_tensor(parafac(tensor, rank, n_iter_max=sweeps, init=init, tol=0.0))
    factors, error = alternate(tensor, start, sweeps)
    torch.testing.assert_close(multiplied(factors), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(error, float((tensor - expected).square().sum()), rtol=1e-8, atol=1e-8)


def test_the_best_start_is_no_worse_than_tensorlys_best() -> None:
    """Five terms and a tenth of noise: random noise alone has many local optima."""
    true = [random(size, 5, seed=size) for size in (6, 4, 20)]
    tensor = multiplied(true) + 0.1 * random(6, 4, 20)
    theirs = [
        parafac(tensor, 5, n_iter_max=100, init="random", random_state=seed, tol=0.0) for seed in range(4)
    ]
    least = min(float((tensor - cp_to_tensor(found)).square().sum()) for found in theirs)
    ours = float((tensor - multiplied(best_of_starts(tensor, 5))).square().sum())
    assert ours <= least * (1 + 1e-8)


def test_a_unique_decomposition_is_found_factor_by_factor() -> None:
    """Kruskal: generic terms, few enough, are unique up to order and scale."""
    true = [random(size, 3, seed=size) for size in (6, 4, 20)]
    found = best_of_starts(multiplied(true), 3)
    for ours, theirs in zip(found, true, strict=True):
        cosines = (ours / ours.norm(dim=0)).T @ (theirs / theirs.norm(dim=0))
        torch.testing.assert_close(
            cosines.abs().amax(0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-8
        )


@pytest.mark.parametrize("shape", [(6, 4, 20), (20, 6, 4), (24, 20), (5, 4, 3, 3)])
def test_orthogonal_terms_are_orthogonal_and_all_of_them_are_the_tensor(shape: tuple[int, ...]) -> None:
    tensor = random(*shape)
    terms = orthogonal_terms(tensor, 10**6)
    torch.testing.assert_close(multiplied(terms), tensor, rtol=1e-10, atol=1e-10)
    gram = torch.ones((), dtype=torch.float64)
    for part in terms:
        gram = gram * (part.T @ part)
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-10)
    for rank in (1, 5, 9):
        error = float((tensor - multiplied(orthogonal_terms(tensor, rank))).square().sum())
        expected = float(gram.diagonal().sort(descending=True).values[rank:].sum())
        torch.testing.assert_close(error, expected, rtol=1e-9, atol=1e-9)


def test_row_77_terms_that_cancel_stay_finite_and_never_lose_to_the_start() -> None:
    """a⊗a⊗b + a⊗b⊗a + b⊗a⊗a has rank 3 and border rank 2: two terms come ever nearer and diverge."""
    a, b = random(6, 1, seed=1), random(6, 1, seed=2)
    hard = multiplied([torch.cat(side, 1) for side in ([a, a, b], [a, b, a], [b, a, a])])
    start = orthogonal_terms(hard, 2)
    factors, error = alternate(hard, start, 500)
    assert all(torch.isfinite(part).all() for part in factors)
    measured = float((hard - multiplied(factors)).square().sum())
    torch.testing.assert_close(error, measured, rtol=1e-4, atol=1e-9)
    assert measured <= float((hard - multiplied(start)).square().sum())


def test_of_two_orders_it_is_the_truncated_svd() -> None:
    analysis = analysis_of(random(24, 20), metric=Metric())
    fitted, factors = CP(7, (24,), (20,)).fit(analysis.weights, analysis)
    optimum = analysis.spectrum.tail(7)
    torch.testing.assert_close(factored_loss(fitted, factors, analysis), optimum, rtol=1e-8, atol=0.0)


def test_the_metric_is_used() -> None:
    weight, form = random(24, 20), CP(5, (6, 4), (20,))
    plain, weighted = analysis_of(weight, metric=Metric()), analysis_of(weight)
    losses = [
        factored_loss(form, form.fit(analysis.weights, analysis)[1], weighted)
        for analysis in (plain, weighted)
    ]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "form", [CP(0, (6, 4), (20,)), CP(25, (6, 4), (20,)), CP(3, (5, 4), (20,)), CP(3, (-6, -4), (20,))]
)
def test_settings_that_do_not_fit_are_refused(form: CP) -> None:
    with pytest.raises(PlanError):
        form.factor_shapes(analysis_of(random(24, 20)).region)


def test_onnx_runtime_agrees(tmp_path: Path) -> None:
    analysis = analysis_of(random(24, 20).float())
    form, factors = CP(5, (6, 4), (5, 4)).fit(analysis.weights, analysis)
    for found, expected in outputs_of(form, factors, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
