"""Block tensor trains against the paper's index form, closed-form errors, tensorly and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorly
import torch
from factorization_cases import random
from format_probe import outputs_of
from tensorly.decomposition import tensor_train
from test_factorizations import analysis_of, random_weight

from geofx.errors import PlanError
from geofx.factorizations.block_tensor_train import BlockTensorTrain
from geofx.region import Region
from geofx.region_analysis import Metric
from geofx.site import Site

SIZES = ((576, 576), (192, 576), (1536, 576), (576, 1536))


def test_to_dense_is_the_papers_sum() -> None:
    """W[α m2 + β, γ n2 + δ] = Σ_σ L[β, α, γ r + σ] R[γ, β r + σ, δ], one entry at a time."""
    analysis = analysis_of(random_weight(torch.float64))
    form, factors = BlockTensorTrain(2, (6, 4), (5, 4)).fit(analysis.weights, analysis)
    left, right = factors["left"].numpy(), factors["right"].numpy()
    expected = np.zeros((24, 20))
    for row, column in np.ndindex(24, 20):
        (a, b), (c, d) = divmod(row, 4), divmod(column, 4)
        expected[row, column] = left[b, a, 2 * c : 2 * c + 2] @ right[c, 2 * b : 2 * b + 2, d]
    np.testing.assert_allclose(form.to_dense(factors).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(("rows", "columns"), [((6, 4), (5, 4)), ((4, 6), (2, 10)), ((12, 2), (5, 4))])
def test_without_a_metric_the_error_is_the_blocks_tails(
    rank: int, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    weight = random_weight(torch.float64)
    analysis = analysis_of(weight, metric=Metric())
    folded = weight.numpy().reshape(*rows, *columns)
    tails = sum(
        (np.linalg.svd(folded[:, b, c], compute_uv=False)[rank:] ** 2).sum()
        for b in range(rows[1])
        for c in range(columns[0])
    )
    found = BlockTensorTrain(rank, rows, columns).predicted_loss(analysis.region, analysis)
    assert found == pytest.approx(tails, rel=1e-8, abs=1e-18)


def test_a_tensor_train_matrix_is_the_case_of_cores_that_do_not_see_both_shared_indices() -> None:
    """tensorly's train over (α γ)(β δ) of rank 2 is a BTT of rank 2, which is then exact and larger."""
    cores = random(30, 2, seed=1).numpy(), random(2, 16, seed=2).numpy()
    grid = (cores[0] @ cores[1]).reshape(6, 5, 4, 4)
    train = tensor_train(tensorly.tensor(grid.reshape(30, 16)), rank=[1, 2, 1])
    rebuilt = tensorly.tt_to_tensor(train).reshape(6, 5, 4, 4).transpose(0, 2, 1, 3).reshape(24, 20)
    weight = torch.from_numpy(np.ascontiguousarray(rebuilt))
    analysis = analysis_of(weight)
    form, factors = BlockTensorTrain(2, (6, 4), (5, 4)).fit(analysis.weights, analysis)
    torch.testing.assert_close(form.to_dense(factors), weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("keep", [0.9, 0.8, 0.6, 0.4, 0.2, 0.1])
def test_some_candidate_is_near_every_size(shape: tuple[int, int], keep: float) -> None:
    region = Region("w", "single", (Site("w", shape),))
    analysis = analysis_of(random_weight())
    dense = shape[0] * shape[1]
    sizes = [
        sum(torch.Size(part).numel() for part in form.factor_shapes(region).values()) / dense
        for form in BlockTensorTrain.candidates(region, analysis)
    ]
    assert min(abs(size - keep) for size in sizes) < 0.02
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("folds", [((6, 5), (5, 4)), ((6, 4), (5, 5))])
def test_folds_that_do_not_multiply_to_the_shape_are_refused(
    folds: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    with pytest.raises(PlanError, match="do not multiply"):
        BlockTensorTrain(1, *folds).factor_shapes(analysis_of(random_weight()).region)


def test_onnx_runtime_agrees_at_batch_shapes_not_exported(tmp_path: Path) -> None:
    analysis = analysis_of(random_weight())
    form, factors = BlockTensorTrain(2, (6, 4), (5, 4)).fit(analysis.weights, analysis)
    for found, expected in outputs_of(form, factors, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
