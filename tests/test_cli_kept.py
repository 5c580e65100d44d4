"""An analysis that is used again: options that only a new one would use are named, not silently ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cli_compare import MODEL

from geofx import cli_compare, cli_frontier, cli_optimize
from geofx.analysis_store import read_analysis
from geofx.cli import main
from geofx.effort import EFFORTS

pytestmark = pytest.mark.usefixtures("folder")

DATA = ["--data", "geofx_compared_functions:batches"]


@pytest.fixture
def kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """An analysis, and a plan made from it."""
    assert main(["plan", MODEL, "--size", "0.9", "--analysis", "kept", *DATA]) == 0
    assert "has no effect" not in capsys.readouterr().err
    return folder / "kept"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


COMMANDS: dict[str, list[str]] = {
    "frontier": ["frontier", MODEL, "--shares", "0.9"],
    "plan": ["plan", MODEL, "--size", "0.9", "--dry-run"],
    "apply": ["apply", MODEL, "plan.json", "-o", "out"],
    "compare": ["compare", MODEL, "--formats", "low_rank", "--recipes", "none", "--cache", "cache"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("kept")
def test_options_that_a_kept_analysis_makes_useless_are_named(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*COMMANDS[command], "--analysis", "kept"]
    assert main([*arguments, *DATA, "--tokens", "64", "--effort", "best", "--mode", "two_sided"]) == 0
    assert (
        "the analysis in kept is used: --data, --tokens and --effort have no effect; "
        "name another folder to analyze anew"
    ) in said(capsys)


@pytest.mark.usefixtures("kept")
def test_nothing_is_said_where_no_such_option_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMANDS["frontier"], "--analysis", "kept"]) == 0
    assert "no effect" not in said(capsys)
    assert main([*COMMANDS["frontier"], "--analysis", "kept", "--length", "64"]) == 0
    assert "--length has no effect" in said(capsys)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("kept")
def test_another_mode_than_that_of_the_analysis_is_refused_before_work(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cli_compare, cli_frontier, cli_optimize):
        monkeypatch.setattr(module, "load_source", unreachable)
    assert main([*COMMANDS[command], "--analysis", "kept", "--mode", "data_free"]) == 2
    assert "was made with --mode two_sided, not data_free" in said(capsys)


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_effort_is_that_of_the_analysis(effort: str, folder: Path) -> None:
    arguments = ["plan", MODEL, "--size", "0.9", "--analysis", "kept", *DATA, "--effort", effort]
    assert main(arguments) == 0
    assert bool(read_analysis(folder / "kept").validation) == (effort != "fast")


def test_a_budget_for_the_loss_is_refused_before_work_where_the_analysis_has_no_gradients(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ["plan", MODEL, "--analysis", "kept"]
    assert main([*made, "--size", "0.9", "--mode", "forward", *DATA]) == 0
    monkeypatch.setattr(cli_optimize, "load_source", unreachable)
    assert main([*made, "--loss", "0.1"]) == 2
    assert "--loss needs gradients, and --mode forward takes none" in said(capsys)


@pytest.mark.parametrize("content", ["{}", '{"schema_version": 99, "mode": "two_sided"}'])
def test_what_is_no_analysis_is_told_before_work(
    content: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "kept").mkdir()
    (folder / "kept" / "geofx.json").write_text(content)
    monkeypatch.setattr(cli_frontier, "load_source", unreachable)
    assert main([*COMMANDS["frontier"], "--analysis", "kept"]) == 6
    assert "analysis" in said(capsys)


def unreachable(name: str) -> Any:
    raise AssertionError("work began before the checks")
