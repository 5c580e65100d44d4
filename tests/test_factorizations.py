"""The laws that every format obeys, over the rows of factorization_cases."""

from __future__ import annotations

import inspect
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from factorization_cases import CASES, Case
from torch import Tensor

from geofx.errors import NumericsError, PlanError
from geofx.factorizations import FACTORIZATIONS, Dense, GaugeFixed, LowRank, from_json, to_json
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site
from geofx.workload import PROBE_TOKENS, measure

SHAPE = (24, 20)


def analysis_of(weight: Tensor, seed: int = 0, metric: Metric | None = None) -> RegionAnalysis:
    """A region of one weight under a random positive definite metric, condition number near 100."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    g = torch.randn(4 * rows, rows, generator=generator, dtype=torch.float64)
    chosen = metric or Metric(x.T @ x / len(x), g.T @ g / len(g))
    site = Site("layer.weight", (rows, columns), dtype=str(weight.dtype).removeprefix("torch."))
    return RegionAnalysis(
        Region("layer.weight", "single", (site,)), {"layer.weight": weight}, {"layer.weight": chosen}
    )


def random_weight(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3, 4), (0, 5)])
def test_apply_equals_to_dense(case: Case, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    analysis = analysis_of(random_weight(dtype))
    fitted, factors = case.large.fit(analysis.weights, analysis)
    x = torch.randn(*lead, SHAPE[1], dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected = x @ fitted.to_dense(factors).T
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(fitted.apply(x, factors), expected, rtol=200 * eps, atol=2000 * eps)


def test_a_weight_that_has_the_structure_is_recovered(case: Case) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, case.tolerance)):
        weight = case.structured.to(dtype)
        analysis = analysis_of(weight)
        fitted, factors = case.large.fit(analysis.weights, analysis)
        error = (fitted.to_dense(factors) - weight).norm() / weight.norm()
        assert error <= tolerance


def test_shapes_and_flops_are_as_declared(case: Case) -> None:
    analysis = analysis_of(random_weight())
    fitted, factors = case.large.fit(analysis.weights, analysis)
    assert {name: tuple(part.shape) for name, part in factors.items()} == fitted.factor_shapes(
        analysis.region
    )
    work = measure(case.large, analysis.region)
    assert work == measure(fitted, analysis.region) or fitted != case.large
    assert work.weight_bytes == sum(part.numel() * part.element_size() for part in factors.values())
    assert work.flops == 2 * sum(part.numel() for part in factors.values() if part.is_floating_point())
    assert work.activation_bytes >= SHAPE[0] * 4
    assert PROBE_TOKENS > 1


def test_predicted_loss_is_the_measured_form_and_falls_with_size(case: Case) -> None:
    analysis = analysis_of(random_weight(torch.float64))
    metric = analysis.metrics["layer.weight"]
    losses = []
    for form in (case.small, case.large):
        fitted, factors = form.fit(analysis.weights, analysis)
        measured = metric.loss(analysis.weights["layer.weight"] - fitted.to_dense(factors))
        predicted = form.predicted_loss(analysis.region, analysis)
        torch.testing.assert_close(predicted, measured, rtol=1e-8, atol=1e-12)
        losses.append(measured)
    assert losses[1] <= losses[0]


def test_weighting_never_hurts_on_the_calibration_inputs(case: Case) -> None:
    weight = random_weight(torch.float64)
    plain, weighted = analysis_of(weight, metric=Metric()), analysis_of(weight)
    metric = weighted.metrics["layer.weight"]
    unweighted, factors = case.small.fit(plain.weights, plain)
    without = metric.loss(weight - unweighted.to_dense(factors))
    assert case.small.predicted_loss(weighted.region, weighted) <= without * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_determinism_are_kept(case: Case, dtype: torch.dtype) -> None:
    """Rows 71 and 72: half precision is factored in float64 and cast back, finite."""
    if isinstance(case.large, GaugeFixed) and case.large.rows == "window" and dtype.itemsize == 2:
        pytest.skip("windows are not proposed in half precision")
    results = []
    for _ in range(2):
        analysis = analysis_of(random_weight(dtype))
        fitted, factors = case.large.fit(analysis.weights, analysis)
        assert all(part.dtype == dtype for part in factors.values() if part.is_floating_point())
        assert all(torch.isfinite(part).all() for part in factors.values())
        results.append((fitted, factors))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 2), (3, 2)])
def test_row_39_awkward_shapes_give_no_candidate_or_one_that_works(
    case: Case, shape: tuple[int, int]
) -> None:
    analysis = analysis_of(random_weight(torch.float64, shape))
    for candidate in type(case.large).candidates(analysis.region, analysis):
        fitted, factors = candidate.fit(analysis.weights, analysis)
        assert fitted.to_dense(factors).shape == shape


def test_candidates_of_a_prime_shape_are_in_order_of_size(case: Case) -> None:
    analysis = analysis_of(random_weight(shape=(13, 17)))
    sizes = [
        measure(item, analysis.region).weight_bytes
        for item in type(case.large).candidates(analysis.region, analysis)
    ]
    assert sizes
    assert all(first < second for first, second in pairwise(sizes)) or len(sizes) == 1


def test_json_round_trip_and_unknown_settings(case: Case) -> None:
    assert from_json(to_json(case.large)) == case.large
    with pytest.raises(PlanError, match="no setting 'colour'"):
        from_json({**to_json(case.large), "colour": 1})


def test_names_agree() -> None:
    """File = class = name = case, and every format has a row."""
    for member in FACTORIZATIONS:
        assert Path(inspect.getfile(member)).stem == member.name
        assert member.__name__.lower() == member.name.replace("_", "")
        assert member.name in CASES
    assert {name.split("-")[0] for name in CASES} == {member.name for member in FACTORIZATIONS}
    assert all(CASES[name].large.name == name.split("-")[0] for name in CASES)


def test_geometry_names_subspaces_that_fit(case: Case) -> None:
    region = analysis_of(random_weight()).region
    form = case.large.geometry(region)
    assert {space.ambient for space in form.subspaces} == set(SHAPE)
    assert all(0 < space.dim <= space.ambient for space in form.subspaces)
    assert form.transformations


def test_row_118_only_registered_formats_can_be_named() -> None:
    for name in ("os.system", "geofx.model.OptimizedModel", "", None):
        with pytest.raises(PlanError, match="unknown factorization"):
            from_json({"name": name})


@pytest.mark.parametrize("rank", [0, -1, 21])
def test_ranks_outside_the_weight_are_refused(rank: int) -> None:
    region = analysis_of(random_weight()).region
    for form in (LowRank(rank), GaugeFixed(rank)):
        with pytest.raises(PlanError, match="outside 1"):
            form.factor_shapes(region)


def test_row_79_full_rank_reproduces_the_weight() -> None:
    weight = random_weight(torch.float64)
    analysis = analysis_of(weight)
    fitted, factors = LowRank(20).fit(analysis.weights, analysis)
    torch.testing.assert_close(fitted.to_dense(factors), weight, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["zero", "rank one", "identity", "repeated"])
def test_row_73_degenerate_weights(kind: str) -> None:
    weight = {
        "zero": torch.zeros(24, 20),
        "rank one": torch.outer(torch.arange(1.0, 25), torch.arange(1.0, 21)),
        "identity": torch.eye(24, 20),
        "repeated": 3 * torch.eye(24, 20),
    }[kind]
    analysis = analysis_of(weight)
    ranks = {"zero": 0, "rank one": 1, "identity": 20, "repeated": 20}
    assert analysis.spectrum.numerical_rank == ranks[kind]
    fitted, factors = LowRank(max(1, ranks[kind])).fit(analysis.weights, analysis)
    torch.testing.assert_close(fitted.to_dense(factors), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_row_74_scale_does_not_matter(scale: float) -> None:
    weight = random_weight(torch.float32) * scale
    analysis = analysis_of(weight)
    fitted, factors = LowRank(20).fit(analysis.weights, analysis)
    error = (fitted.to_dense(factors).double() - weight.double()).norm() / weight.double().norm()
    assert error < 1e-5


def test_row_72_factors_of_a_large_half_weight_stay_finite_because_they_are_balanced() -> None:
    weight = (random_weight(torch.float64) * 8e3).half()
    analysis = analysis_of(weight, metric=Metric())
    _, factors = LowRank(20).fit(analysis.weights, analysis)
    assert all(part.abs().max() < 1e3 for part in factors.values())


def test_gauge_without_a_regular_window_is_refused() -> None:
    """Every other output is dead, so eight neighbours have no rank of eight: an error, not a bad model."""
    weight = random_weight()
    weight[::2] = 0.0
    analysis = analysis_of(weight, metric=Metric())
    with pytest.raises(NumericsError, match="gauge-fixed"):
        GaugeFixed(8).fit(analysis.weights, analysis)
    fitted, factors = GaugeFixed(8, "pivoted").fit(analysis.weights, analysis)
    assert torch.isfinite(fitted.to_dense(factors)).all()


@pytest.mark.parametrize("start", [0, 5, 16])
def test_gauge_of_any_window_multiplies_out(start: int) -> None:
    """Rows start .. start + 8 are the basis, the sixteen others mixtures of it."""
    generator = torch.Generator().manual_seed(start)
    basis = torch.randn(8, 20, generator=generator, dtype=torch.float64)
    factors = {"basis": basis, "mix": torch.randn(16, 8, generator=generator, dtype=torch.float64)}
    form = GaugeFixed(8, start=start)
    dense = form.to_dense(factors)
    assert torch.equal(dense[start : start + 8], basis)
    for lead in ((3,), (2, 3)):
        x = torch.randn(*lead, 20, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(form.apply(x, factors), x @ dense.T, rtol=1e-12, atol=1e-12)


def test_windows_between_the_ends_are_taken_where_the_ends_are_singular() -> None:
    weight = random_weight(torch.float64)
    weight[:4] = 0.0
    weight[-4:] = 0.0
    analysis = analysis_of(weight, metric=Metric())
    fitted, factors = GaugeFixed(8).fit(analysis.weights, analysis)
    assert 0 < fitted.start < 16
    assert torch.isfinite(fitted.to_dense(factors)).all()


def test_dense_is_an_option_everywhere() -> None:
    analysis = analysis_of(random_weight())
    assert list(Dense.candidates(analysis.region, analysis)) == [Dense()]
