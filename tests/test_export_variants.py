"""Exports of fewer bits, and compiled ones: what they lose is measured, what they weigh is less."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tiny_models import build, example, letters

import geofx
from geofx.cli import main
from geofx.errors import CalibrationError, ConfigError, ExportError
from geofx.export import pt2
from geofx.export.onnx_variants import OnnxModel
from geofx.report_rows import in_bytes
from geofx.sources import tokenizer_files

BUDGET = geofx.Budget(parameters=0.9, scope="factorizable")
HELD = [example("llama", 4, 24, 9)]


def optimized(name: str, **settings: Any) -> geofx.OptimizedModel:
    analysis = geofx.analyze(build(name), [example(name, seed=seed) for seed in range(2)], **settings)
    return analysis.apply(analysis.plan(BUDGET, formats=["low_rank"]))


@pytest.fixture(scope="module")
def result() -> geofx.OptimizedModel:
    return optimized("llama")


def operators(file: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(file), load_external_data=False).graph.node}


def test_weights_of_8_bits_weigh_less_and_what_they_lose_is_measured(
    result: geofx.OptimizedModel, tmp_path: Path
) -> None:
    file = tmp_path / "int8" / "m.onnx"
    root = logging.getLogger()
    before = list(root.handlers), root.level
    report = result.to_onnx(file, with_past=True, int8=True, holdout=HELD)
    assert (list(root.handlers), root.level) == before
    assert report.size_bytes < 0.9 * result.program.size_bytes()
    assert "MatMulNBits" in operators(file)
    assert report.fidelity is not None
    assert 1e-4 < report.fidelity.relative_l2 < 0.1
    assert report.fidelity.tokens > 50
    wanted = result(**HELD[0]).logits.detach()
    found = OnnxModel(file)(**HELD[0])["logits"]
    error = float((found - wanted).norm() / wanted.norm())
    assert error == pytest.approx(report.fidelity.relative_l2, rel=0.05)


def test_the_measured_file_may_be_an_encoder_or_take_pixels(tmp_path: Path) -> None:
    for name in ("bert", "vit"):
        batches = [example(name, seed=seed) for seed in range(2)]
        found = optimized(name)
        half = found.to_onnx(tmp_path / "half.onnx", dtype="float16", holdout=batches)
        whole = found.to_onnx(tmp_path / "whole.onnx", holdout=batches)
        assert half.size_bytes < 0.6 * whole.size_bytes
        assert half.fidelity is not None
        assert whole.fidelity is not None
        assert whole.fidelity.relative_l2 < 1e-5 < half.fidelity.relative_l2 < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"int8": True}, "8 bits lose has to be measured.*holdout"),
        ({"dtype": "bfloat16"}, "cannot be checked"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_any_work(
    result: geofx.OptimizedModel, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        result.to_onnx(tmp_path / "m.onnx", **settings)
    with pytest.raises(CalibrationError, match="held-out data is empty"):
        result.to_onnx(tmp_path / "m.onnx", holdout=[])
    assert not list(tmp_path.iterdir())


def test_a_compiled_archive_runs_without_geofx(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs a C++ compiler")
    found = optimized("mlp")
    report = found.to_pt2(tmp_path / "m.pt2", compiled=True)
    assert report.max_difference < 1e-5
    inputs = example("mlp")
    (value,) = inputs.values() if isinstance(inputs, dict) else (inputs,)
    answer = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))(value)
    answer = answer[0] if isinstance(answer, tuple | list) else answer
    torch.testing.assert_close(answer, found(value), rtol=1e-4, atol=1e-5)


def test_what_does_not_compile_is_told_and_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(pt2.torch._inductor, "aoti_compile_and_package", fail)
    found = optimized("mlp")
    with pytest.raises(ExportError, match=r"does not compile the graph: no compiler; install a C\+\+"):
        found.to_pt2(tmp_path / "m.pt2", compiled=True)
    assert not list(tmp_path.iterdir())


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, file = tmp_path / "saved", str(tmp_path / "m.onnx")
    files = tokenizer_files(letters())
    optimized("llama", files=files).save(saved)
    given = ["export", str(saved), "--onnx", file]
    assert main([*given, "--int8"]) == 2
    assert "give --text FILE" in capsys.readouterr().err
    assert main(["export", str(saved), "--pt2", file, "--int8", "--text", "python"]) == 2
    assert "are of an ONNX file" in capsys.readouterr().err
    assert main(["export", str(saved), "--onnx", file, "--compiled"]) == 2
    assert "--compiled is of a .pt2" in capsys.readouterr().err
    assert main([*given, "--int8", "--text", "python", "--tokens", "256"]) == 0
    written = capsys.readouterr().out
    assert "nats per token on" in written
    assert in_bytes(sum(path.stat().st_size for path in tmp_path.glob("m.onnx*"))) in written
