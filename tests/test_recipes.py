"""Recipes: one for every system, each of formats, settings and regions that exist, as plain data."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError

import pytest
import torch
from test_factorizations import analysis_of

from geofx import papers, recipes
from geofx.errors import ConfigError, PlanError
from geofx.factorizations import LowRank
from geofx.method import Form, Method, disjoint
from geofx.recipes import CRITERIA, Recipe
from geofx.workload import measure

EVERY = recipes.all()


def test_names_are_those_of_the_functions_and_differ() -> None:
    names = [recipe.name for recipe in EVERY]
    assert len(set(names)) == len(names)
    assert {name.partition("-")[0] for name in names} == {make.__name__ for make in recipes.RECIPES}
    assert recipes.named(names) == EVERY


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.name)
def test_a_recipe_is_plain_data_with_its_paper(recipe: Recipe) -> None:
    data = json.loads(json.dumps(recipe.to_json()))
    assert data["name"] == recipe.name
    assert data["forms"][0]["format"] == recipe.forms[0].format
    assert 2000 < data["paper"]["year"] <= 2026
    assert data["paper"]["authors"]
    assert data["paper"]["link"].startswith(("arXiv:", "NeurIPS", "ICLR", "EMNLP", "AACL"))
    assert recipe.differs.endswith(".")
    assert hash(recipe) == hash(next(item for item in recipes.all() if item.name == recipe.name))
    with pytest.raises(FrozenInstanceError):
        recipe.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.name)
def test_formats_settings_and_regions_of_a_recipe_exist(recipe: Recipe) -> None:
    for member in recipe.formats:
        assert member.regions & set(recipe.kinds), f"{member.name} rewrites none of {recipe.kinds}"
    assert all(any(kind in member.regions for member in recipe.formats) for kind in recipe.kinds)


def test_arxiv_numbers_have_their_form() -> None:
    every = [value for value in vars(papers).values() if isinstance(value, papers.Paper)]
    numbers = [paper.link.removeprefix("arXiv:") for paper in every if paper.link.startswith("arXiv:")]
    assert len(set(numbers)) == len(numbers)
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", number) for number in numbers)
    assert str(papers.SVD_LLM).endswith("arXiv:2403.07378.")


def test_held_settings_are_put_into_every_candidate() -> None:
    analysis = analysis_of(torch.randn(64, 48))
    found = recipes.asvd(0.7).candidates(analysis.region, analysis)
    plain = list(LowRank.candidates(analysis.region, analysis))
    assert found == [LowRank(item.rank, "input_diagonal", 0.7) for item in plain]
    sizes = [measure(item, analysis.region).weight_bytes for item in found]
    assert sizes == sorted(set(sizes))


def test_a_held_size_leaves_one_candidate() -> None:
    analysis = analysis_of(torch.randn(64, 48))
    method = Method("one", (Form.of("low_rank", rank=5),))
    assert method.candidates(analysis.region, analysis) == [LowRank(5)]


def test_a_held_setting_that_a_region_is_too_small_for_leaves_none() -> None:
    analysis = analysis_of(torch.randn(50, 8), kind="embedding")
    assert len(recipes.tensorgpt(2).candidates(analysis.region, analysis)) == 1
    assert recipes.tensorgpt(4).candidates(analysis.region, analysis) == []


def test_regions_are_preferred_by_kind_then_by_how_many_weights_they_hold() -> None:
    first, second, third = (torch.randn(24, 20) for _ in range(3))
    single, shared = analysis_of(first), analysis_of(first, second, kind="shared_input")
    larger = analysis_of(first, second, third, kind="shared_input")
    known = {"single": single, "shared": shared, "larger": larger}
    method = Method("m", (Form.of("low_rank"),), ("shared_input", "single"))
    assert method.regions(known) == [larger, shared, single]
    assert disjoint(method.regions(known)) == [larger]
    assert Method("m", (Form.of("low_rank"),)).regions(known) == [single]
    assert Method("m", (Form.of("gauge_fixed"),), ("shared_input", "single")).regions(known) == [single]


def test_what_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="the nearest are 'svd_llm'"):
        recipes.named(["svd_lm"])
    with pytest.raises(ConfigError, match="go_nmse"):
        recipes.espace("MAE")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="'low_rank'"):
        Form.of("low_rang").member()
    with pytest.raises(PlanError, match="no setting 'colour'"):
        Form.of("low_rank", colour=1).member()


def test_the_criteria_are_recipes_of_their_own() -> None:
    assert [recipe.name for recipe in EVERY[-7:]] == [f"espace-{name}" for name in CRITERIA]
    assert recipes.espace() in EVERY
