"""Tensor trains beyond the laws: TT-SVD as tensorly has it, padding, lookups, stacks, ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factorization_cases import random
from format_probe import outputs_of
from format_probe import torch_backend as torch_backend
from tensorly.decomposition import tensor_train_matrix
from test_factorizations import analysis_of

from geofx.errors import PlanError
from geofx.factorizations.contract import factored_loss
from geofx.factorizations.folded import padded_fold
from geofx.factorizations.tensor_train import TensorTrain, tt_svd
from geofx.region import Region, RegionKind
from geofx.region_analysis import Metric
from geofx.site import Site
from geofx.workload import measure

ROWS, COLUMNS = (4, 3, 2), (5, 2, 2)


@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (9, 3), (20, 4)])
def test_tt_svd_is_tensorlys(ranks: tuple[int, int]) -> None:
    weight = random(24, 20)
    expected = tensor_train_matrix(weight.reshape(*ROWS, *COLUMNS), [1, *ranks, 1]).to_matrix()
    pairs = weight.reshape(*ROWS, *COLUMNS).permute(0, 3, 1, 4, 2, 5).reshape(20, 6, 4)
    cores = tt_svd(pairs, ranks)
    parts = {
        f"core{k + 1}": core.reshape(core.shape[0], ROWS[k], COLUMNS[k], -1) for k, core in enumerate(cores)
    }
    dense = TensorTrain(ROWS, COLUMNS, ranks).to_dense(parts)
    torch.testing.assert_close(dense, expected, rtol=1e-8, atol=1e-8)
    for core in cores[:-1]:
        matrix = core.flatten(0, 1)
        torch.testing.assert_close(
            matrix.T @ matrix, torch.eye(matrix.shape[1], dtype=torch.float64), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("ranks", [(3, 2), (9, 3)])
def test_the_fit_is_no_worse_than_tensorly_in_the_plain_metric_and_better_in_a_weighted_one(
    ranks: tuple[int, int],
) -> None:
    weight = random(24, 20)
    theirs = weight - tensor_train_matrix(weight.reshape(*ROWS, *COLUMNS), [1, *ranks, 1]).to_matrix()
    form = TensorTrain(ROWS, COLUMNS, ranks)
    for metric, factor in ((Metric(), 1 + 1e-10), (None, 0.9)):
        analysis = analysis_of(weight, metric=metric)
        fitted, factors = form.fit(analysis.weights, analysis)
        assert factored_loss(fitted, factors, analysis) <= factor * analysis.metric.loss(theirs)


def test_a_metric_that_splits_along_the_folds_gives_the_closed_form() -> None:
    """With G = ⊗ G_k and A = ⊗ A_k and one bond, the optimum is the truncated SVD of the whitened pairs."""
    weight = random(24, 20)
    parts = [random(size, 2 * size, seed=size) for size in (6, 4, 5, 4)]
    g1, g2, a1, a2 = (part @ part.T for part in parts)
    analysis = analysis_of(weight, metric=Metric(torch.kron(a1, a2), torch.kron(g1, g2)))
    form = TensorTrain((6, 4), (5, 4), (3,))
    fitted, factors = form.fit(analysis.weights, analysis)
    left, right = (torch.linalg.cholesky(m).T for m in (torch.kron(g1, g2), torch.kron(a1, a2)))
    white = (left @ weight @ right.T).reshape(6, 4, 5, 4).permute(0, 2, 1, 3).reshape(30, 16)
    optimum = float(torch.linalg.svdvals(white)[3:].square().sum())
    torch.testing.assert_close(factored_loss(fitted, factors, analysis), optimum, rtol=1e-8, atol=0.0)


def test_one_bond_is_a_sum_of_kronecker_products() -> None:
    """A tensor train of two cores is Σ B_i ⊗ C_i, so the best rank is that of Van Loan and Pitsianis."""
    weight = random(24, 20)
    analysis = analysis_of(weight, metric=Metric())
    fitted, factors = TensorTrain((6, 4), (5, 4), (3,)).fit(analysis.weights, analysis)
    expected = sum(
        torch.kron(factors["core1"][0, :, :, term], factors["core2"][term, :, :, 0]) for term in range(3)
    )
    torch.testing.assert_close(fitted.to_dense(factors), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3, 24, 97, 30522, 50257, 151936])
def test_a_vocabulary_is_padded_by_little(size: int) -> None:
    folds = padded_fold(size, 3)
    held = folds[0] * folds[1] * folds[2]
    assert size <= held <= max(8, 1.05 * size + 8)
    assert folds[0] <= 4 * folds[-1]


@pytest.mark.parametrize("kind", ["single", "stack", "embedding"])
@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (32, 64)])
def test_no_candidate_has_a_rank_beyond_what_either_neighbour_can_use(
    kind: RegionKind, shape: tuple[int, int]
) -> None:
    analysis = analysis_of(*(random(*shape, seed=site) for site in range(1 + (kind == "stack"))), kind=kind)
    forms = list(TensorTrain.candidates(analysis.region, analysis))
    assert forms
    for form in forms:
        sizes = form._sizes(2 if kind == "stack" else 0)
        for size, left, right in zip(sizes, (1, *form.ranks), (*form.ranks, 1), strict=True):
            assert max(left, right) <= size * min(left, right)


def test_padding_is_paid_for_and_is_not_part_of_the_weight() -> None:
    """97 rows are prime: the table is fitted as 98 or more, counted as such, and read as 97."""
    weight = random(97, 20)
    analysis = analysis_of(weight, kind="embedding")
    *_, form = TensorTrain.candidates(analysis.region, analysis)
    assert form.padding > 0
    fitted, factors = form.fit(analysis.weights, analysis)
    assert fitted.to_dense(factors).shape == (97, 20)
    work = measure(form, analysis.region)
    assert work.weight_bytes == sum(part.numel() * part.element_size() for part in factors.values())
    ids = torch.tensor([[0, 96], [50, 3]])
    torch.testing.assert_close(fitted.lookup(ids, factors), fitted.to_dense(factors)[ids])


def test_a_lookup_costs_the_same_however_long_the_table() -> None:
    flops = set()
    for base in (4, 16, 64):
        region = Region("table", "embedding", (Site("table", (base**3, 20)),))
        flops.add(measure(TensorTrain((base,) * 3, COLUMNS, (4, 3)), region).flops)
    assert len(flops) == 1


def test_a_stack_shares_all_but_its_middle() -> None:
    analysis = analysis_of(*(random(24, 20, seed=site) for site in range(3)), kind="stack")
    form = TensorTrain((24, 1), (1, 20), (6, 5))
    fitted, factors = form.fit(analysis.weights, analysis)
    assert factors.keys() == {"core1", "core2", "site", "site@1", "site@2"}
    for site in range(3):
        own = factors["site" if site == 0 else f"site@{site}"]
        expected = factors["core1"][0, :, 0] @ own @ factors["core2"][:, 0, :, 0]
        torch.testing.assert_close(fitted.to_dense(factors, site), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "form",
    [
        TensorTrain(ROWS, COLUMNS, (3,)),
        TensorTrain(ROWS, COLUMNS, (21, 2)),
        TensorTrain(ROWS, COLUMNS, (3, 0)),
        TensorTrain((5, 5), (5, 4), (3,)),
        TensorTrain((24,), COLUMNS, (3, 2)),
    ],
)
def test_settings_that_do_not_fit_are_refused(form: TensorTrain) -> None:
    with pytest.raises(PlanError):
        form.factor_shapes(analysis_of(random(24, 20)).region)


@pytest.mark.parametrize("columns", [COLUMNS, (4, 5, 1)])
def test_onnx_runtime_agrees(tmp_path: Path, columns: tuple[int, ...]) -> None:
    analysis = analysis_of(random(24, 20).float())
    form, factors = TensorTrain(ROWS, columns, (3, 2)).fit(analysis.weights, analysis)
    for found, expected in outputs_of(form, factors, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
