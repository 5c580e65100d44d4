"""geofx recover: a saved result, its original and data make a saved result that lost less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli_compare import MODEL

import geofx
from geofx import cli_recover
from geofx.cli import main

DATA = ["--data", "geofx_compared_functions:batches"]
RECOVER = ["recover", "out", "--original", MODEL, "-o", "new"]
TRAINING = ["--steps", "40", "--learning-rate", "0.01"]


@pytest.fixture
def saved(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A small network, optimized and saved in ``out``."""
    assert main(["optimize", MODEL, "-o", "out", "--size", "0.7", *DATA]) == 0
    capsys.readouterr()
    return folder / "out"


def states(folder: Path) -> dict[str, torch.Tensor]:
    return geofx.load(folder).state_dict()


def test_the_result_is_nearer_to_the_original_and_as_large(
    saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RECOVER, *DATA, *TRAINING]) == 0
    captured = capsys.readouterr()
    assert "Recovery: what was trained for" in captured.out
    assert "recover: done" in captured.err
    before, after = geofx.load(saved), geofx.load(folder / "new")
    history = after.report.recovery
    assert [item["step"] for item in history] == [0, 20, 40]
    assert min(item["validation"] for item in history) < 0.95 * history[0]["validation"]
    assert after.plan == before.plan
    shapes = {name: tensor.shape for name, tensor in before.state_dict().items()}
    assert {name: tensor.shape for name, tensor in after.state_dict().items()} == shapes


@pytest.mark.usefixtures("saved")
def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [*RECOVER, *DATA, *TRAINING, "--checkpoint", "run"]
    assert main([*RECOVER[:-1], "whole", *DATA, *TRAINING]) == 0
    steps = 0
    real = torch.optim.AdamW.step

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 30:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        assert main(kept) == 130
    assert not (folder / "new").exists()
    capsys.readouterr()
    assert main([*kept, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["recovery"]) == 3
    whole, new = states(folder / "whole"), states(folder / "new")
    assert all(torch.equal(whole[name], new[name]) for name in whole)


@pytest.mark.usefixtures("saved")
def test_in_place_and_seeded(folder: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main([*RECOVER[:-1], name, *DATA, *TRAINING, "--seed", seed]) == 0
    first, same, other = (states(folder / name) for name in "abc")
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert main([*RECOVER[:-1], "out", *DATA, *TRAINING]) == 6
    assert main([*RECOVER[:-1], "out", *DATA, *TRAINING, "--overwrite"]) == 0
    assert all(torch.equal(part, first[name]) for name, part in states(folder / "out").items())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "there is nothing to train on"),
        (["--text", "missing.txt"], 4, "no such text file"),
        ([*DATA, "--learning-rate", "0"], 2, "learning_rate is 0.0"),
        ([*DATA, "--steps", "0"], 2, "--steps"),
        ([*DATA, "--checkpoint", "geofx_compared_functions.py"], 6, "cannot be made"),
        ([*DATA, "-o", "missing/new"], 6, "parent folder does not exist"),
        ([*DATA, "-o", "out"], 6, "--overwrite"),
    ],
)
@pytest.mark.usefixtures("saved")
def test_what_cannot_be_done_is_said_before_work(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli_recover, "load", lambda path: pytest.fail("work began"))
    assert main([*RECOVER, *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("saved")
def test_another_model_than_the_original_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "geofx_other_functions.py"
    path.write_text((folder / "geofx_compared_functions.py").read_text().replace("seed(0)", "seed(1)"))
    arguments = ["recover", "out", "--original", "geofx_other_functions:model", "-o", "new", *DATA]
    assert main(arguments) == 2
    assert "is not the model that the saved result was made from" in capsys.readouterr().err
    assert not (folder / "new").exists()
