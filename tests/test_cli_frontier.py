"""geofx frontier: table, JSON and chart from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli_compare import MODEL

from geofx import cli_frontier
from geofx.cli import main
from geofx.frontier import Frontier

pytestmark = pytest.mark.usefixtures("folder")

ARGUMENTS = ["frontier", MODEL, "--data", "geofx_compared_functions:batches"]


def test_one_analysis_gives_table_json_and_chart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--shares", "0.9,0.6", "--measure", "0.6", "--analysis", "kept"]
    assert main([*ARGUMENTS, *asked, "-o", "made.json", "--chart", "made.svg"]) == 0
    table = capsys.readouterr().out
    made = Frontier.from_json((folder / "made.json").read_text())
    assert [point.share for point in made.points] == [0.9, 0.6]
    assert "60.0 %" in table
    assert "measured" in table
    assert "<svg" in (folder / "made.svg").read_text()
    assert main(["frontier", MODEL, "--shares", "0.9,0.6", "--analysis", "kept", "--json"]) == 0
    captured = capsys.readouterr()
    again = Frontier.from_json(captured.out)
    assert [point.predicted_loss for point in again.points] == pytest.approx(
        [point.predicted_loss for point in made.points], rel=1e-6
    )
    assert "calibrate" not in captured.err
    assert "frontier: done" in captured.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--shares", "most"], 2, "no shares"),
        (["--shares", "0.9", "--chart", "made.txt"], 2, "not a chart file"),
        (["--by", "latency"], 2, "latency"),
        (["--chart", "one.svg", "-o", "one.svg"], 2, "one file"),
        (["--shares", "0.9,1.5"], 2, "at most 1"),
        (["--measure", "0"], 2, "at most 1"),
    ],
)
def test_wrong_options_are_refused_at_once(
    options: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli_frontier, "load_source", lambda name: pytest.fail("work began"))
    assert main([*ARGUMENTS, *options]) == code
    assert message in capsys.readouterr().err


HELD_OUT = "there is no held-out data to measure on"


def test_measuring_without_held_out_data_is_refused_before_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = ["frontier", f"{MODEL}_with_inputs", "--mode", "data_free"]
    assert main([*free, "--shares", "0.9", "--analysis", "kept"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(cli_frontier, "load_source", lambda name: pytest.fail("work began"))
    assert main([*free, "--measure", "0.9"]) == 2
    assert HELD_OUT in capsys.readouterr().err
    assert main(["frontier", MODEL, "--measure", "0.9", "--analysis", "kept"]) == 2
    error = capsys.readouterr().err
    assert HELD_OUT in error
    assert "another folder" in error
    assert main([*ARGUMENTS, "--mode", "forward", "--measure", "0.9"]) == 2
    assert "two_sided" in capsys.readouterr().err
