"""Levels of effort: moments of several parts, and the predicted loss set by what is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import geofx
from geofx.api import _better
from geofx.batches import Batch
from geofx.budget import Budget, Scope
from geofx.effort import EFFORTS, effort_named, loss_on
from geofx.errors import ConfigError, NumericsError
from geofx.factorizations import LowRank
from geofx.moments import Moments, pooled
from geofx.objective import NextToken, SquaredError
from geofx.optimization import STEPS, optimize_analysis
from geofx.passes.calibrate import calibrate
from geofx.program import Program
from geofx.uniform import uniform_plan
from geofx.verify import verify

LENGTH, ROWS = 24, 2


def windows(count: int, seed: int = 0, first: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (count, ROWS, LENGTH), generator=generator)
    ids[:, :, 0] = first
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


@pytest.fixture(scope="module")
def analysis() -> geofx.Analysis:
    return geofx.analyze(tiny_models.build("bert"), windows(6), holdout=windows(2, 1), effort="balanced")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_pooled_moments_are_those_of_all_the_data(name: str) -> None:
    model = tiny_models.build(name)
    first, second = windows(3), windows(2, seed=5)
    first[0]["attention_mask"][0, -4:] = 0
    made = geofx.analyze(model, first, holdout=first[:1])
    whole = calibrate(made.program, [*first, *second], _fresh(made))
    further = calibrate(made.program, second, _continued(made, first))
    both = pooled(calibrate(made.program, first, _fresh(made)), further)
    _assert_same(both, whole)


def _fresh(made: geofx.Analysis) -> NextToken | SquaredError:
    return NextToken() if isinstance(made.objective, NextToken) else SquaredError(0)


def _continued(made: geofx.Analysis, first: list[Batch]) -> NextToken | SquaredError:
    """An objective whose noise goes on where it stood after ``first``."""
    objective = _fresh(made)
    calibrate(made.program, first, objective)
    return objective


def _assert_same(one: Moments, other: Moments) -> None:
    assert one.tokens == other.tokens
    assert one.loss_terms == other.loss_terms
    compared = 0
    for field in ("inputs", "outputs", "lookups", "lookup_outputs", "lookup_energies"):
        for key, value in getattr(other, field).items():
            torch.testing.assert_close(getattr(one, field)[key], value, rtol=1e-4, atol=1e-7)
            compared += 1
    assert compared > 10


def test_balanced_calibrates_on_more_and_validates_on_what_it_did_not_see(analysis: geofx.Analysis) -> None:
    names = [stage.name for stage in analysis.stages.done]
    assert "write text" in names
    assert len(analysis.validation) == 1
    tokens = max(analysis.moments.tokens.values())
    assert tokens in (5 * ROWS * LENGTH, 2 * 5 * ROWS * LENGTH)
    fast = geofx.analyze(tiny_models.build("llama"), windows(6), holdout=windows(2, 1))
    assert fast.validation == []
    assert max(fast.moments.tokens.values()) == 6 * ROWS * LENGTH


def test_too_few_batches_for_choices_are_told(caplog: pytest.LogCaptureFixture) -> None:
    made = geofx.analyze(tiny_models.build("llama"), windows(1), holdout=windows(1, 1), effort="best")
    assert made.validation == made.calibration == []
    assert "no more is done than with 'fast'" in caplog.text


def test_of_two_analyses_the_one_that_holds_on_unseen_text_is_taken() -> None:
    model = tiny_models.build("llama")
    little, much = (geofx.analyze(model, windows(count), holdout=windows(1, 1)) for count in (1, 40))
    unseen = calibrate(much.program, windows(8, seed=9), NextToken())
    assert _better(little, much, unseen) is much
    assert _better(much, little, unseen) is much


def test_loss_on_other_moments_by_hand(analysis: geofx.Analysis) -> None:
    seen = calibrate(analysis.program, analysis.validation, analysis.objective)
    expected = 0.0
    for name, item in analysis.regions.items():
        if item.region.kind == "single":
            rank = min(item.weight.shape) // 2
            cut = item.truncation.left[:, :rank] @ item.truncation.right[:rank]
            change = item.weight.double() - cut.double()
            inputs = seen.inputs[seen.input_of[name]].double()
            expected += float(torch.trace(seen.outputs[name].double() @ change @ inputs @ change.T))
    assert loss_on(seen, analysis.regions) == pytest.approx(expected, rel=1e-6)
    assert expected > 0.0


def test_probing_sets_the_predicted_loss_by_the_measured(analysis: geofx.Analysis, tmp_path: Path) -> None:
    before = analysis.loss_ratio
    assert before != 1.0, "analyze has probed already"
    plan = analysis.plan(Budget(size=0.7))
    rewrites, _ = analysis.fit(plan)
    probed = analysis.probe(plan, rewrites, analysis.loss_of)
    program = analysis.lower(plan, rewrites)
    found = verify(analysis.original, program, analysis.validation, analysis.objective).loss_increase
    assert found > 0.0
    assert probed.loss == pytest.approx(found)
    assert sum(choice.loss or 0.0 for choice in probed.choices) == pytest.approx(found)
    assert analysis.loss_ratio == pytest.approx(before * found / plan.loss)
    anew = analysis.plan(Budget(size=0.7))
    assert anew.loss == pytest.approx(found, rel=1e-3)
    assert analysis.finish(anew, rewrites).plan.loss == pytest.approx(found, rel=1e-3)
    folder = analysis.save(tmp_path / "kept")
    known = geofx.load_analysis(folder, analysis.module)
    assert known.loss_ratio == pytest.approx(analysis.loss_ratio)
    assert torch.equal(known.validation[0]["input_ids"], analysis.validation[0]["input_ids"])


def test_of_next_tokens_the_label_part_is_taken_from_all_data() -> None:
    made = geofx.analyze(
        tiny_models.build("llama"), windows(6), holdout=windows(2, seed=1), effort="balanced"
    )
    result = optimize_analysis(made, Budget(size=0.5))
    assert {"choose", "predict"} <= {stage.name for stage in result.report.stages}
    program = result.program
    seen, unseen = (
        verify(made.original, program, part, NextToken()) for part in (made.calibration, made.validation)
    )
    assert seen.kl is not None
    assert unseen.kl is not None
    expected = seen.loss_increase + unseen.kl - seen.kl
    assert made.expected_loss(program) == pytest.approx(expected)
    assert made.distance_of(program) == pytest.approx(unseen.kl)
    assert result.plan.loss == pytest.approx(max(0.0, expected))


def test_the_original_runs_once_on_each_validation_batch(
    analysis: geofx.Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis, run, runs = replace(analysis), Program.__call__, list[Program]()

    def counted(program: Program, *args: Any, **kwargs: Any) -> Any:
        runs.append(program)
        return run(program, *args, **kwargs)

    monkeypatch.setattr(Program, "__call__", counted)
    assert analysis.distance_of(analysis.program) == analysis.distance_of(analysis.program)
    assert runs.count(analysis.original) == len(analysis.validation)
    assert runs.count(analysis.program) == 2 * len(analysis.validation)


def test_a_budget_for_the_loss_holds_on_validation_batches() -> None:
    asked = 1e-4
    result = geofx.optimize(
        tiny_models.build("bert"), Budget(loss=asked), calibration=windows(8), effort="balanced"
    )
    assert result.plan.loss <= asked
    assert result.plan.loss > asked / 4
    assert result.plan.rewritten


def test_best_refines_the_factors_and_is_not_worse_where_it_chose() -> None:
    made = geofx.analyze(tiny_models.build("bert"), windows(10), holdout=windows(2, 1), effort="best")
    assert (len(made.calibration), len(made.written), made.refines) == (9, 2 * 9, True)
    budget = Budget(size=0.6)
    plain = made.plan(budget)
    rewrites, _ = made.fit(plain)
    program = made.lower(plain, rewrites)
    before = verify(made.original, program, made.validation, made.objective).loss_increase
    result = optimize_analysis(made, budget)
    after = verify(made.original, result.program, made.validation, made.objective).loss_increase
    assert after < before
    assert result.plan.loss == pytest.approx(after)
    assert result.report.predicted_loss == result.plan.loss
    assert sum(row.loss or 0.0 for row in result.report.regions) == pytest.approx(after)
    assert [row["step"] for row in result.report.recovery] == [turn * STEPS // 4 for turn in range(5)]
    assert "refine" in [stage.name for stage in result.report.stages]
    assert result.program.size_bytes() == plain.predicted.bytes


@pytest.mark.parametrize("failing", ["worse", "not finite"])
def test_a_refinement_that_does_not_help_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    made = geofx.analyze(tiny_models.build("bert"), windows(6), holdout=windows(2, 1), effort="best")
    budget = Budget(size=0.6)
    plain = optimize_analysis(replace(made, refines=False), budget)

    def recovered(self: geofx.OptimizedModel, *given: object, **named: object) -> geofx.OptimizedModel:
        if failing == "not finite":
            raise NumericsError("the loss is not finite")
        worse = self.program.clone()
        name, part = next((n, p) for n, p in worse.tensors() if p.is_floating_point() and p.dim() == 2)
        worse.set_tensor(name, part * 1.5, trainable=True)
        return replace(self, program=worse)

    monkeypatch.setattr(geofx.OptimizedModel, "recover", recovered)
    result = optimize_analysis(made, budget)
    assert result.fidelity == plain.fidelity
    assert result.plan.loss == pytest.approx(plain.plan.loss)
    reason = "the loss is not finite" if failing == "not finite" else "that goes from"
    assert f"the factors are not refined: {reason}" in caplog.text


def test_where_the_loss_does_not_rise_the_plan_loses_nothing(
    analysis: geofx.Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the uniform plan, whose loss does rise, cannot take its place."""
    analysis, found = replace(analysis), iter((0.001, -0.01))
    monkeypatch.setattr(analysis, "distance_of", lambda program: next(found))
    monkeypatch.setattr(analysis, "expected_loss", lambda program: -0.01)
    before = analysis.loss_ratio
    result = optimize_analysis(analysis, Budget(size=0.8))
    assert result.plan.loss == 0.0
    assert result.plan.solver.status == "optimal"
    assert analysis.loss_ratio == before
    assert result.plan.scaled_to(1.0).loss == pytest.approx(1.0)
    assert sum(choice.loss or 0.0 for choice in result.plan.scaled_to(1.0).choices) == pytest.approx(1.0)


def test_limits_of_size_and_loss_are_planned_for_until_nothing_changes(
    analysis: geofx.Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    analysis, fitted = replace(analysis), list[geofx.Plan]()
    fit = analysis.fit
    monkeypatch.setattr(analysis, "fit", lambda plan: (fitted.append(plan), fit(plan))[1])
    loose = optimize_analysis(analysis, Budget(size=0.8, loss=10.0))
    assert loose.plan.loss is not None
    assert len(fitted) <= 3
    true = loose.plan.loss
    monkeypatch.setattr(analysis, "expected_loss", lambda program: 2 * true)
    tight = optimize_analysis(analysis, Budget(size=0.8, loss=1.5 * true))
    assert tight.plan.loss == pytest.approx(2 * true)


@pytest.mark.parametrize("scope", ["model", "factorizable"])
@pytest.mark.parametrize("kept", [0.9, 0.6])
def test_the_uniform_plan_is_within_the_budget_and_near_it(
    analysis: geofx.Analysis, scope: Scope, kept: float
) -> None:
    plan = analysis.plan(Budget(size=kept, scope=scope))
    same = uniform_plan(plan, analysis.regions.values())
    assert same is not None
    limit, used = plan.limits["size"], same.used["size"]
    assert used is not None
    assert 0.93 * limit < used <= limit
    shares = {
        choice.price.parameters / choice.dense.parameters
        for choice in same.rewritten
        if choice.kind == "single"
    }
    assert max(shares) - min(shares) < 0.06
    assert uniform_plan(replace(plan, budget=Budget(size=2)), analysis.regions.values()) is None


def test_a_plan_that_loses_more_than_the_uniform_one_gives_way_to_it(
    analysis: geofx.Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan of rank 1 everywhere: what is measured on validation batches decides."""
    budget = Budget(size=0.8, scope="factorizable")
    good = optimize_analysis(analysis, budget)
    plan = analysis.plan

    def bad(*given: object, **named: object) -> geofx.Plan:
        found = plan(*given, **named)  # type: ignore[arg-type]
        forms = {choice.region: LowRank(1) for choice in found.choices if choice.kind == "single"}
        return found.edit(forms)

    monkeypatch.setattr(analysis, "plan", bad)
    saved = optimize_analysis(analysis, budget)
    assert {choice.factorization.name for choice in saved.plan.rewritten} == {"gauge_fixed"}
    assert good.fidelity is not None
    assert saved.fidelity is not None
    assert good.fidelity.loss_increase <= saved.fidelity.loss_increase * 1.05
    lost = verify(analysis.original, saved.program, analysis.validation, analysis.objective).loss_increase
    assert saved.plan.loss == pytest.approx(lost)
    assert saved.report.predicted_loss == saved.plan.loss
    assert sum(row.loss or 0.0 for row in saved.report.regions) == pytest.approx(lost)


def test_levels() -> None:
    assert [EFFORTS[name].rounds for name in ("fast", "balanced", "best")] == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"no effort 'huge'.*fast, balanced, best"):
        effort_named("huge")
    with pytest.raises(ConfigError, match="no effort 'huge'"):
        geofx.analyze(tiny_models.build("mlp"), [torch.randn(4, 32)] * 2, effort="huge")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="effort 'best' needs the gradients"):
        geofx.analyze(tiny_models.build("mlp"), [torch.randn(4, 32)] * 2, effort="best", mode="forward")
