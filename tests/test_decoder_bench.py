"""Exported decoders in turns: the figures, what is refused before any work, and the memory of one alone."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from exported_tiny import export_tiny
from tiny_models import build

from geofx import cli_bench, decoder_bench
from geofx.cli import main
from geofx.decoder_bench import Load, Spread, bench_decoders
from geofx.errors import ConfigError, ExportError
from geofx.export.decoder_session import DecoderSession
from geofx.sources import Source

SMALL = Load(rows=1, prompt_tokens=8, new_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer that cannot be opened: none is needed."""
    place = export_tiny(tmp_path_factory.mktemp("decoder"))
    (place / "tokenizer.json").write_text("damaged")
    return place


def unasked(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was work")


def test_memory_is_of_the_decoder_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    commands = []

    def run(command: list[str], **settings: Any) -> Any:
        commands.append(command)
        done = subprocess_run(command, **settings)
        return subprocess.CompletedProcess(command, done.returncode, f"a word\n{done.stdout}", done.stderr)

    subprocess_run = subprocess.run
    monkeypatch.setattr("geofx.decoder_bench.subprocess.run", run)
    found = bench_decoders({"relative": Path(folder.name)}, SMALL, rounds=1, threads=3)["relative"]
    assert found.memory_bytes > 100_000
    assert [command[-4:] for command in commands] == [["3", "1", "8", "3"]]


def test_a_decoder_that_does_not_run_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for status, said, what in ((-9, "", "exit status -9"), (1, "a\nno kernel\n", "no kernel"), (0, "", "0")):
        done = subprocess.CompletedProcess([], status, "", said)
        monkeypatch.setattr("geofx.decoder_bench.subprocess.run", lambda *_, done=done, **__: done)
        with pytest.raises(ExportError, match=rf"{what} \({folder.name}\); see what geofx generate"):
            bench_decoders({"one": folder}, SMALL)


def test_ratios_are_of_rates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = [(9.0, 9.0), (1.0, 9.0), *[(2.0, 3.0), (1.0, 6.0)] * 2]  # the first turn does not count
    turns = iter(made_up)
    monkeypatch.setattr(decoder_bench, "_memory_bytes", lambda *_: 7)
    monkeypatch.setattr(Load, "run", lambda *_: next(turns))
    found = bench_decoders({"base": folder, "own": folder}, Load(2, 10, 4), rounds=2)
    assert (found["base"].prefill_ratio, found["base"].decode_ratio) == (1.0, 1.0)
    assert (found["own"].prefill_ratio, found["own"].decode_ratio) == (2.0, 0.5)
    assert found["own"].first_s == Spread(1.0, 1.0, 1.0)
    assert found["own"].prefill_per_s == Spread(20.0, 20.0, 20.0)
    assert found["own"].decode_per_s == Spread(1.0, 1.0, 1.0)
    assert found["own"].memory_bytes == 7


@pytest.mark.parametrize(
    "settings", [{"rows": 0}, {"prompt_tokens": -1}, {"new_tokens": 1}, {"rows": 1.5}, {"new_tokens": "9"}]
)
def test_loads_that_cannot_be_run(settings: Any) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=rf"{name} .*\(decoder bench\); give [12] or more"):
        Load(**settings)


def test_what_cannot_be_measured_is_refused_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_bench, "_memory_bytes", unasked)
    monkeypatch.setattr(DecoderSession, "__init__", unasked)
    with pytest.raises(ConfigError, match="62 tokens of a prompt and 3 to write; give 64 together"):
        bench_decoders({"one": folder}, Load(1, 62, 3))
    with pytest.raises(ConfigError, match=r"rounds 0 .*give 1 or more"):
        bench_decoders({"one": folder}, SMALL, rounds=0)
    with pytest.raises(ConfigError, match=r"threads -1 .*give 0 or more"):
        bench_decoders({"one": folder}, SMALL, threads=-1)
    with pytest.raises(ConfigError, match=r"decoders 0 .*give 1 or more"):
        bench_decoders({}, SMALL)


def test_a_length_beyond_the_positions_is_refused_before_an_export(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = build("gpt2")
    source = Source(model, None, "gpt2", model.config.to_dict())
    monkeypatch.setattr(cli_bench, "load_source", lambda name: source)
    monkeypatch.setattr(cli_bench, "to_onnx_decoder", unasked)
    assert main(["bench", str(folder), "--against", "any", "--length", "40", "--new-tokens", "25"]) == 2
    assert "40 tokens of a prompt and 25 to write\nfix: give 64 together" in capsys.readouterr().err


def test_options_of_decoders_are_with_another_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folder)]) == 2
    assert f"where: {folder.name}\nfix: give --against BASE" in capsys.readouterr().err
    assert main(["bench", str(folder.parent), "--new-tokens", "9"]) == 2
    assert "--new-tokens is of decoders\nfix: give --against BASE" in capsys.readouterr().err
