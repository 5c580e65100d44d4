"""Tucker beyond the laws: HOSVD and HOOI as tensorly has them, stacks as Wang et al. write them, ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factorization_cases import random
from format_probe import outputs_of
from format_probe import torch_backend as torch_backend
from tensorly.decomposition import tucker
from tensorly.tucker_tensor import tucker_to_tensor
from test_factorizations import analysis_of

from geofx.errors import PlanError
from geofx.factorizations.contract import factored_loss
from geofx.factorizations.tucker import Tucker, hooi
from geofx.region_analysis import Metric


@pytest.mark.parametrize("sweeps", [1, 3, 40])
@pytest.mark.parametrize("ranks", [(3, 2, 4, 2), (5, 3, 5, 4), (6, 4, 5, 4)])
def test_hooi_is_tensorlys_sweep_by_sweep(ranks: tuple[int, ...], sweeps: int) -> None:
    tensor = random(24, 20).reshape(6, 4, 5, 4)
    expected = tucker_to_tensor(tucker(tensor, list(ranks), n_iter_max=sweeps, tol=0.0))
    found = tucker_to_tensor(hooi(tensor, ranks, sweeps))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_bases_are_orthonormal_and_hosvd_is_quasi_optimal() -> None:
    tensor, ranks = random(24, 20).reshape(6, 4, 5, 4), (4, 3, 3, 2)
    core, bases = hooi(tensor, ranks, 0)
    for basis in bases:
        eye = torch.eye(basis.shape[1], dtype=torch.float64)
        torch.testing.assert_close(basis.T @ basis, eye, rtol=0.0, atol=1e-12)
    error = float((tensor - tucker_to_tensor((core, bases))).square().sum())
    tails = [
        float(torch.linalg.svdvals(tensor.movedim(mode, 0).flatten(1))[rank:].square().sum())
        for mode, rank in enumerate(ranks)
    ]
    assert max(tails) <= error <= sum(tails)
    better = tensor - tucker_to_tensor(hooi(tensor, ranks, 5))
    assert float(better.square().sum()) < error


def test_the_fit_is_no_worse_than_tensorly_in_the_plain_metric_and_better_in_a_weighted_one() -> None:
    weight, form = random(24, 20), Tucker((6, 4), (5, 4), (4, 3, 3, 2))
    theirs = tucker_to_tensor(tucker(weight.reshape(6, 4, 5, 4), list(form.ranks), n_iter_max=2, tol=0.0))
    for metric, factor in ((Metric(), 1 + 1e-10), (None, 0.95)):
        analysis = analysis_of(weight, metric=metric)
        fitted, factors = form.fit(analysis.weights, analysis)
        bound = factor * analysis.metric.loss(weight - theirs.reshape(24, 20))
        assert factored_loss(fitted, factors, analysis) <= bound


def test_without_folds_it_is_the_low_rank_optimum() -> None:
    """Sides left whole make the whitening exact: the start is G^{-1/2} [G^{1/2} W A^{1/2}]_r A^{-1/2}."""
    analysis = analysis_of(random(24, 20))
    fitted, factors = Tucker((24,), (20,), (7, 7)).fit(analysis.weights, analysis)
    optimum = analysis.spectrum.tail(7)
    torch.testing.assert_close(factored_loss(fitted, factors, analysis), optimum, rtol=1e-8, atol=0.0)


def test_a_site_of_a_stack_is_its_mixture_of_shared_cores() -> None:
    analysis = analysis_of(*(random(24, 20, seed=site) for site in range(3)), kind="stack")
    form = Tucker((24,), (20,), (2, 6, 5))
    fitted, factors = form.fit(analysis.weights, analysis)
    assert factors["core"].shape == (2, 6, 5)
    for site, name in enumerate(("layer", "layer@1", "layer@2")):
        mixed = torch.einsum("d,drs->rs", factors[name], factors["core"])
        expected = factors["row1"] @ mixed @ factors["column1"].T
        torch.testing.assert_close(fitted.to_dense(factors, site), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "form",
    [
        Tucker((6, 4), (5, 4), (3, 2, 2)),
        Tucker((6, 4), (5, 4), (6, 2, 1, 2)),
        Tucker((6, 4), (5, 4), (7, 4, 5, 4)),
        Tucker((6, 5), (5, 4), (3, 2, 2, 2)),
        Tucker((6, 4), (5, 4), (0, 2, 2, 2)),
    ],
)
def test_settings_that_do_not_fit_are_refused(form: Tucker) -> None:
    with pytest.raises(PlanError):
        form.factor_shapes(analysis_of(random(24, 20)).region)


def test_onnx_runtime_agrees(tmp_path: Path) -> None:
    analysis = analysis_of(random(24, 20).float())
    form, factors = Tucker((6, 4), (5, 4), (4, 3, 3, 2)).fit(analysis.weights, analysis)
    for found, expected in outputs_of(form, factors, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_onnx_runtime_agrees_on_a_stack(tmp_path: Path) -> None:
    weights = (random(24, 20, seed=site).float() for site in range(3))
    analysis = analysis_of(*weights, kind="stack")
    form, factors = Tucker((24,), (20,), (2, 6, 5)).fit(analysis.weights, analysis)
    for found, expected in outputs_of(form, factors, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_side_whose_metric_is_zero_is_left_as_it_is() -> None:
    """What nothing downstream looks at has no coordinates to whiten; the factors stay those of HOOI."""
    weight = random(24, 20)
    analysis = analysis_of(weight, metric=Metric(None, torch.zeros(24, 24, dtype=torch.float64)))
    form = Tucker((6, 4), (5, 4), (6, 4, 5, 4))
    torch.testing.assert_close(form.to_dense(form.fit(analysis.weights, analysis)[1]), weight)
