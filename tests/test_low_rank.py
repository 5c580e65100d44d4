"""The weightings of `low_rank` against the published closed forms, written here as their papers do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geofx.factorizations import LowRank
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis, Weighting
from geofx.site import Site

RANK = 7
SHAPES = ((24, 20), (20, 24), (16, 16))


def standard(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Problem:
    """A weight, the inputs X (in, tokens) that it saw and the gradients (out, tokens) of its outputs."""

    def __init__(self, rows: int, columns: int) -> None:
        self.weight = standard(rows, columns, seed=1)
        spread = torch.logspace(0, 1.5, columns, dtype=torch.float64)
        self.inputs = spread[:, None] * (standard(columns, columns, seed=2) @ standard(columns, 99, seed=3))
        self.gradients = standard(rows, rows, seed=4) @ standard(rows, 99, seed=5)
        self.input, self.output = (rows @ rows.T / rows.shape[1] for rows in (self.inputs, self.gradients))

    def fitted(self, form: LowRank) -> Tensor:
        analysis = self.analysis()
        _, factors = form.fit(analysis.weights, analysis)
        return form.to_dense(factors)

    def analysis(self) -> RegionAnalysis:
        rows, columns = self.weight.shape
        region = Region("w", "single", (Site("w", (rows, columns), dtype="float64"),))
        return RegionAnalysis(region, {"w": self.weight}, {"w": Metric(self.input, self.output)})


def truncated(matrix: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :RANK] @ values[:RANK].diag() @ right[:RANK]


def svd(problem: Problem) -> Tensor:
    """Eckart and Young, 1936."""
    return truncated(problem.weight)


def svd_llm(problem: Problem) -> Tensor:
    """SVD(W L) with L Lᵀ = Σ x xᵀ by Cholesky, Ŵ = U_r Σ_r V_rᵀ L⁻¹ (Wang et al. 2025)."""
    lower = torch.linalg.cholesky(problem.inputs @ problem.inputs.T)
    return torch.linalg.solve_triangular(lower, truncated(problem.weight @ lower), upper=False, left=False)


def drone(problem: Problem) -> Tensor:
    """W M with M = V_W S_W⁻¹ Z_r S_X⁻¹ U_Xᵀ, Z = S_W V_Wᵀ U_X S_X (Chen et al. 2021).

    Where W has fewer rows than columns S_W⁻¹ is taken on its range, as in the paper.
    """
    _, values, right = torch.linalg.svd(problem.weight, full_matrices=False)
    left, scales, _ = torch.linalg.svd(problem.inputs, full_matrices=False)
    core = truncated(values[:, None] * right @ left * scales)
    return problem.weight @ (right.T / values) @ core @ (left / scales).T


def asvd(problem: Problem, alpha: float = 0.5) -> Tensor:
    """SVD(W S) S⁻¹ with S = diag(rms x)^α (Yuan et al. 2023, with the root mean square for the mean)."""
    scale = problem.inputs.square().mean(1).sqrt() ** alpha
    return truncated(problem.weight * scale) / scale


def fwsvd(problem: Problem) -> Tensor:
    """SVD(W D) D⁻¹, D_jj = (Σ_i E[(∂ℓ/∂W_ij)²])^{1/2}, x and g independent (Hsu et al. 2022).

    The paper writes Z = X W, so that its rows are the inputs.
    """
    fisher = problem.gradients.square().mean(1)[:, None] * problem.inputs.square().mean(1)
    scale = fisher.sum(0).sqrt()
    return truncated(problem.weight * scale) / scale


CLOSED_FORMS = {
    "svd": (svd, LowRank(RANK, "none")),
    "svd_llm": (svd_llm, LowRank(RANK, "input")),
    "drone": (drone, LowRank(RANK, "input")),
    "asvd": (asvd, LowRank(RANK, "input_diagonal", power=0.5)),
    "fwsvd": (fwsvd, LowRank(RANK, "input_diagonal")),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_published_closed_forms_are_reproduced(name: str, shape: tuple[int, int]) -> None:
    closed_form, setting = CLOSED_FORMS[name]
    problem = Problem(*shape)
    expected = closed_form(problem)
    assert (problem.fitted(setting) - expected).norm() <= 1e-8 * expected.norm()


def test_the_weightings_differ_and_each_is_best_in_its_own_metric() -> None:
    problem = Problem(24, 20)
    metrics: dict[Weighting, Metric] = {
        "two_sided": Metric(problem.input, problem.output),
        "input": Metric(problem.input),
        "none": Metric(),
        "input_diagonal": Metric(problem.input.diagonal().sqrt()),
    }
    powers = {"input_diagonal": 0.5}
    fits = {name: problem.fitted(LowRank(RANK, name, powers.get(name, 1.0))) for name in metrics}
    for name, metric in metrics.items():
        losses = {other: metric.loss(problem.weight - fit) for other, fit in fits.items()}
        assert all(losses[name] < loss * (1 - 1e-6) for other, loss in losses.items() if other != name)


def test_power_zero_is_no_weighting_and_a_missing_side_the_identity() -> None:
    problem = Problem(24, 20)
    plain = problem.fitted(LowRank(RANK, "none"))
    unweighted = problem.fitted(LowRank(RANK, "input_diagonal", 0.0))
    torch.testing.assert_close(unweighted, plain, rtol=1e-10, atol=1e-9)
    whole = problem.analysis()
    free = RegionAnalysis(whole.region, whole.weights, {"w": Metric(output=problem.output)})
    _, factors = LowRank(RANK, "input_diagonal").fit(free.weights, free)
    torch.testing.assert_close(LowRank(RANK).to_dense(factors), plain, rtol=1e-10, atol=1e-9)
