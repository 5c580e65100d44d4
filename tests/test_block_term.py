"""Block terms against low rank and tensorly's Tucker; candidates, refusals, ONNX."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import onnxruntime
import pytest
import tensorly
import torch
from tensorly.decomposition import tucker
from test_factorizations import analysis_of, random_weight
from torch import Tensor, nn

from geofx.errors import PlanError
from geofx.factorizations.block_term import BlockTerm
from geofx.factorizations.contract import Factors, factored_loss
from geofx.factorizations.low_rank import LowRank
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site
from geofx.workload import measure

SIDES = [(4, (24, 20)), (-4, (20, 24))]
"""Heads, and a shape whose folded side is 24."""


def analysis_with(heads: int, shape: tuple[int, int], metric: Metric | None = None) -> RegionAnalysis:
    return analysis_of(random_weight(torch.float64, shape), metric=metric)


def folded(weight: Tensor, heads: int) -> Tensor:
    side = weight if heads > 0 else weight.T
    return side.reshape(abs(heads), -1, side.shape[1])


@pytest.mark.parametrize(("heads", "shape"), SIDES)
@pytest.mark.parametrize("third", [1, 5, 12, 20])
def test_one_term_over_whole_heads_is_low_rank(heads: int, shape: tuple[int, int], third: int) -> None:
    """Nothing but the rank of the other side is cut: the optimum of the weighted form is known."""
    analysis = analysis_with(heads, shape)
    loss = BlockTerm(heads, 1, (4, 6, third)).predicted_loss(analysis.region, analysis)
    expected = LowRank(third).predicted_loss(analysis.region, analysis)
    total = analysis.metric.loss(analysis.weight)
    assert loss == pytest.approx(expected, rel=1e-8, abs=1e-12 * total)


@pytest.mark.parametrize(("heads", "shape"), SIDES)
def test_factors_are_tucker_blocks_to_tensorly(heads: int, shape: tuple[int, int]) -> None:
    analysis = analysis_with(heads, shape)
    form, factors = BlockTerm(heads, 3, (2, 3, 5)).fit(analysis.weights, analysis)
    blocks = [
        tensorly.tucker_to_tensor(
            (
                factors["core"][term].permute(1, 2, 0).numpy(),
                [
                    factors["heads"][:, term].numpy(),
                    factors["dims"][term].T.numpy(),
                    factors["whole"][term].T.numpy(),
                ],
            )
        )
        for term in range(3)
    ]
    torch.testing.assert_close(
        folded(form.to_dense(factors), heads), torch.from_numpy(sum(blocks)), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("ranks", [(2, 3, 4), (3, 4, 8), (2, 6, 6)])
def test_unweighted_one_term_is_tensorlys_tucker(ranks: tuple[int, int, int]) -> None:
    """Where the tensor has a best approximation that stands out; on noise both only approach one."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(size, rank, generator=generator, dtype=torch.float64)
        for size, rank in zip((4, 6, 20), ranks, strict=True)
    ]
    clean = tensorly.tucker_to_tensor(
        (
            torch.randn(ranks, generator=generator, dtype=torch.float64).numpy(),
            [part.numpy() for part in parts],
        )
    )
    weight = torch.from_numpy(clean).reshape(24, 20) + 0.1 * random_weight(torch.float64)
    analysis = analysis_of(weight, metric=Metric())
    array = folded(weight, 4).numpy()
    core, bases = tucker(array, ranks, init="svd", n_iter_max=200, tol=1e-12)
    theirs = ((array - tensorly.tucker_to_tensor((core, bases))) ** 2).sum()
    ours = BlockTerm(4, 1, ranks).predicted_loss(analysis.region, analysis)
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(("heads", "shape"), SIDES)
def test_the_metric_is_used(heads: int, shape: tuple[int, int]) -> None:
    """Far below the unweighted fit's loss where the metric is far from the identity."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for size in shape:
        rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
        rows = rows * torch.logspace(0, -2, size, dtype=torch.float64) @ torch.linalg.qr(rows)[1]
        sides.append(rows.T @ rows / len(rows) + 1e-6 * torch.eye(size, dtype=torch.float64))
    weighted = analysis_with(heads, shape, Metric(sides[1], sides[0]))
    plain = analysis_with(heads, shape, Metric())
    form = BlockTerm(heads, 2, (2, 6, 8))
    _, factors = form.fit(plain.weights, plain)
    assert form.predicted_loss(weighted.region, weighted) < 0.2 * factored_loss(form, factors, weighted)


@pytest.mark.parametrize("heads", [3, 9, -9])
def test_candidates_reach_the_usual_shares_and_only_where_there_are_heads(heads: int) -> None:
    shape = (64 * abs(heads), 576) if heads > 0 else (576, 576)
    site = Site("w", shape, heads=heads)
    region = Region("w", "single", (site,))
    analysis = RegionAnalysis(region, {"w": torch.empty(shape, device="meta")}, {"w": Metric()})
    shares = [
        measure(form, region).weight_bytes / (4 * shape[0] * shape[1])
        for form in BlockTerm.candidates(region, analysis)
    ]
    assert all(first < second for first, second in pairwise(shares))
    assert shares[0] < 0.15
    assert shares[-1] < 1.0
    for keep in (0.9, 0.8, 0.6):
        assert min(abs(share - keep) for share in shares) < 0.02
    for none in (0, 1, -1):
        bare = Region("w", "single", (replace(site, heads=none),))
        assert not list(BlockTerm.candidates(bare, replace(analysis, region=bare)))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (BlockTerm(5, 1, (1, 1, 1)), "5 heads do not fit"),
        (BlockTerm(-3, 1, (1, 1, 1)), "-3 heads do not fit"),
        (BlockTerm(0, 1, (1, 1, 1)), "0 heads do not fit"),
        (BlockTerm(4, 0, (1, 1, 1)), "0 terms"),
        (BlockTerm(4, 1, (5, 1, 1)), r"outside 1\.\.\(4, 6, 20\)"),
        (BlockTerm(4, 1, (1, 0, 1)), "outside 1"),
        (BlockTerm(-4, 1, (4, 6, 1)), r"outside 1\.\.\(4, 5, 24\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(form: BlockTerm, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        form.factor_shapes(analysis_of(random_weight()).region)


class Applied(nn.Module):
    def __init__(self, form: Any, factors: Factors) -> None:
        super().__init__()
        self.form, self.factors = form, nn.ParameterDict(dict(factors))

    def forward(self, x: Tensor) -> Tensor:
        return self.form.apply(x, self.factors)


@pytest.mark.parametrize("heads", [4, -4])
def test_onnx_round_trip_at_two_shapes(heads: int) -> None:
    analysis = analysis_of(random_weight())
    module = Applied(*BlockTerm(heads, 2, (2, 3, 4)).fit(analysis.weights, analysis)).eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program = torch.onnx.export(
        module, (torch.randn(2, 3, 20),), dynamo=True, optimize=False, dynamic_shapes=(sizes,), verbose=False
    )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for lead in ((2, 3), (4, 7)):
        x = torch.randn(*lead, 20)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_largest_candidate_is_smaller_than_the_weight() -> None:
    """Of 8 x 13 in two heads a third rank of 2 would take all 104 numbers."""
    region = Region("q", "single", (Site("q", (8, 13), heads=2),))
    forms = list(BlockTerm.candidates(region, None))  # type: ignore[arg-type]
    assert [form.ranks[2] for form in forms] == [1]
    assert sum(map(math.prod, BlockTerm(2, 2, (1, 4, 2)).factor_shapes(region).values())) == 104


def test_row_72_factors_of_a_large_half_weight_are_balanced() -> None:
    weight = (1000 * random_weight(torch.float64, (24, 20))).half()
    analysis = analysis_of(weight)
    _, factors = BlockTerm(4, 2, (2, 6, 9)).fit(analysis.weights, analysis)
    peaks = [float(part.abs().max()) for part in factors.values()]
    assert max(peaks) < 1.01 * min(peaks)
