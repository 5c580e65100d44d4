"""Eigenproblems that must not fail silently: rows 56, 57, 66 to 74 and 81."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from geofx import linalg
from geofx.errors import NumericsError
from geofx.region_analysis import Metric, region_metric, sampling_share, truncate


def gram(size: int, tokens: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / tokens


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_66_values_that_are_not_finite_raise_where_lapack_is_silent(bad: float) -> None:
    matrix = torch.eye(4)
    matrix[1, 2] = bad
    for solve in (linalg.eigh_psd, lambda m: truncate(m, Metric())):
        with pytest.raises(NumericsError, match="not finite"):
            solve(matrix)


def test_row_67_a_solver_that_fails_hands_over_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gram(6, 20)

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    expected = torch.linalg.svdvals(matrix)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, vectors = linalg.eigh_psd(matrix)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, matrix, rtol=1e-12, atol=1e-13)
    monkeypatch.setattr(scipy.linalg, "eigh", fail)
    with pytest.raises(NumericsError, match="no solver converged"):
        linalg.eigh_psd(matrix)


def test_row_67_a_solver_that_returns_nan_hands_over_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gram(5, 20)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (torch.full((5,), float("nan")), torch.eye(5)))
    values, vectors = linalg.eigh_psd(matrix)
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, matrix, rtol=1e-12, atol=1e-13)


def test_row_68_small_negative_eigenvalues_are_clipped() -> None:
    low = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    values, _ = linalg.eigh_psd((low @ low.T).float())
    assert (values >= 0).all()
    assert int((values > 1e-5 * values[0]).sum()) == 3


def test_rows_56_57_69_70_singular_moments_need_no_inverse() -> None:
    """Fewer tokens than features, and dead channels: the truncation stays finite and exact where x lives."""
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 3] = 0.0
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moment = x.T @ x / 5
    for metric in (Metric(moment), region_metric(weight, moment, None)):
        whole = truncate(weight, metric)
        assert torch.isfinite(whole.left).all()
        assert torch.isfinite(whole.right).all()
    unshrunk = truncate(weight, Metric(moment))
    restored = unshrunk.left[:, :5] @ unshrunk.right[:5]
    torch.testing.assert_close(x @ restored.T, x @ weight.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_truncation_is_the_two_sided_optimum(shape: tuple[int, int]) -> None:
    """Equal to S_G^{-1} [S_G W S_A]_r S_A^{-1} by a plain SVD, on either side of square."""
    rows, columns = shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a, g = gram(columns, 80, 3), gram(rows, 80, 4)
    (root_a, inverse_a), (root_g, inverse_g) = linalg.root_and_inverse(a), linalg.root_and_inverse(g)
    left, sigma, right = torch.linalg.svd(root_g @ weight @ root_a, full_matrices=False)
    metric = Metric(a, g)
    whole = truncate(weight, metric)
    torch.testing.assert_close(torch.from_numpy(whole.spectrum.squares), sigma**2, rtol=1e-9, atol=1e-12)
    for rank in (1, 5, 11):
        expected = inverse_g @ (left[:, :rank] * sigma[:rank]) @ right[:rank] @ inverse_a
        actual = whole.left[:, :rank] @ whole.right[:rank]
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(
            metric.loss(weight - actual), whole.spectrum.tail(rank), rtol=1e-8, atol=1e-12
        )


def test_row_81_signs_and_plans_do_not_depend_on_threads() -> None:
    matrix = gram(64, 200)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(linalg.eigh_psd(matrix))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-7)


def test_row_75_matrices_beyond_lapack_are_refused_by_shape() -> None:
    huge = torch.empty(1, 1).expand(linalg.FULL_DECOMPOSITION_LIMIT + 1, 2)
    with pytest.raises(NumericsError, match="beyond the dense solvers"):
        linalg._first_that_converges(huge, linalg._EIGH_LADDER, "huge")


def test_row_67_a_batch_that_does_not_converge_is_solved_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.stack([gram(6, 20, seed) for seed in range(4)]).reshape(2, 2, 6, 6)
    expected, solver = linalg.leading_axes(batch, 3), torch.linalg.eigh

    def only_matrices(matrix: torch.Tensor) -> object:
        if matrix.dim() > 2:
            raise torch.linalg.LinAlgError("did not converge")
        return solver(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", only_matrices)
    torch.testing.assert_close(linalg.leading_axes(batch, 3), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(linalg.leading_axes(batch[1, 0], 3), expected[1, 0], rtol=1e-8, atol=1e-8)


def test_a_matrix_that_has_no_cholesky_factor_is_refused() -> None:
    batch = torch.stack([gram(6, 20), gram(6, 20) - 5 * torch.eye(6)])
    root = linalg.cholesky(batch[:1])
    torch.testing.assert_close(root @ root.mT, batch[:1])
    with pytest.raises(NumericsError, match="moments is not positive definite"):
        linalg.cholesky(batch, "moments")


@pytest.mark.parametrize("block", [1, 3, 384])
def test_gram_by_blocks_is_the_gram(block: int) -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(7, 7, dtype=torch.float64)
    linalg.add_gram(total, rows, block)
    linalg.add_gram(total, rows, block)
    torch.testing.assert_close(linalg.fill_lower(total).float(), 2 * rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_packing_is_inverted() -> None:
    matrix = linalg.fill_lower(gram(9, 30))
    assert torch.equal(linalg.unpack_symmetric(linalg.pack_symmetric(matrix)), matrix)


def test_shrinkage_follows_the_number_of_samples() -> None:
    """Ledoit and Wolf: identity moments of n dims from T samples shrink by n / T, rank-one ones by 1 / T."""
    assert sampling_share(torch.eye(50), 1000, 1e-4) == pytest.approx(0.05)
    assert sampling_share(torch.ones(50, 50), 1000, 1e-4) == pytest.approx(0.001)
    assert sampling_share(torch.eye(50), 10, 1e-4) == 1.0
    assert sampling_share(torch.eye(50), 10**9, 1e-4) == 1e-4


def test_shrinkage_is_relative_and_keeps_the_trace() -> None:
    matrix = gram(8, 3)
    for scale in (1.0, 1e6):
        shrunk = linalg.shrink(matrix * scale, 0.01)
        torch.testing.assert_close(shrunk.trace(), matrix.trace() * scale)
        assert linalg.eigh_psd(shrunk)[0][-1] > 0.009 * scale * matrix.diagonal().mean()
