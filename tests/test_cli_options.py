"""Options and mistakes in them: named, with the exit code that the help lists, and before any work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from geofx import cli_optimize, cli_options
from geofx import errors as errors_module
from geofx.cli import COMMANDS, EXIT_CODES, app, main
from geofx.effort import EFFORTS
from geofx.errors import GeofxError

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

SMALL = ["--text", "python", "--tokens", "256", "--length", "32"]


def words(text: str) -> str:
    """The text without boxes and line breaks, so that no terminal width changes it."""
    return " ".join(re.sub(r"[─│╭╮╰╯]", " ", text).split())


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = words(capsys.readouterr().out)
    assert words(EXIT_CODES) in text
    for name, command in COMMANDS:
        summary = (command.__doc__ or "").split("\n\n")[0]
        assert f"{name} {words(summary)}" in text


def test_every_exit_code_of_every_error_is_documented() -> None:
    kinds = [
        kind
        for kind in vars(errors_module).values()
        if isinstance(kind, type) and issubclass(kind, GeofxError)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        assert re.search(rf"\b{kind.exit_code} ", EXIT_CODES), kind


OPTIMIZE_OPTIONS = (
    "--output -o --text --data --holdout --size --parameters --flops --latency --target --loss --scope "
    "--include --ignore --mode --tokens --length --effort --seed --html --overwrite --json --help -h"
)


def test_optimize_options_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "--help"]) == 0
    found = re.findall(r"(?<![\w-])--?[a-z]+\b", words(capsys.readouterr().out))
    assert sorted(set(found)) == sorted(OPTIMIZE_OPTIONS.split())


@pytest.mark.parametrize("command", ["optimize", "plan", "apply", "frontier", "compare"])
def test_every_command_that_analyzes_takes_an_effort(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = words(capsys.readouterr().out)
    assert "--effort" in text
    for level in EFFORTS:
        assert f"{level}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimize", "m", "-o", "o", "--effort", "much"], "balanced"),
        (["optimize", "m", "-o", "o", "--siz", "0.8"], "--size"),
        (["optimise", "m"], "optimize"),
        (["optimize", "m", "-o", "o", "--tokens", "many"], "--tokens"),
        (["optimize", "m", "-o", "o", "--scope", "all"], "factorizable"),
        (["optimize", "m"], "--output"),
        (["optimize", "-o", "o"], "MODEL"),
    ],
)
def test_row_5_a_wrong_option_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "0"], 2, "--size 0 is neither a share nor a count"),
        (["--size", "1.5"], 2, "--size 1.5 is neither a share nor a count"),
        (["--flops", "nan"], 2, "--flops nan is neither a share nor a count"),
        (["--parameters", "inf"], 2, "--parameters inf is neither a share nor a count"),
        (["--size", "1"], 2, "give 1.0 for all of it"),
        (["--size", "80 %%"], 2, "is not a budget"),
        ([], 2, "the budget limits nothing"),
        (["--size", "0.8"], 2, "nothing to calibrate on"),
        (["--size", "0.8", "--text", "missing.txt"], 4, "no such text file"),
        (["--size", "0.8", "--text", "a", "--data", "a:b"], 2, "both --text and --data"),
        (["--size", "0.8", "--text", "python", "-o", "missing/out"], 6, "parent folder"),
        (["--loss", "0.1", "--text", "python", "--mode", "forward"], 2, "--loss needs gradients"),
        (["--loss", "0.1", "--mode", "data_free"], 2, "--loss needs gradients"),
        (["--size", "0.8", "--target", "eager"], 2, "give --latency"),
        (["--latency", "0.8", "--target", "eager,rows=3"], 2, "no setting 'rows'"),
        (["--latency", "0.8", "--target", "eager,tokens=many"], 2, "no number"),
        (["--latency", "5"], 2, "latency 5 is not a budget"),
    ],
)
def test_checks_come_before_work(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(name: str) -> Any:
        raise AssertionError("work began before the checks")

    monkeypatch.setattr(cli_optimize, "load_source", unreachable)
    assert main(["optimize", "model", "-o", str(tmp_path / "out"), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "fix: " in captured.err


def test_row_135_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "./missing", "-o", str(tmp_path / "o"), "--size", "0.8", *SMALL]) == 2
    assert "no such model" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_interrupt_memory_and_bugs(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Any:
        raise kind

    monkeypatch.setattr("geofx.cli.examination.examine", fail)
    assert main(["doctor"]) == {KeyboardInterrupt: 130, MemoryError: 8, ZeroDivisionError: 1}[kind]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


def test_row_123_an_error_cannot_drive_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Any:
        raise GeofxError("bad \x1b]8;;x\x07 name", where="a\x1b[2J")

    monkeypatch.setattr("geofx.cli.examination.examine", fail)
    assert main(["doctor"]) == 1
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.8", 0.8),
        ("1.0", 1.0),
        ("8e-1", 0.8),
        ("120000", 120000),
        ("1e4", 10000),
        ("120000.0", 120000),
        ("12345678901234567891", 12345678901234567891),
        ("80%", "80%"),
        ("350 MiB", "350 MiB"),
    ],
)
def test_amounts(text: str, value: Any) -> None:
    budget = cli_options.budget_of(text, None, None, None, None, "model")
    assert budget.size == value
    assert type(budget.size) is type(value)


def test_the_application_is_the_entry_point() -> None:
    assert app.info.name == "geofx"
    assert {name for name, _ in COMMANDS} == {command.name for command in app.registered_commands}
