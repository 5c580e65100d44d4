"""Rows as matrix product states: tensorly's TT-SVD row by row, growth that touches nothing, lookups alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorly
import torch
from factorization_cases import random
from format_probe import Sizes, lookups_of
from tensorly.decomposition import tensor_train
from test_factorizations import analysis_of
from torch import Tensor

from geofx.errors import NumericsError, PlanError
from geofx.factorizations import Factors, TokenMPS, from_json, to_json
from geofx.region import Region
from geofx.region_analysis import on_right
from geofx.site import Site
from geofx.workload import measure


def region_of(rows: int, columns: int) -> Region:
    return Region("table", "embedding", (Site("table", (rows, columns), "embedding"),))


def fitted(form: TokenMPS, weight: Tensor) -> Factors:
    analysis = analysis_of(weight, kind="embedding")
    return form.fit(analysis.weights, analysis)[1]


@pytest.mark.parametrize("columns", [20, 32, 100])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@tensorly.backend_context("pytorch")
def test_every_row_is_tensorlys_tensor_train(columns: int, rank: int) -> None:
    weight, form = random(6, columns), TokenMPS(columns, rank, "none")
    bits = (columns - 1).bit_length()
    dense = form.to_dense(fitted(form, weight))
    for row, found in zip(weight, dense, strict=True):
        padded = torch.cat([row, row.new_zeros(2**bits - columns)]).reshape([2] * bits)
        bonds = [min(rank, 2**place, 2 ** (bits - place)) for place in range(bits + 1)]
        train = tensor_train(padded, bonds)
        torch.testing.assert_close(found, train.to_tensor().flatten()[:columns], rtol=1e-8, atol=1e-8)
        assert form.numbers <= sum(core.numel() for core in train.factors)
    assert (form.numbers == sum(core.numel() for core in train.factors)) == (rank == 1)


def test_a_row_of_the_papers_sizes() -> None:
    """Of 576 padded to 1024: modes of 2 at rank 1, merged at the ends where the bonds cut nothing."""
    assert TokenMPS(576, 1).cores == ((1, 2, 1),) * 10
    assert TokenMPS(576, 4).cores == ((1, 8, 4), *((4, 2, 4),) * 4, (4, 8, 1))
    assert [TokenMPS(576, rank).numbers for rank in (1, 2, 4, 8, 16)] == [20, 64, 192, 512, 1024]
    assert [form.rank for form in TokenMPS.candidates(region_of(9, 576), None)] == [*range(1, 9)]  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_each_row_is_nearer_in_the_metric_than_its_tt_svd(rank: int) -> None:
    weight = random(50, 100)
    weight[7] = 0.0
    analysis = analysis_of(weight, kind="embedding")
    lost = []
    for form in (TokenMPS(100, rank, "none"), TokenMPS(100, rank)):
        change = weight - form.to_dense(form.fit(analysis.weights, analysis)[1])
        lost.append((change * on_right(change, analysis.metric.input)).sum(1))
    assert (lost[1] <= lost[0]).all()
    assert lost[1].sum() < 0.95 * lost[0].sum()


def test_new_tokens_leave_the_stored_ones_alone() -> None:
    weight, new, newer = random(40, 24), random(7, 24, seed=1), random(1, 24, seed=2)
    form = TokenMPS(24, 2)
    factors = fitted(form, weight)
    grown, once = form.add_tokens(factors, new)
    twice_grown, twice = grown.add_tokens(once, newer)
    assert twice_grown.added == (7, 1)
    assert all(twice[name] is once[name] for name in once)
    assert once["cores"] is factors["cores"]
    old = torch.arange(40)
    assert torch.equal(twice_grown.lookup(old, twice), form.lookup(old, factors))
    alone = TokenMPS(24, 2, "none")
    for start, rows in ((40, new), (47, newer)):
        places = torch.arange(start, start + len(rows))
        expected = alone.to_dense(fitted(alone, rows))
        torch.testing.assert_close(twice_grown.lookup(places, twice), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(twice_grown.to_dense(twice)[places], expected, rtol=1e-12, atol=1e-12)
    shapes = twice_grown.factor_shapes(region_of(48, 24))
    assert {name: tuple(part.shape) for name, part in twice.items()} == shapes
    assert from_json(to_json(twice_grown)) == twice_grown
    assert measure(twice_grown, region_of(48, 24)).parameters == 48 * form.numbers


def test_a_grown_table_is_fitted_again_in_its_parts() -> None:
    weight = random(48, 24)
    factors = fitted(TokenMPS(24, 2, added=(7, 1)), weight)
    assert [len(part) for part in factors.values()] == [40, 7, 1]
    torch.testing.assert_close(
        TokenMPS(24, 2, added=(7, 1)).to_dense(factors),
        TokenMPS(24, 2).to_dense(fitted(TokenMPS(24, 2), weight)),
    )


@pytest.mark.parametrize("rows", [100, 100_000])
def test_growing_and_reading_cost_the_same_at_any_vocabulary(rows: int) -> None:
    form = TokenMPS(24, 2)
    factors = {"cores": torch.zeros(rows, form.numbers)}
    with Sizes() as growing:
        grown, more = form.add_tokens(factors, random(16, 24).float())
    with Sizes() as reading:
        grown.lookup(torch.arange(16) + rows - 8, more)
    assert growing.largest <= 16 * 64
    assert reading.largest <= 16 * 64


def test_lookups_run_in_onnx_runtime_and_torchscript(tmp_path: Path) -> None:
    form = TokenMPS(24, 3)
    factors = {name: part.float() for name, part in fitted(form, random(40, 24)).items()}
    for name, (number, pair) in enumerate(
        ((40, (form, factors)), (47, form.add_tokens(factors, random(7, 24))))
    ):
        folder = tmp_path / str(name)
        folder.mkdir()
        for found, expected in lookups_of(*pair, number, folder):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    form = TokenMPS(24, 2)
    for wrong, region in (
        (TokenMPS(24, 5), region_of(9, 24)),
        (TokenMPS(24, 0), region_of(9, 24)),
        (form, region_of(9, 25)),
        (TokenMPS(24, 2, added=(9,)), region_of(9, 24)),
        (TokenMPS(24, 2, added=(-3,)), region_of(9, 24)),
        (TokenMPS(24, 2, added=(0,)), region_of(9, 24)),
    ):
        with pytest.raises(PlanError, match="rank"):
            wrong.factor_shapes(region)
    for rows in (random(3, 23), random(0, 24), random(24)):
        with pytest.raises(PlanError, match="new rows"):
            form.add_tokens({}, rows)
    with pytest.raises(PlanError, match="only looked up"):
        form.apply(random(24), {})


def test_row_72_cores_beyond_the_dtype_are_refused() -> None:
    table = torch.full((9, 24), 6e4).half()
    with pytest.raises(NumericsError, match="cores of a table"):
        fitted(TokenMPS(24, 2, "none"), table)
    form, rows = TokenMPS(24, 2, "none"), random(9, 24).half()
    with pytest.raises(NumericsError, match="new rows"):
        form.add_tokens(fitted(form, rows), torch.full((2, 24), 6e4))
