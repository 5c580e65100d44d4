"""Streams: results on stdout, the rest on stderr, on any terminal and on none."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from geofx import cli_console
from geofx.cli_console import ConsoleProgress, show, working
from geofx.latency import interleaved_medians

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

SMALL = ["--text", "python", "--tokens", "256", "--length", "32"]


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[bytes]:
    """The installed command in a process of its own."""
    command = [sys.executable, "-c", "import sys; from geofx.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, capture_output=True, env=os.environ | settings, timeout=120, check=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "cp1252", "COLUMNS": "20"},
        {"TERM": "dumb", "NO_COLOR": "1"},
        {"PYTHONIOENCODING": "ascii"},
    ],
    ids=["cp1252 narrow", "dumb", "ascii"],
)
def test_row_132_any_terminal(settings: dict[str, str]) -> None:
    done = run("doctor", **settings)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    assert b"accelerator" in done.stdout.replace(b"\n", b"") or "COLUMNS" in settings


def test_what_libraries_print_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with working():
        print("from Python")
        os.write(1, b"from C\n")
    show("[red]result[/red]")
    captured = capfd.readouterr()
    assert captured.out == "[red]result[/red]\n"
    assert captured.err.split() == ["from", "C", "from", "Python"] or "from C" in captured.err


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_row_132_progress_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_console, "START_S", 0.1)
    with ConsoleProgress() as progress:
        for done in range(4):
            progress("count\x1b[2J", done, 3)
            time.sleep(0.1)
    said = lines(capsys)
    assert len(said) == 2
    assert said[0].endswith(": started")
    assert "done in" in said[1]
    assert "\x1b" not in said[0]


def test_a_short_stage_is_said_once_and_an_empty_one_never(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress() as progress:
        progress("empty", 0, 0)
        for _ in range(100):
            progress("fit", 0, 2)
            progress("fit", 2, 2)
    assert lines(capsys) == ["fit: done in 0.0 s"]


def test_what_takes_over_two_seconds_shows_progress_while_it_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ConsoleProgress() as progress, progress.step("load"):
        time.sleep(1.6)
        assert lines(capsys) == ["load: started"]
    assert lines(capsys) == ["load: done in 1.6 s"]


def test_a_long_stage_says_how_long_it_still_needs_from_where_it_began(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_console, "LINE_INTERVAL_S", 0.0)
    clock = iter([100.0, 102.0, 104.0])
    shown = cli_console.ProgressLines(cli_console.stderr_console())
    monkeypatch.setattr(cli_console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for done in (50, 60, 100):
        shown("recover", done, 100)
    assert lines(capsys) == ["recover: 60 of 100, about 8 s left", "recover: done in 4.0 s"]


def test_progress_on_a_terminal() -> None:
    console = Console(force_terminal=True, width=80, record=True, color_system=None, file=io.StringIO())
    with ConsoleProgress(console) as progress:
        for done in range(4):
            progress("count", done, 3)
        progress("unknown", 0, 0)
    assert "3/3" in console.export_text()


def test_interrupted_from_outside() -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits it ignored
        "from geofx import cli\n"
        "def wait(): print('ready', flush=True); time.sleep(60)\n"
        "cli.examination.examine = wait\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130


def test_latencies_are_taken_in_turns() -> None:
    order: list[str] = []
    medians = interleaved_medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert set(medians) == {"a", "b"}
