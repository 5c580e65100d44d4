"""A sum of two formats: against both alone, its alternation, its nested settings, and ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from format_probe import outputs_of
from test_factorizations import analysis_of, random_weight
from torch import Tensor

from geofx.errors import PlanError
from geofx.factorizations import (
    Factorization,
    GaugeFixed,
    Hybrid,
    LowRank,
    LowRankPlusSparse,
    SharedBasis,
    TensorTrain,
    from_json,
    to_json,
)
from geofx.factorizations.contract import factored_loss
from geofx.region_analysis import Metric
from geofx.workload import measure

TRAIN = TensorTrain((6, 4), (5, 4), (2,))
FORM = Hybrid(TRAIN, LowRank(3))


def train_and_low_rank() -> tuple[Tensor, Tensor]:
    shapes = TRAIN.factor_shapes(analysis_of(random_weight()).region)
    cores = {
        name: random_weight(torch.float64, shape, seed)  # type: ignore[arg-type]
        for seed, (name, shape) in enumerate(shapes.items())
    }
    left, right = random_weight(torch.float64, (24, 3), 5), random_weight(torch.float64, (3, 20), 6)
    return TRAIN.to_dense(cores), left @ right


def test_dense_and_factors_are_those_of_the_parts() -> None:
    analysis = analysis_of(random_weight(torch.float64))
    fitted, factors = FORM.fit(analysis.weights, analysis)
    assert fitted == FORM
    assert set(factors) == {"core1_first", "core2_first", "left_second", "right_second"}
    first = {name: factors[f"{name}_first"] for name in ("core1", "core2")}
    expected = TRAIN.to_dense(first) + factors["left_second"] @ factors["right_second"]
    torch.testing.assert_close(FORM.to_dense(factors), expected, rtol=0.0, atol=0.0)


def test_a_sum_of_both_structures_is_where_it_beats_each_alone() -> None:
    """At no more bytes, in the metric."""
    weight = sum(train_and_low_rank(), torch.zeros(()))
    analysis = analysis_of(weight)
    size = measure(FORM, analysis.region).weight_bytes
    found = FORM.predicted_loss(analysis.region, analysis)
    for member in (TensorTrain, LowRank):
        rivals: list[Factorization] = [
            form
            for form in member.candidates(analysis.region, analysis)
            if measure(form, analysis.region).weight_bytes <= size
        ]
        assert found < 0.5 * min(form.predicted_loss(analysis.region, analysis) for form in rivals)


def test_the_fit_is_no_worse_than_the_unweighted_turns_and_each_part_alone() -> None:
    weight = random_weight(torch.float64)
    plain, weighted = analysis_of(weight, metric=Metric()), analysis_of(weight)
    without = factored_loss(*FORM.fit(plain.weights, plain), weighted)
    found = factored_loss(*FORM.fit(weighted.weights, weighted), weighted)
    assert found < 0.9 * without
    assert found < weighted.spectrum.tail(3)
    assert found < TRAIN.predicted_loss(weighted.region, weighted)


def test_settings_that_a_part_finds_in_the_data_are_kept() -> None:
    """Without its first and last rows the weight has no regular window at either end, so the window moves."""
    weight = random_weight(torch.float64)
    weight[:4], weight[-4:] = 0.0, 0.0
    analysis = analysis_of(weight, metric=Metric())
    form = Hybrid(TensorTrain((6, 4), (5, 4), (1,)), GaugeFixed(8))
    fitted, factors = form.fit(analysis.weights, analysis)
    assert isinstance(fitted.second, GaugeFixed)
    assert fitted.second.start > 0
    x = random_weight(torch.float64, (3, 20), 4)
    torch.testing.assert_close(fitted.apply(x, factors), x @ fitted.to_dense(factors).T)


def test_json_nests_and_is_read_from_the_registry_only() -> None:
    text = json.dumps(to_json(FORM))
    assert from_json(json.loads(text)) == FORM
    assert json.loads(text)["second"]["name"] == "low_rank"
    low_rank = to_json(LowRank(3))
    hostile: list[tuple[Any, str]] = [
        (3, "unknown factorization None"),
        ([], "unknown factorization None"),
        ({"name": "os.system"}, "unknown factorization 'os.system'"),
        (to_json(FORM), "unknown factorization 'hybrid'"),
        ({**low_rank, "rank": "3"}, "low_rank: rank"),
        ({**low_rank, "rank": low_rank}, "low_rank: rank"),
        ({**low_rank, "colour": 1}, "low_rank has no setting 'colour'"),
    ]
    for part, message in hostile:
        with pytest.raises(PlanError, match=message):
            from_json({"name": "hybrid", "first": low_rank, "second": part})
    with pytest.raises(PlanError, match="hybrid: second"):
        from_json({"name": "hybrid", "first": low_rank})


def test_parts_that_are_not_of_one_weight_are_refused() -> None:
    region = analysis_of(random_weight()).region
    for part in (FORM, SharedBasis(3)):
        with pytest.raises(PlanError, match="no part of a sum"):
            Hybrid(LowRank(2), part).factor_shapes(region)


def test_indices_of_parts_stay_indices() -> None:
    region = analysis_of(random_weight()).region
    shapes = Hybrid(LowRankPlusSparse(2, 3), GaugeFixed(4, "pivoted")).factor_shapes(region)
    assert shapes["index_first"] == shapes["index_second"] == (24,)


def test_onnx_runtime_agrees_at_batch_shapes_not_exported(tmp_path: Path) -> None:
    analysis = analysis_of(random_weight())
    form, factors = FORM.fit(analysis.weights, analysis)
    for found, expected in outputs_of(form, factors, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
