"""Blocks of rows: the weighted optimum of each, ranks that no others beat, rows that find their block."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from factorization_cases import random
from format_probe import Sizes, lookups_of, outputs_of
from torch import Tensor

from geofx.errors import PlanError
from geofx.factorizations import GroupReduce, LowRank
from geofx.factorizations.contract import factored_loss
from geofx.factorizations.group_reduce import halved
from geofx.linalg import root_and_inverse
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site


def analysis_of(weight: Tensor, shares: Tensor | None = None, scale: float = 1.0) -> RegionAnalysis:
    """A table whose rows are read as often as ``shares`` say, by default by Zipf's law, in disorder."""
    rows, columns = weight.shape
    if shares is None:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(5))
        shares = (1.0 / torch.arange(1, rows + 1, dtype=torch.float64))[order]
        shares = shares / shares.sum()
    root = random(columns, columns, seed=6)
    region = Region("table", "embedding", (Site("table", (rows, columns), "embedding", dtype="float64"),))
    return RegionAnalysis(region, {"table": weight}, {"table": Metric(root @ root.T, shares, scale)})


def loss_of(form: GroupReduce | LowRank, analysis: RegionAnalysis) -> float:
    fitted, factors = form.fit(analysis.weights, analysis)
    return factored_loss(fitted, factors, analysis)


def test_every_block_is_the_truncated_svd_in_the_metric() -> None:
    weight = random(60, 12)
    analysis = analysis_of(weight, scale=3.0)
    form = GroupReduce((10, 20, 30), (7, 4, 1))
    _, factors = form.fit(analysis.weights, analysis)
    metric = analysis.metric
    root, inverse = root_and_inverse(metric.input)
    expected, lost = torch.empty_like(weight), 0.0
    rows = metric.output.argsort(descending=True)
    for part, rank in zip(rows.split([10, 20, 30]), form.ranks, strict=True):
        scale = metric.output[part].sqrt()[:, None]
        left, values, right = torch.linalg.svd(scale * weight[part] @ root, full_matrices=False)
        expected[part] = (left[:, :rank] * values[:rank]) @ right[:rank] @ inverse / scale
        lost += 3.0 * float(values[rank:].square().sum())
    torch.testing.assert_close(form.to_dense(factors), expected, rtol=1e-8, atol=1e-8)
    assert form.predicted_loss(analysis.region, analysis) == pytest.approx(lost, rel=1e-9)


def test_no_ranks_of_the_same_size_lose_less() -> None:
    """Against all ranks of all blocks: what is proposed lies on the frontier of loss and size."""
    analysis = analysis_of(random(40, 6))
    assert halved(40, 12) == (10, 10, 20)
    assert halved(40, 6) == (5, 5, 10, 20)
    limits = [range(1, min(size, 6) + 1) for size in halved(40, 6)]
    every = [GroupReduce((5, 5, 10, 20), ranks) for ranks in itertools.product(*limits)]
    priced = [(numbers_of(form), form.predicted_loss(analysis.region, analysis)) for form in every]
    proposed = list(GroupReduce.candidates(analysis.region, analysis))
    assert len(proposed) > 4
    for form in proposed:
        size, loss = numbers_of(form), form.predicted_loss(analysis.region, analysis)
        assert loss <= min(other for numbers, other in priced if numbers <= size) * (1 + 1e-9)


def numbers_of(form: GroupReduce, columns: int = 6) -> int:
    return sum(rank * (size + columns) for size, rank in zip(form.sizes, form.ranks, strict=True))


def test_sizes_come_near_any_share_and_frequent_rows_have_more_rank() -> None:
    analysis = analysis_of(random(2048, 32))
    forms = list(GroupReduce.candidates(analysis.region, analysis))
    sizes = [numbers_of(form, 32) + 2048 for form in forms]
    for keep in (0.9, 0.8, 0.6, 0.3, 0.1):
        assert min(abs(size / (2048 * 32) - keep) for size in sizes) < 0.02
    middle = forms[len(forms) // 2]
    assert middle.sizes == (16, 16, 32, 64, 128, 256, 512, 1024)
    assert middle.ranks[2] > 2 * middle.ranks[-1]


def test_it_loses_less_than_low_rank_at_the_same_size_where_frequencies_differ() -> None:
    analysis = analysis_of(random(2048, 32))
    for rank in (4, 12, 20):
        plain = LowRank(rank)
        room = rank * (2048 + 32)
        smaller = [
            form
            for form in GroupReduce.candidates(analysis.region, analysis)
            if numbers_of(form, 32) + 2048 <= room
        ]
        assert loss_of(smaller[-1], analysis) < 0.8 * loss_of(plain, analysis)


def test_exchanged_rows_find_the_subspace_that_they_are_from() -> None:
    """Two planes, rows of each mixed by frequency: no block of frequent rows is one of them."""
    planes = random(20, 2, seed=1) @ random(2, 8, seed=2), random(20, 2, seed=3) @ random(2, 8, seed=4)
    weight = torch.stack(planes, 1).flatten(0, 1)
    shares = torch.linspace(1.0, 0.5, 40, dtype=torch.float64)
    analysis = analysis_of(weight, shares)
    losses = [loss_of(GroupReduce((20, 20), (2, 2), exchanges), analysis) for exchanges in range(12)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
    assert losses[1] < 0.9 * losses[0]


def test_lookups_and_the_head_run_in_onnx_runtime_and_torchscript(tmp_path: Path) -> None:
    analysis = analysis_of(random(60, 12).float())
    form = GroupReduce((10, 20, 30), (7, 4, 1))
    _, factors = form.fit(analysis.weights, analysis)
    assert factors["index"].dtype == torch.int32
    for found, expected in (*lookups_of(form, factors, 60, tmp_path), *outputs_of(form, factors, tmp_path)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_what_is_asked_for_is_rebuilt() -> None:
    form = GroupReduce((1000, 99_000), (3, 1))
    factors = {
        "left": torch.zeros(1000, 3),
        "left1": torch.zeros(99_000, 1),
        "right": torch.zeros(4, 12),
        "index": torch.arange(100_000, dtype=torch.int32),
    }
    with Sizes() as sizes:
        form.lookup(torch.arange(8), factors)
    assert sizes.largest <= 8 * 12


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [((10, 10), (2,)), ((10, 9), (2, 2)), ((10, 10), (2, 0)), ((10, 10), (2, 11)), ((), ())],
)
def test_blocks_that_do_not_fit_are_refused(sizes: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    region = analysis_of(random(20, 12)).region
    with pytest.raises(PlanError):
        GroupReduce(sizes, ranks).factor_shapes(region)
