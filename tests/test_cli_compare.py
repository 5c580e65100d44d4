"""geofx compare: table, JSON, chart and what it refuses, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geofx import cli_compare
from geofx.cli import main
from geofx.comparison import Comparison

pytestmark = pytest.mark.usefixtures("folder")

MODEL = "geofx_compared_functions:model"
ARGUMENTS = [
    "compare",
    MODEL,
    "--data",
    "geofx_compared_functions:batches",
    "--cache",
    "cache",
    "--rounds",
    "1",
]


def test_table_json_and_chart_are_of_one_comparison(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--formats", "low_rank", "--recipes", "svd,svd_llm", "--keep", "0.8,0.6"]
    written = ["-o", "made.json", "--chart", "made.svg"]
    assert main([*ARGUMENTS, *chosen, *written]) == 0
    table = capsys.readouterr().out
    made = Comparison.from_json((folder / "made.json").read_text())
    assert [row.keep for row in made.rows] == [0.8, 0.6] * 4
    for name in ("low_rank", "low_rank*", "svd", "svd_llm", "80.0 % of the bytes", "60.0 % of"):
        assert name in table
    assert "<svg" in (folder / "made.svg").read_text()
    assert main([*ARGUMENTS, *chosen, "--json"]) == 0
    captured = capsys.readouterr()
    assert Comparison.from_json(captured.out).rows == made.rows
    assert "fit: started" not in captured.err
    assert "compare: done" in captured.err


def test_every_format_and_recipe_has_a_row_whatever_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--json", "--latency", "none"]) == 0
    made = Comparison.from_json(capsys.readouterr().out)
    assert {f"{row.role} {row.name}" for row in made.rows} == set(made.methods)
    assert {made.methods[f"{role} monarch"]["name"] for role in ("format", "recipe")} == {"monarch"}
    assert all(row.notes for row in made.rows if row.figures is None)
    assert all(row.figures and row.kept for row in made.rows if not row.notes)
    assert any(row.name == "espace-nl_nmse" and row.figures for row in made.rows)


def test_both_engines_are_asked_for_by_that_word(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--formats", "low_rank", "--recipes", "none", "--latency", "both", "--json"]
    assert main([*ARGUMENTS, *chosen]) == 0
    row = Comparison.from_json(capsys.readouterr().out).rows[0]
    assert row.figures is not None
    assert set(row.figures.latency) == {"torch", "onnx"}


def test_an_analysis_is_kept_and_used_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--formats", "low_rank", "--recipes", "none", "--json", "--analysis", "kept"]
    assert main([*ARGUMENTS, *chosen]) == 0
    first = capsys.readouterr()
    assert main(["compare", MODEL, "--cache", "cache", "--rounds", "1", *chosen]) == 0
    second = capsys.readouterr()
    assert (folder / "kept").is_dir()
    assert json.loads(first.out)["rows"] == json.loads(second.out)["rows"]
    assert ("calibrate: done" in first.err, "calibrate: done" in second.err) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "much"], "are no shares"),
        (["--keep", "1.5"], "that can be kept"),
        (["--formats", "low_rang"], "no format 'low_rang'"),
        (["--recipes", "svd_lm"], "no recipe 'svd_lm'"),
        (["--latency", "tpu"], "no engine 'tpu'"),
        (["--latency", "torch,"], "no engine ''"),
        (["--chart", "same.svg", "-o", "same.svg"], "are one file"),
        (["--chart", "chart.txt"], "is not a chart file"),
        (["--chart", "missing/chart.svg"], "parent folder does not exist"),
        (["-o", "missing/made.json"], "parent folder does not exist"),
        (["--text", "python"], "both --text and --data"),
        (["--keep", "2"], "give shares between 0 and 1"),
        (["--keep", "1"], "give shares between 0 and 1"),
        (["--keep", "nan"], "give shares between 0 and 1"),
        (["--formats", "none", "--recipes", "none"], "there is nothing to compare"),
        (["--cache", "geofx_compared_functions.py"], "the cache folder cannot be made"),
        (["--cache", "geofx_compared_functions.py/cache"], "the cache folder cannot be made"),
    ],
)
def test_what_cannot_be_done_is_said_before_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_compare, "load_source", lambda name: pytest.fail("work began"))
    assert main([*ARGUMENTS, *arguments]) in (2, 6)
    assert message in capsys.readouterr().err.replace("\n", " ")
