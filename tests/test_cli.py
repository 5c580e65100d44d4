"""The command line: results on stdout, messages on stderr, exit codes, and work only after checks."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import geofx
from geofx import cli_optimize, cli_options, demo
from geofx import errors as errors_module
from geofx.cli import COMMANDS, EXIT_CODES, app, main
from geofx.cli_console import ConsoleProgress, show, working
from geofx.doctor import examine
from geofx.errors import GeofxError
from geofx.latency import interleaved_medians
from geofx.sources import load_source

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

SMALL = ["--text", "python", "--tokens", "256", "--length", "32"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder with a byte tokenizer that begins texts with a BOS."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["a"], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # type: ignore[assignment]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder, optimized and saved."""
    out = tmp_path_factory.mktemp("results") / "out"
    assert main(["optimize", str(model_folder), "-o", str(out), "--size", "0.8", *SMALL]) == 0
    return out


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    """The one JSON document on stdout."""
    return json.loads(capsys.readouterr().out)


# --- help and mistakes -----------------------------------------------------------------------


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
    "--output -o --text --data --holdout --size --parameters --flops --loss --scope --include --ignore "
    "--mode --tokens --length --seed --html --overwrite --json --help -h"
)


def test_optimize_options_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "--help"]) == 0
    found = re.findall(r"(?<![\w-])--?[a-z]+\b", words(capsys.readouterr().out))
    assert sorted(set(found)) == sorted(OPTIMIZE_OPTIONS.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
        (["--size", "0"], 2, "is not a budget"),
        ([], 2, "the budget limits nothing"),
        (["--size", "0.8"], 2, "nothing to calibrate on"),
        (["--size", "0.8", "--text", "missing.txt"], 4, "no such text file"),
        (["--size", "0.8", "--text", "a", "--data", "a:b"], 2, "both --text and --data"),
        (["--size", "0.8", "--text", "python", "-o", "missing/out"], 6, "parent folder"),
    ],
)
def test_checks_come_before_work(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(name: str) -> Any:
        raise AssertionError("work began before the checks")

    monkeypatch.setattr(cli_optimize, "load_source", unreachable)
    assert main(["optimize", "model", "-o", "out", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "fix: " in captured.err


def test_a_pattern_that_matches_nothing_is_an_error_before_work(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_optimize, "analyze", None)
    code = main(
        [
            "optimize",
            str(model_folder),
            "-o",
            str(tmp_path / "o"),
            "--size",
            "0.8",
            "--ignore",
            "lm_hat",
            *SMALL,
        ]
    )
    assert code == 2
    assert "lm_head" in capsys.readouterr().err


def test_row_135_no_such_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", "./missing", "-o", str(tmp_path / "o"), "--size", "0.8", *SMALL]) == 2
    assert "no such model" in capsys.readouterr().err


def test_an_impossible_budget(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    assert main(["optimize", str(model_folder), "-o", str(out), "--size", "100B", *SMALL]) == 3
    assert not out.exists()
    assert "error: " in capsys.readouterr().err


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


# --- the commands ----------------------------------------------------------------------------


def test_optimize_prints_one_json_document(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "out", tmp_path / "report.html"
    arguments = [
        "optimize",
        str(model_folder),
        "-o",
        str(out),
        "--parameters",
        "0.8",
        "--scope",
        "factorizable",
    ]
    assert main([*arguments, "--json", "--html", str(page), *SMALL]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["model"] == "tiny"
    before, after = report["original"], report["optimized"]
    assert 0.7 * before["linear_parameters"] < after["linear_parameters"] <= 0.8 * before["linear_parameters"]
    assert page.read_text().startswith("<!doctype html>")
    assert str(tmp_path) not in json.dumps(report)  # row 125
    loaded = geofx.load(out)
    ids = torch.arange(1, 9).reshape(1, 8)
    assert torch.isfinite(loaded(input_ids=ids).logits).all()
    assert main([*arguments, *SMALL]) == 6  # there is a result already


def test_plan_edit_apply(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "out"
    plan = ["plan", str(model_folder), "--size", "0.9", "-o", str(file), *SMALL]
    assert main([*plan, "--dry-run"]) == 0
    assert "regions rewritten" in capsys.readouterr().out
    assert not file.exists()
    assert main([*plan, "--json"]) == 0
    assert document(capsys) == json.loads(file.read_text())
    assert main(["apply", str(model_folder), str(file), "-o", str(out), "--json", *SMALL]) == 0
    applied = document(capsys)
    assert applied["optimized"]["size_bytes"] <= 0.9 * applied["original"]["size_bytes"]
    file.write_text("{}")
    assert main(["apply", str(model_folder), str(file), "-o", str(out), *SMALL]) == 2
    assert "not a plan" in capsys.readouterr().err


def test_inspect(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, graph = tmp_path / "r.html", tmp_path / "g.json"
    assert main(["inspect", str(saved), "--json", "--html", str(page), "--graph", str(graph)]) == 0
    shown = document(capsys)
    assert set(shown) == {"report", "plan"}
    assert "Original against optimized" in page.read_text()
    assert {"nodes", "edges"} <= set(json.loads(graph.read_text()))
    assert main(["inspect", str(saved)]) == 0
    assert "All parameters" in capsys.readouterr().out


def test_the_tokenizer_is_saved_too(
    saved: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["eval", str(saved), "--text", "python", "--tokens", "128", "--length", "32", "--json"]
    assert main(evaluate) == 0
    alone = document(capsys)
    assert alone["perplexity"] == pytest.approx(2.718281828459045 ** alone["loss"])
    assert main([*evaluate, "--original", str(model_folder)]) == 0
    compared = document(capsys)
    assert compared["loss_optimized"] == pytest.approx(alone["loss"])
    assert 0.0 < compared["kl"] < 1.0


def test_bench(saved: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "bench",
        str(saved),
        "--original",
        str(model_folder),
        "--length",
        "8",
        "--rounds",
        "2",
        "--json",
    ]
    assert main(arguments) == 0
    seconds = document(capsys)["seconds"]
    assert set(seconds) == {"original, torch", "optimized, torch"}
    assert min(seconds.values()) > 0.0


def test_export(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(saved)]) == 2
    capfd.readouterr()
    file = tmp_path / "model.onnx"
    assert main(["export", str(saved), "--onnx", str(file), "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert made["onnx"]["path"] == "model.onnx"
    assert file.is_file()


@pytest.mark.parametrize("command", ["inspect", "eval", "bench", "export"])
def test_what_is_not_a_result_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"eval": ["--text", "python"], "export": ["--onnx", str(tmp_path / "m.onnx")]}.get(command, [])
    assert main([command, str(tmp_path), *extra]) == 6
    assert "error: " in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--json"]) == 0
    names = [check["name"] for check in document(capsys)["checks"]]
    assert {"python", "torch", "extra hf", "extra onnx", "memory", "disk", "accelerator"} <= set(names)
    monkeypatch.setattr("geofx.doctor.importlib.util.find_spec", lambda name: None)  # row 133
    fixes = {check.name: check.fix for check in examine()}
    assert fixes["extra onnx"] == 'pip install "geofx[onnx]"'
    assert main(["doctor"]) == 0
    assert "geofx[hf]" in capsys.readouterr().out


def test_demo_on_a_tiny_model(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 256)
    monkeypatch.setattr(demo, "HELDOUT_TOKENS", 128)
    monkeypatch.setattr(demo, "WINDOW", 32)
    monkeypatch.setattr(demo, "LATENCY_TOKENS", 8)
    monkeypatch.setattr(
        demo.run, "__defaults__", (demo.FOLDER, demo.log_progress, lambda: load_source(str(model_folder)))
    )
    folder = tmp_path / "a" / "demo"
    assert main(["demo", "-o", str(folder), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    for side in ("original", "optimized"):
        assert None not in report[side].values()
    assert report["optimized"]["onnx_bytes"] < report["original"]["onnx_bytes"]
    assert sorted(file.suffix for file in folder.iterdir()) == ["", ".data", ".html", ".onnx"]


# --- streams ---------------------------------------------------------------------------------


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
    with working(quiet=True):
        print("from Python")
        os.write(1, b"from C\n")
    show("[red]result[/red]")
    captured = capfd.readouterr()
    assert captured.out == "[red]result[/red]\n"
    assert captured.err.split() == ["from", "C", "from", "Python"] or "from C" in captured.err


def test_row_132_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress() as progress:
        for done in range(4):
            progress("count\x1b[2J", done, 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith(": started")
    assert "done in" in lines[1]
    assert "\x1b" not in lines[0]


def test_progress_on_a_terminal() -> None:
    console = Console(force_terminal=True, width=80, record=True, color_system=None, file=io.StringIO())
    with ConsoleProgress(console) as progress:
        for done in range(4):
            progress("count", done, 3)
        progress("unknown", 0, 0)
    assert "3/3" in console.export_text()


def test_interrupted_from_outside() -> None:
    code = (
        "import sys, time\n"
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


@pytest.mark.parametrize(
    ("text", "value"), [("0.8", 0.8), ("120000", 120000), ("80%", "80%"), ("350 MiB", "350 MiB")]
)
def test_amounts(text: str, value: Any) -> None:
    budget = cli_options.budget_of(text, None, None, None, "model")
    assert budget.size == value


def test_the_application_is_the_entry_point() -> None:
    assert app.info.name == "geofx"
    assert {name for name, _ in COMMANDS} == {command.name for command in app.registered_commands}
