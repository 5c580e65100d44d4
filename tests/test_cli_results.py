"""What goes wrong around the commands: paths, a user's own functions, memory, models without tokens."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import geofx
import geofx.sources
from geofx import cli_optimize, cli_results
from geofx.bench_inputs import bench_inputs
from geofx.cli import main
from geofx.errors import CalibrationError, CaptureError, ConfigError
from geofx.sources import Source
from geofx.trace import trace
from geofx.verify import Fidelity

FUNCTIONS = """
import torch
def model(): return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
def batches(): return [torch.randn(16, 6) for _ in range(4)]
def ragged(): return [torch.randn(16, 6), torch.randn(16, 6), torch.randn(16, 5), torch.randn(16, 6)]
def broken(): return {}["a key of the user's"]
def lazy():
    yield torch.randn(8, 6)
    raise KeyError("a key of the user's")
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working folder, by name."""
    (tmp_path / "geofx_user_functions.py").write_text(FUNCTIONS)
    (tmp_path / "geofx_user_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for name in ("geofx_user_functions", "geofx_user_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "geofx_user_functions"


def optimize(functions: str, model: str = "model", data: str = "batches", *more: str) -> int:
    arguments = ["optimize", f"{functions}:{model}", "-o", "out", "--size", "0.9"]
    return main([*arguments, "--data", f"{functions}:{data}", *more])


def saved(name: str, folder: Path) -> Path:
    batches = [tiny_models.example(name, 4, 24, seed) for seed in range(3)]
    return geofx.optimize(tiny_models.build(name), geofx.Budget(size=1.0), calibration=batches).save(folder)


@pytest.mark.parametrize(("model", "data"), [("broken", "batches"), ("model", "broken"), ("model", "lazy")])
def test_a_function_of_the_users_that_fails_is_named(
    functions: str, model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert optimize(functions, model, data) in (2, 4)
    message = capsys.readouterr().err
    assert "a key of the user's" in message
    assert "bug in geofx" not in message
    assert data == "lazy" or f"{functions}:broken raised KeyError" in message


def test_a_module_of_the_users_that_fails_on_import_is_named(
    functions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["optimize", "geofx_user_broken:model", "-o", "out", "--size", "0.9", "--text", "python"]) == 2
    )
    assert "geofx_user_broken raised ZeroDivisionError" in capsys.readouterr().err


PLACES = ["missing/file", "folder"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["optimize", "apply", "plan", "inspect --html", "inspect --networkx"])
def test_files_that_cannot_be_written_are_refused_before_work(
    command: str, place: str, functions: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise AssertionError("work began before the checks")

    Path("folder").mkdir()
    monkeypatch.setattr(cli_optimize, "load_source", unreachable)
    monkeypatch.setattr(cli_optimize.Plan, "load", lambda path: None)
    monkeypatch.setattr(cli_results, "load", unreachable)
    kind, _, option = command.partition(" ")
    text = ["--text", "python"]
    arguments = {
        "optimize": ["m", "-o", "out", "--size", "0.9", "--html", place, *text],
        "apply": ["m", "p.json", "-o", "out", "--html", place, *text],
        "plan": ["m", "-o", place, "--size", "0.9", *text],
        "inspect": ["out", option, place],
    }
    assert main([kind, *arguments[kind]]) == 6
    assert "parent folder does not exist" in capsys.readouterr().err or place == "folder"


def refused(capsys: pytest.CaptureFixture[str], code: int, message: str, *arguments: str) -> None:
    assert main(list(arguments)) == code
    error = capsys.readouterr().err
    assert message in error
    assert "bug in geofx" not in error


def test_what_a_command_cannot_do_is_said_before_work_and_in_its_own_words(
    functions: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model, data = str(saved("mlp", Path("out"))), f"{functions}:model", f"{functions}:batches"
    to_model = ["--size", "0.9", "--data", data]
    refused(capsys, 6, "--overwrite", "optimize", model, "-o", path, *to_model)
    refused(capsys, 2, "what geofx saved", "optimize", path, "-o", "new", *to_model)
    free = ["--size", "0.9", "--mode", "data_free"]
    refused(capsys, 2, "give --data", "optimize", model, "-o", "new", *free)
    refused(capsys, 2, "one file", "inspect", path, "--html", "a.html", "--networkx", "./a.html")
    refused(capsys, 2, "give --original", "export", path, "--onnx", "a.onnx", "--torchscript", "a.pt")
    refused(capsys, 6, "does not exist", "export", path, "--onnx", "a.onnx", "--torchscript", "no/a.pt")
    assert not Path("a.onnx").exists()
    (Path("p.json")).write_text("{}")
    monkeypatch.setattr(cli_optimize.Plan, "load", lambda path: None)
    monkeypatch.setattr(cli_optimize, "load_source", lambda name: pytest.fail("work began"))
    refused(capsys, 6, "no folder", "apply", model, "p.json", "-o", "new", "--analysis", "none")


def test_batches_of_another_shape_are_named(functions: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert optimize(functions, "model", "ragged") == 4
    message = capsys.readouterr().err
    assert "cannot run on this batch" in message
    assert "calibration batch 2" in message
    model = geofx.sources.load_source(f"{functions}:model").model
    good = [torch.randn(8, 6) for _ in range(3)]
    with pytest.raises(CalibrationError, match="held-out batch 1"):
        geofx.optimize(model, geofx.Budget(size=0.9), calibration=good, holdout=[good[0], torch.randn(8, 3)])


class Full(io.StringIO):
    """A stream to a full disk."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_behind_stdout_is_a_plain_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["doctor", "--json"]) == 8
    assert "free some space" in capsys.readouterr().err


def test_a_disk_that_fills_up_late_is_a_plain_error(
    functions: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Path.write_bytes

    def full(file: Path, content: Any) -> int:
        if file.name.startswith(".tmp-geofx-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, content)

    Path("r.html").write_text("an older report")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert optimize(functions, "model", "batches", "--html", "r.html") == 8
    assert "disk is too small" in capsys.readouterr().err
    assert Path("r.html").read_text() == "an older report"


def out_of_memory() -> Any:
    torch.empty(2**55)


def wrapped() -> Any:
    try:
        out_of_memory()
    except RuntimeError as error:
        raise CaptureError("torch.export cannot trace the model") from error


@pytest.mark.parametrize("fail", [out_of_memory, wrapped])
def test_memory_that_runs_out_in_torch_is_a_lack_of_resources(
    fail: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("geofx.cli.examination.examine", fail)
    assert main(["doctor"]) == 8
    assert "out of memory" in capsys.readouterr().err


def test_export_calls_the_original_by_the_name_of_the_other_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in ("export", "eval", "bench"):
        assert main([command, "--help"]) == 0
        assert "--original" in capsys.readouterr().out


# --- bench -----------------------------------------------------------------------------------


def test_bench_inputs_are_of_the_sizes_asked_for() -> None:
    ids = tiny_models.example("bert")["input_ids"]
    program = trace(tiny_models.build("bert"), {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
    inputs = bench_inputs(program, 3, 40)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        name: (3, 40) for name in ("input_ids", "token_type_ids", "attention_mask")
    }
    assert inputs["attention_mask"].all()
    assert torch.isfinite(program(**inputs).last_hidden_state).all()


def test_row_52_the_default_length_is_one_that_the_model_takes() -> None:
    sizes = {}
    for name in ("llama", "bert"):
        program = trace(tiny_models.build(name), tiny_models.example(name))
        inputs = bench_inputs(program, None, None)
        program(**inputs)
        sizes[name] = {tuple(value.shape) for value in inputs.values()}
    assert sizes == {"llama": {(1, 128)}, "bert": {(1, 16)}}
    with pytest.raises(ConfigError, match=r"cannot run inputs of these sizes.*smaller --length"):
        bench_inputs(program, None, 100)


class Characters:
    """A tokenizer of one token per character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % 128 for character in text]}


def test_row_52_eval_cuts_windows_that_the_model_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved("gpt2", tmp_path / "out")
    original = Source(tiny_models.build("gpt2"), Characters(), "gpt2")
    monkeypatch.setattr(cli_results, "load_source", lambda name: original)
    (tmp_path / "text.txt").write_text("whatever there is to read\n" * 20)
    arguments = ["eval", str(path), "--text", str(tmp_path / "text.txt"), "--original", "x", "--json"]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "windows cut from 512 to 64 tokens" in " ".join(output.err.split())
    assert json.loads(output.out)["tokens"] == 20 * 26 // 64 * 63


def test_the_perplexity_of_a_loss_beyond_all_measure_is_left_out() -> None:
    figures = dict.fromkeys(("kl", "top1_agreement", "relative_l2", "sqnr_db", "parameter_mae"), 1.0)
    found = Fidelity(
        loss_original=3.0, loss_optimized=800.0, loss_increase=797.0, tokens=9, unit="nats", **figures
    )
    assert cli_results._figures(found, compared=False) == {"loss": 800.0, "tokens": 9, "perplexity": None}


def test_bench_of_a_model_without_tokens_takes_rows_and_refuses_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved("vit", tmp_path / "out")
    assert main(["bench", str(path), "--batch", "5", "--rounds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == {"pixel_values": [5, 3, 32, 32]}
    assert main(["bench", str(path), "--length", "5", "--rounds", "1"]) == 2
    assert "--length has no effect" in capsys.readouterr().err


def test_a_size_that_no_input_has_is_refused() -> None:
    program = trace(tiny_models.build("mlp"), tiny_models.example("mlp"))
    assert bench_inputs(program, 7, None)["input"].shape == (7, 32)
    with pytest.raises(ConfigError, match="--length"):
        bench_inputs(program, None, 7)
