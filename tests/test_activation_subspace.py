"""ESPACE's criteria against their definitions on samples, its loss at every rank, and what it cannot beat."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import onnxruntime
import pytest
import torch
from test_factorizations import analysis_of, random_weight
from torch import Tensor, nn

from geofx.errors import ConfigError, PlanError
from geofx.factorizations.activation_subspace import (
    NORMALISED,
    PLAIN,
    ActivationSubspace,
    Criterion,
    losses,
)
from geofx.factorizations.contract import factored_loss
from geofx.factorizations.low_rank import LowRank
from geofx.region_analysis import Metric, RegionAnalysis

CRITERIA = PLAIN + NORMALISED


def samples(rows: int, columns: int, seed: int) -> Tensor:
    """Correlated, of very different lengths, float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return draw @ mix * draw[:, :1].exp()


def with_directions(analysis: RegionAnalysis, x: Tensor) -> RegionAnalysis:
    unit = x / x.norm(dim=1, keepdim=True)
    return replace(analysis, directions=unit.T @ unit / len(unit))


@pytest.fixture
def sampled() -> tuple[Tensor, Tensor, Tensor, RegionAnalysis]:
    """x (t, in), g (t, out), W and the analysis of their exact moments."""
    x, g, weight = samples(300, 20, 1), samples(300, 24, 2), random_weight(torch.float64)
    metric = Metric(x.T @ x / len(x), g.T @ g / len(g))
    return x, g, weight, with_directions(analysis_of(weight, metric=metric), x)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_are_those_of_the_paper(
    criterion: Criterion, sampled: tuple[Tensor, Tensor, Tensor, RegionAnalysis]
) -> None:
    x, g, weight, analysis = sampled
    if criterion in NORMALISED:
        x = x / x.norm(dim=1, keepdim=True)
    moment = torch.einsum("ti,tj->ij", x, x) / len(x)
    flow = g @ weight  # the gradient at the input, token by token
    other = {
        "go": torch.einsum("oi,oj->ij", weight, weight) / len(weight),
        "nl": torch.einsum("ti,tj->ij", flow, flow) / len(flow),
    }.get(criterion[:2])
    matrix = moment if other is None else moment @ other + other @ moment
    leading = torch.linalg.eigh(matrix)[1][:, -7:]
    _, factors = ActivationSubspace(7, criterion).fit(analysis.weights, analysis)
    basis = factors["projection"].T
    torch.testing.assert_close(basis @ basis.T, leading @ leading.T, rtol=0, atol=1e-8)
    torch.testing.assert_close(factors["weight"], weight @ basis, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(basis.T @ basis, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("criterion", ["best", *CRITERIA])
def test_the_loss_of_every_rank_is_the_measured_one_and_never_below_low_rank(criterion: Criterion) -> None:
    analysis = with_directions(analysis_of(random_weight(torch.float64)), samples(200, 20, 3))
    total = analysis.metric.loss(analysis.weight)
    for rank in range(1, 21):
        form = ActivationSubspace(rank, criterion)
        fitted, factors = form.fit(analysis.weights, analysis)
        predicted = form.predicted_loss(analysis.region, analysis)
        assert predicted == pytest.approx(
            factored_loss(fitted, factors, analysis), rel=1e-8, abs=1e-10 * total
        )
        least = LowRank(rank).predicted_loss(analysis.region, analysis)
        assert predicted >= least * (1 - 1e-9) - 1e-10 * total
    assert len(losses(analysis, fitted.criterion)) == 21


def test_it_costs_what_low_rank_costs() -> None:
    region = analysis_of(random_weight(), random_weight(seed=8), kind="shared_input").region
    ours, theirs = ActivationSubspace(5).factor_shapes(region), LowRank(5).factor_shapes(region)
    assert sorted(ours.values()) == sorted(theirs.values())


def test_best_is_the_least_of_the_criteria_that_can_be_had() -> None:
    analysis = analysis_of(random_weight(torch.float64))
    for usable in (PLAIN, CRITERIA):
        if usable is CRITERIA:
            analysis = with_directions(
                replace(analysis), samples(200, 20, 3) @ torch.diag(analysis.weight[0])
            )
        best = ActivationSubspace(6)
        each = {
            name: replace(best, criterion=name).predicted_loss(analysis.region, analysis) for name in usable
        }
        assert best.predicted_loss(analysis.region, analysis) == min(each.values())
        fitted, _ = best.fit(analysis.weights, analysis)
        assert fitted.criterion == min(each, key=lambda name: each[name])
        assert len(set(each.values())) == len(usable)


@pytest.mark.parametrize("criterion", NORMALISED)
def test_a_normalised_criterion_without_directions_says_how_to_get_them(criterion: Criterion) -> None:
    analysis = analysis_of(random_weight())
    with pytest.raises(ConfigError, match=r"analyze\(\.\.\., directions=True\)"):
        ActivationSubspace(3, criterion).fit(analysis.weights, analysis)
    with pytest.raises(ConfigError, match=criterion):
        ActivationSubspace(3, criterion).predicted_loss(analysis.region, analysis)


def test_mse_recovers_what_the_inputs_never_leave() -> None:
    """Inputs in a subspace of 5 dims: outputs are exact at rank 5, though the weight has rank 20."""
    x = samples(300, 5, 4) @ samples(5, 20, 5)
    analysis = analysis_of(random_weight(torch.float64), metric=Metric(x.T @ x / len(x)))
    fitted, factors = ActivationSubspace(5, "mse").fit(analysis.weights, analysis)
    expected = x @ analysis.weight.T
    assert (fitted.apply(x, factors) - expected).norm() < 1e-9 * expected.norm()
    assert ActivationSubspace(4, "mse").predicted_loss(analysis.region, analysis) > 0


def test_sites_of_one_input_share_the_projection() -> None:
    weights = [random_weight(torch.float64, seed=seed) for seed in (1, 2, 3)]
    analysis = analysis_of(*weights, kind="shared_input")
    form, factors = ActivationSubspace(6, "nl_mse").fit(analysis.weights, analysis)
    assert set(factors) == {"projection", "weight", "weight@1", "weight@2"}
    predicted = form.predicted_loss(analysis.region, analysis)
    assert predicted == pytest.approx(factored_loss(form, factors, analysis), rel=1e-9)
    assert predicted >= LowRank(6).predicted_loss(analysis.region, analysis)


def test_ranks_outside_the_input_are_refused() -> None:
    region = analysis_of(random_weight()).region
    for rank in (0, 21):
        with pytest.raises(PlanError, match=r"outside 1\.\.20"):
            ActivationSubspace(rank).factor_shapes(region)


class Applied(nn.Module):
    def __init__(self, form: Any, factors: Any) -> None:
        super().__init__()
        self.form, self.factors = form, nn.ParameterDict(dict(factors))

    def forward(self, x: Tensor) -> Tensor:
        return self.form.apply(x, self.factors)


def test_onnx_round_trip_at_two_shapes() -> None:
    analysis = analysis_of(random_weight())
    module = Applied(*ActivationSubspace(5).fit(analysis.weights, analysis)).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program = torch.onnx.export(
        module, (torch.randn(2, 3, 20),), dynamo=True, optimize=False, dynamic_shapes=(sizes,), verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for lead in ((2, 3), (4, 7)):
        x = torch.randn(*lead, 20)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(x).detach(), rtol=1e-4, atol=1e-5)
