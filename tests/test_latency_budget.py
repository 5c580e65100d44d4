"""Budgets for the latency: asked, predicted, measured, and told where they are missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import geofx
from geofx import Budget, Target
from geofx.analysis import Analysis
from geofx.cache import Cache
from geofx.calls import exported, loaded, ready
from geofx.clock import Clock
from geofx.errors import BudgetInfeasibleError, ConfigError
from geofx.export.onnx_copies import with_copies
from geofx.factorizations import Dense, LowRank
from geofx.latency_budget import Wanted, in_time
from geofx.piece import Piece
from geofx.piece_latency import PieceTimer, copies_of, repeated
from geofx.region import Region
from geofx.report_rows import comparison
from geofx.site import Site
from geofx.workload import measure

WIDTH, ROWS = 512, 64
SINGLE = Region("w", "single", (Site("w", (96, 64)),))


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


def wide() -> torch.nn.Module:
    """Four maps whose inputs lie near a subspace, so that ranks can be cut."""
    torch.manual_seed(0)
    parts = [part for _ in range(4) for part in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    return torch.nn.Sequential(*parts[:-1])


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(16, WIDTH, generator=generator)
    batches = [torch.randn(ROWS, 16, generator=generator) @ low / 4 for _ in range(6)]
    return geofx.analyze(wide(), batches, progress=lambda *_: None)


class Paper(PieceTimer):
    """Seconds that are in proportion to flops."""

    def __call__(self, pieces: Sequence[Piece], rows: int) -> list[float]:
        return [1e-9 * rows * measure(piece.form, piece.region).flops for piece in pieces]


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch, analysis: Analysis) -> Callable[[float], None]:
    """Time by the flops alone: of a piece, and of a program as far as ``share`` of what is saved shows."""
    analysis._clocks.clear()
    monkeypatch.setattr("geofx.clock.PieceTimer", Paper)
    dense = 2.0 * 4 * WIDTH * WIDTH

    def with_share(share: float) -> None:
        def made(program: Any, inputs: Any, target: Target, rows: int) -> Callable[[], float]:
            flops = sum(2.0 * part.numel() for _, part in program.tensors() if part.dim() == 2)
            return lambda: 1e-9 * target.batch * (dense - share * (dense - flops))

        def timed(calls: Any, rounds: int, progress: Any) -> dict[str, list[float]]:
            return {name: [call()] * rounds for name, call in calls.items()}

        monkeypatch.setattr("geofx.clock.ready", made)
        monkeypatch.setattr("geofx.clock.interleaved_times", timed)

    return with_share


@pytest.mark.parametrize("share", [1.0, 0.6, 1.5])
def test_the_budget_is_met_as_measured_whatever_pieces_promise(
    analysis: Analysis, paper: Callable[[float], None], share: float
) -> None:
    paper(share)
    target = Target(batch=ROWS)
    plan, rewrites = in_time(analysis, Budget(latency=0.8), Wanted(target=target))
    clock = analysis.clock(target)
    taken = clock.seconds(clock.measure(analysis.lower(plan, rewrites)))
    assert 0.94 * 0.8 < taken / clock.dense_s <= 0.8
    if share != 1.0:
        assert clock.saving_ratio == pytest.approx(share, rel=0.1)


def test_a_budget_that_no_plan_meets_is_an_error_with_the_best_result(
    analysis: Analysis, paper: Callable[[float], None]
) -> None:
    paper(0.05)
    with pytest.raises(BudgetInfeasibleError) as caught:
        geofx.optimization.optimize_analysis(analysis, Budget(latency=0.5), target=Target(batch=ROWS))
    best = caught.value.result
    assert isinstance(best, geofx.OptimizedModel)
    (timing,) = best.report.timings
    assert timing.ratio > 0.9
    assert "the best result takes" in str(caught.value)


def test_latency_and_size_hold_together_and_the_report_says_both(
    analysis: Analysis, paper: Callable[[float], None]
) -> None:
    paper(1.0)
    budget = Budget(latency=0.9, size=0.5)
    result = geofx.optimization.optimize_analysis(analysis, budget, target=Target(batch=ROWS))
    report = result.report
    assert report.timings[0].ratio <= 0.9
    assert report.optimized.size_bytes <= 0.5 * report.original.size_bytes
    assert report.predicted_latency_ratio == pytest.approx(report.timings[0].ratio, rel=0.05)
    assert "latency" in str(result.plan)
    (line,) = (row for row in comparison(report) if row.label.startswith("Latency, eager on cpu"))
    assert line.change.startswith("-")
    assert type(report).from_json(report.to_json()) == report
    again = type(result.plan).from_json(result.plan.to_json())
    assert again.predicted == result.plan.predicted


def test_what_is_no_faster_is_left_dense(
    analysis: Analysis, paper: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    paper(1.0)
    slow = "2.weight"

    def gain(self: Any, item: Any) -> float:
        return -1.0 if item.region.name == slow else 1.0

    monkeypatch.setattr("geofx.cost_models.measured.Measured.gain_s", gain)
    monkeypatch.setattr("geofx.clock.DOUBTFUL_RATIO", 0.0)
    plan, _ = in_time(analysis, Budget(latency=0.8), Wanted(target=Target(batch=ROWS)))
    chosen = {choice.region: choice for choice in plan.choices}
    assert all(slow not in choice.weights or choice.is_dense for choice in chosen.values())
    assert any(row.region == slow and "no faster" in row.detail for row in plan.rejections)


def test_computed_targets_are_planned_for_and_not_measured(analysis: Analysis) -> None:
    targets = Target(device="a100-sxm", batch=4096), Target(device="a100-sxm", batch=1, weight=10.0)
    result = geofx.optimization.optimize_analysis(analysis, Budget(latency=0.7), target=targets)
    assert result.report.timings == ()
    assert 0.6 < result.report.predicted_latency_ratio <= 0.7
    with pytest.raises(ConfigError, match="some computed"):
        analysis.clock((Target(), targets[0]))
    with pytest.raises(ConfigError, match="nearest are"):
        analysis.clock(Target(device="a100"))


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_computed_model_is_the_sum_of_its_parts(analysis: Analysis, dtype: Any) -> None:
    clock = analysis.clock(Target(device="h100-sxm", tokens=1, dtype=dtype))
    options, outside_s, _ = clock.priced(clock.dense)
    assert len(options) == 4
    assert outside_s > 0.0
    assert clock.dense_s == pytest.approx(outside_s + sum(option.latency_s for option in options))
    biases = 4 * WIDTH * (2 if dtype else 4) / 3.35e12
    assert outside_s == pytest.approx(biases, rel=0.01)


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_a_real_budget_on_this_machine(
    analysis: Analysis, runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise is no reason to fail, as the error carries what was measured; silence would be."""
    analysis._clocks.clear()
    monkeypatch.setattr("geofx.piece_latency.COLD_BYTES", 2**22)
    monkeypatch.setattr("geofx.piece_latency.ROUNDS", 3)
    monkeypatch.setattr("geofx.cost_models.measured.ANCHORS", 3)
    target = Target(runtime, batch=ROWS)
    try:
        result = geofx.optimization.optimize_analysis(analysis, Budget(latency=0.7), target=target)
    except BudgetInfeasibleError as error:
        result = error.result
        assert result.report.timings[0].ratio > 0.7
    else:
        assert result.report.timings[0].ratio <= 0.7
    assert result.report.timings[0].rounds > 2
    assert result.plan.rewritten


def test_a_piece_alone_computes_what_its_form_does() -> None:
    for form in (Dense(), LowRank(8)):
        piece = Piece.of(form, SINGLE)
        program = repeated(piece, 5, 3)
        x = program.example["x0"]
        factors = piece.factors("cpu")
        outputs = program(**program.example)
        assert len(outputs) == 3
        for copy, output in enumerate(outputs):
            scaled = {name: part * (1.0 + copy / 1024) for name, part in factors.items()}
            torch.testing.assert_close(output, form.apply(x, scaled)[..., :1], rtol=1e-5, atol=1e-6)
        eager = ready(program, program.example, Target(), 1)()
        copied = loaded(with_copies(exported(repeated(piece, 5, 1)), 3), program.example)()
        for found in (eager, copied):
            torch.testing.assert_close(torch.as_tensor(found[2]), outputs[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("budget", "target", "message"),
    [
        (Budget(size=0.8), Target(), "does not limit the latency"),
        (Budget(latency=0.8), Target(device="a100"), "nearest are"),
        (Budget(latency=0.8), (Target(), Target(device="t4")), "some computed"),
        (Budget(latency=0.8), (), "give a geofx.Target"),
        (Budget(latency=0.8), Target("onnxruntime", device="cuda"), "CUDA|CPU only"),
    ],
)
def test_targets_are_checked_before_any_work(budget: Budget, target: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        geofx.optimize(torch.nn.Linear(2, 2), budget, target=target)


@pytest.mark.parametrize(
    "settings",
    [
        {"runtime": "jax"},
        {"batch": 0},
        {"tokens": True},
        {"weight": 0.0},
        {"dtype": "int8"},
        {"dtype": "float16"},
    ],
)
def test_targets_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="|".join((*settings, "measured in"))):
        Target(**settings)


def test_copies_exceed_caches_but_not_patience() -> None:
    small, large = (
        Piece.of(Dense(), SINGLE),
        Piece.of(Dense(), Region("w", "single", (Site("w", (8192, 2048)),))),
    )
    assert copies_of(small, 1) == 128
    assert copies_of(large, 1) == 2
    assert copies_of(large, 512) == 2


def test_timings_are_kept_on_disk(tmp_path: Path) -> None:
    pieces = [Piece.of(Dense(), SINGLE), Piece.of(LowRank(8), SINGLE)]
    told: list[int] = []
    timer = PieceTimer(Target(), Cache(tmp_path / "kept"), lambda _, done, total: told.append(done))
    found = timer(pieces, 4)
    assert all(value > 0.0 for value in found)
    assert PieceTimer(Target(), Cache(tmp_path / "kept"), timer.progress)(pieces, 4) == found
    assert told == [0, 1], "what is kept is not timed again"
    assert PieceTimer(Target(), Cache(tmp_path / "kept"))(pieces, 8) != found


def test_several_targets_weigh_by_their_seconds(analysis: Analysis, paper: Callable[[float], None]) -> None:
    paper(1.0)
    prefill, decode = Target(batch=ROWS), Target(batch=1, weight=float(ROWS))
    both = analysis.clock((prefill, decode))
    alone = [analysis.clock(target).dense_s for target in (prefill, decode)]
    assert isinstance(both, Clock)
    assert both.dense_s == pytest.approx(sum(alone))
