"""What a default plan fits: a format joins where a trial shows it ahead, and nowhere else."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import Tensor

import geofx
from geofx.factorizations import FACTORIZATIONS, Kronecker, LowRank
from geofx.options import list_options
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site

pytestmark = pytest.mark.usefixtures("trials")


def standard(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def analysis_of(name: str, weight: Tensor, seed: int = 0) -> RegionAnalysis:
    rows, columns = weight.shape
    x, g = standard(8 * columns, columns, seed=seed), standard(8 * rows, rows, seed=seed + 1)
    site = Site(name, (rows, columns), dtype="float64")
    metric = Metric(x.T @ x / len(x), g.T @ g / len(g))
    return RegionAnalysis(Region(name, "single", (site,)), {name: weight}, {name: metric})


def test_a_weight_near_low_rank_lets_no_format_in_that_needs_a_fit() -> None:
    weight = standard(24, 5, seed=1) @ standard(5, 20, seed=2) + 1e-3 * standard(24, 20, seed=3)
    options, skips = list_options([analysis_of("small", weight)])
    assert all(type(option.factorization).closed_form for option in options)
    screened = {skip.detail.split()[0] for skip in skips if skip.reason == "SCREENED"}
    every = {item.name for item in FACTORIZATIONS if not item.closed_form and "single" in item.regions}
    assert screened == every


def test_a_kronecker_product_lets_kronecker_in_where_the_shape_is_that_of_the_trial() -> None:
    product = torch.kron(standard(6, 5, seed=3), standard(4, 4, seed=4))
    larger = standard(48, 40, seed=5)
    options, _ = list_options([analysis_of("product", product), analysis_of("larger", larger)])
    fitted = {option.region.name for option in options if isinstance(option.factorization, Kronecker)}
    assert fitted == {"product"}
    best = min((item for item in options if item.region.name == "product" and not item.is_dense), key=_price)
    assert isinstance(best.factorization, Kronecker)


def _price(option) -> tuple[float, int]:
    return round(option.loss, 9), option.workload.weight_bytes


def test_a_format_asked_for_by_name_is_priced_everywhere() -> None:
    analyses = [
        analysis_of("small", standard(24, 20, seed=1)),
        analysis_of("larger", standard(48, 40, seed=5)),
    ]
    options, skips = list_options(analyses, [Kronecker])
    assert not skips
    assert {item.region.name for item in options if isinstance(item.factorization, Kronecker)} == {
        "small",
        "larger",
    }
    assert not any(isinstance(item.factorization, LowRank) for item in options)


def test_a_default_plan_of_a_small_decoder_tries_every_format() -> None:
    batches = [tiny_models.example("llama", 4, 24, seed) for seed in range(3)]
    result = geofx.optimize(tiny_models.build("llama"), geofx.Budget(size=0.8), calibration=batches)
    told = {row.detail.split()[0] for row in result.plan.rejections if row.reason == "SCREENED"}
    told |= {row.factorization for row in result.plan.rejections}
    told |= {choice.factorization.name for choice in result.plan.choices}
    assert {item.name for item in FACTORIZATIONS if {"single", "shared_input"} & item.regions} <= told
