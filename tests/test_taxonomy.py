"""The table: forms in words, a row per format and module, and the same words in every report."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import tiny_models
from factorization_cases import CASES
from rich.console import Console
from test_factorizations import random_analysis

import geofx
from geofx import recipes
from geofx.cli import main
from geofx.errors import ConfigError
from geofx.factorizations import FACTORIZATIONS, Dense, GaugeFixed, LowRank
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.report_html import report_html
from geofx.report_table import report_tables
from geofx.taxonomy import TaxonomyRow, citations, taxonomy
from geofx.workload import measure


@pytest.fixture(scope="module")
def table() -> dict[str, TaxonomyRow]:
    return {row.name: row for row in taxonomy((48, 48))}


def test_a_form_in_words() -> None:
    spaces = (*(Subspace(f"block {index} in", 2, 8) for index in range(4)), Subspace("out", 8, 8))
    steps = (
        *(Transformation("scale", (f"block {index} in",), f"block {index}") for index in range(4)),
        Transformation("direct_sum", tuple(f"block {index}" for index in range(4)), "out"),
    )
    form = GeometricForm(spaces, steps)
    assert str(form) == "5 subspaces (4 x block in 2 of 8, out 8): scale x 4, direct sum"
    assert (form.count, form.basis_numbers) == (5, 4 * 16 + 64)
    level = (*steps, Transformation("permute", ("out",), "out"))
    words = GeometricForm(spaces, (*level, *level, *level)).operations
    assert words == "(scale x 4, direct sum, permute) x 3"
    alone = GeometricForm((Subspace("input", 3, 9),), (Transformation("project", ("input",), "input"),))
    assert str(alone) == "1 subspace (input 3 of 9): project"


def test_every_format_has_a_row_and_a_paper(table: dict[str, TaxonomyRow]) -> None:
    assert list(table) == [
        "linear",
        "concatenation",
        "attention",
        *(member.name for member in FACTORIZATIONS),
    ]
    for member in FACTORIZATIONS:
        row = table[member.name]
        assert set(row.regions) == member.regions
        assert row.setting.startswith(member.__name__)
        assert row.papers or member is Dense, member.name


def test_citations_are_read_from_the_documentation() -> None:
    assert {"Eckart and Young 1936", "Wang et al. 2025"} <= set(citations(LowRank))
    assert citations(GaugeFixed) == ("Zhao et al. 2025",)
    assert citations(Dense) == ()


@pytest.mark.parametrize("recipe", recipes.all(), ids=lambda recipe: recipe.name)
def test_formats_cite_a_recipes_paper_with_its_year(recipe: recipes.Recipe) -> None:
    author = recipe.paper.authors.split(",")[0]
    years = {
        year
        for member in recipe.formats
        for cited in citations(member)
        if cited.startswith(author)
        for year in re.findall(r"\d{4}", cited)
    }
    assert not years or str(recipe.paper.year) in years


def test_section_2_5(table: dict[str, TaxonomyRow]) -> None:
    """Linear = projection, concatenation = direct sum, attention = two projections, through K and V."""
    assert str(table["linear"].form) == "2 subspaces (input 48, output 48): project"
    assert str(table["concatenation"].form) == "2 subspaces (2 x P 24 of 48): direct sum"
    assert str(table["attention"].form) == "3 subspaces (Q 48, K 48, V 48): project, scale, project"
    projections = [step for step in table["attention"].form.transformations if step.operation == "project"]
    assert [(step.source, step.target) for step in projections] == [(("Q",), "K"), (("K",), "V")]


def test_the_example_is_the_setting_nearest_to_half_the_numbers(table: dict[str, TaxonomyRow]) -> None:
    assert table["low_rank"].setting == str(LowRank(12))
    assert table["low_rank"].numbers == 12 * (48 + 48) == table["low_rank"].form.basis_numbers
    assert table["dense"].numbers == table["linear"].numbers == 48 * 48


def test_the_units_of_an_mlp_are_the_outputs_of_its_first_map() -> None:
    (row,) = (row for row in taxonomy((96, 48)) if row.name == "dropped_units")
    assert row.form.which == "hidden 48 of 96"
    assert row.numbers == 2 * 48 * 48


def form_of(name: str) -> GeometricForm:
    return CASES[name].large.geometry(random_analysis(CASES[name]).region)


@pytest.mark.parametrize("name", CASES)
def test_every_form_has_as_many_subspaces_as_the_taxonomy_counts(name: str) -> None:
    assert form_of(name).count == CASES[name].subspaces


def test_the_counts_are_those_of_the_papers_table() -> None:
    """SVD 2, Kronecker 4, two per block, CP one per order, Tucker one more, trains one per core, ESPACE 1."""
    counts = {name: case.subspaces for name, case in CASES.items()}
    assert (counts["low_rank"], counts["kronecker"], counts["activation_subspace"]) == (2, 4, 1)
    assert counts["monarch"] == 2 * (4 + 4), "four blocks in each of two factors"
    assert counts["butterfly"] == 2 * (2 + 2), "two blocks in each of two levels"
    assert (counts["cp"], counts["tucker"]) == (3, 4 + 1), "three orders; four orders and the core"
    assert (counts["tensor_train"], counts["block_tensor_train"], counts["token_mps"]) == (3, 2, 3)


def unknown_sources(form: GeometricForm) -> Iterator[str]:
    known = {space.name for space in form.subspaces}
    for step in form.transformations:
        yield from (source for source in step.source if source not in known)
        known.add(step.target)


@pytest.mark.parametrize("name", CASES)
def test_transformations_start_from_what_is_there(name: str) -> None:
    """Sources are subspaces or targets of earlier steps, names are unique, and every subspace is used."""
    form = form_of(name)
    assert not list(unknown_sources(form))
    names = Counter(space.name for space in form.subspaces)
    assert max(names.values()) == 1
    used = {name for step in form.transformations for name in (*step.source, step.target)}
    assert set(names) <= used


def test_bases_are_what_one_basis_per_subspace_stores() -> None:
    region = random_analysis(CASES["low_rank"]).region
    assert LowRank(5).geometry(region).basis_numbers == measure(LowRank(5), region).parameters


def test_the_command_line_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["taxonomy", "--shape", "48x48"]) == 0
    text = capsys.readouterr().out
    assert all(member.name in text for member in FACTORIZATIONS)
    assert main(["taxonomy", "--shape", "48x48", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["low_rank"]["subspaces"] == 2
    assert rows["low_rank"]["which"] == "input 12 of 48, output 12 of 48"
    assert rows["low_rank"]["transformations"] == "project, scale, expand"
    assert main(["taxonomy", "--shape", "48"]) == ConfigError.exit_code
    assert "not OUTxIN" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["13x17", "1x1"])
def test_a_format_without_a_form_at_a_shape_keeps_its_row(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["taxonomy", "--shape", shape]) == 0
    assert "none at this" in capsys.readouterr().out
    assert main(["taxonomy", "--shape", shape, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) >= {member.name for member in FACTORIZATIONS}
    assert rows["block_tensor_train"]["subspaces"] == 0
    assert rows["dense"]["subspaces"] == 2


def test_a_report_says_it_for_every_region() -> None:
    result = geofx.optimize(
        tiny_models.build("mlp"), geofx.Budget(size=0.8), calibration=[tiny_models.example("mlp", 8)]
    )
    for row, choice in zip(result.report.regions, result.plan.choices, strict=True):
        form = choice.factorization.geometry(choice.as_region())
        assert (row.subspaces, row.transformations) == (f"{form.count}: {form.which}", form.operations)
        assert row.subspaces in report_html(result.report)
    stream = io.StringIO()
    Console(file=stream, width=80).print(*report_tables(result.report))
    assert result.report.regions[0].transformations in stream.getvalue()
