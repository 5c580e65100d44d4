"""Formats of one's own: planned, saved and read where they are registered, refused where they are not."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import geofx
from geofx import factorizations
from geofx.analysis import Analysis
from geofx.errors import ConfigError, PlanError
from geofx.factorizations import Factors, LowRank, from_json, known_formats, register

WEIGHT = "2.weight"


@dataclasses.dataclass(frozen=True)
class Narrow(LowRank):
    """Low rank under another name."""

    name = "narrow"


@dataclasses.dataclass(frozen=True)
class Undeclared(LowRank):
    """Fits what it does not declare."""

    name = "undeclared"

    def fit(self, weights: Any, analysis: Any) -> tuple[Undeclared, Factors]:
        _, factors = super().fit(weights, analysis)
        return self, {**factors, "right": factors["right"].double()}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> type[Narrow]:
    monkeypatch.setattr(factorizations, "_REGISTERED", {})
    return register(Narrow)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    batches = [tiny_models.example("mlp", batch=64, seed=seed) for seed in range(2)]
    return geofx.analyze(tiny_models.build("mlp"), batches[0], holdout=batches[1])


@pytest.mark.parametrize("named", ["narrow", Narrow])
def test_it_is_planned_saved_and_read(
    named: Any, registered: type[Narrow], analysis: Analysis, tmp_path: Path
) -> None:
    plan = analysis.plan(geofx.Budget(parameters=0.6), formats=[named])
    assert {type(choice.factorization) for choice in plan.rewritten} == {Narrow}
    result = analysis.apply(plan)
    loaded = geofx.load(result.save(tmp_path / "out"))
    assert loaded.plan == result.plan
    inputs = tiny_models.example("mlp", seed=5)
    torch.testing.assert_close(loaded(**inputs), result(**inputs), rtol=0, atol=0)


def test_what_is_not_registered_is_neither_planned_nor_read(
    registered: type[Narrow], analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = analysis.plan(geofx.Budget(parameters=0.6), formats=[Narrow]).to_json()
    assert geofx.Plan.from_json(text).rewritten
    monkeypatch.setattr(factorizations, "_REGISTERED", {})
    with pytest.raises(PlanError, match=r"unknown factorization 'narrow'.*register"):
        geofx.Plan.from_json(text)
    with pytest.raises(ConfigError, match=r"no format .*Narrow.*register"):
        analysis.plan(geofx.Budget(parameters=0.6), formats=[Narrow])


def test_the_latest_of_a_name_counts(registered: type[Narrow]) -> None:
    again = register(dataclasses.make_dataclass("Narrow", [], bases=(Narrow,), frozen=True))
    assert type(from_json({"name": "narrow", "rank": 2})) is again
    assert known_formats()[-1] is again
    assert len(known_formats()) == len(factorizations.FACTORIZATIONS) + 1


class Lacking:
    name = "lacking"
    regions = frozenset({"single"})


PARTS = {name: part for name, part in vars(LowRank).items() if not name.startswith("__")}
Changing = dataclasses.make_dataclass("Changing", [], namespace={**PARTS, "name": "changing"})


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (Lacking, "lacks closed_form, candidates, factor_shapes"),
        (Changing, "a frozen dataclass"),
        (dataclasses.make_dataclass("LowRank", [], bases=(LowRank,), frozen=True), "geofx has a format"),
    ],
)
def test_what_cannot_be_a_format_is_refused(member: Any, message: str, registered: type[Narrow]) -> None:
    with pytest.raises(ConfigError, match=message):
        register(member)
    assert known_formats()[-1] is registered


def test_factors_that_were_not_declared_are_named(registered: type[Narrow], analysis: Analysis) -> None:
    register(Undeclared)
    plan = analysis.plan(geofx.Budget(parameters=1.0)).edit({WEIGHT: Undeclared(4)})
    with pytest.raises(PlanError, match=r"undeclared fitted 'right' as .*float64.*declares .*float32"):
        analysis.apply(plan)


def test_the_example_keeps_the_laws(registered: type[Narrow], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    from add_a_format import FewInputs

    monkeypatch.delitem(sys.modules, "add_a_format")
    known = geofx.analyze(tiny_models.build("mlp"), tiny_models.example("mlp", batch=64)).regions[WEIGHT]
    x, region = torch.randn(2, 3, 64), known.region
    losses = [form.predicted_loss(region, known) for form in FewInputs.candidates(region, known)]
    assert losses == sorted(losses, reverse=True)
    for kept in (1, 30, 64):
        form, factors = FewInputs(kept, 64).fit(known.weights, known)
        assert {name: tuple(part.shape) for name, part in factors.items()} == form.factor_shapes(region)
        torch.testing.assert_close(form.apply(x, factors), x @ form.to_dense(factors).T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(form.to_dense(factors), known.weight, rtol=1e-4, atol=1e-5)
