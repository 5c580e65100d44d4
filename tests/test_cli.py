"""The command line: results on stdout, messages on stderr, exit codes, and work only after checks."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import geofx
from geofx import cli_analysis, demo
from geofx.cli import main
from geofx.doctor import examine
from geofx.errors import BudgetInfeasibleError
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
    assert main(["inspect", str(saved), "--json", "--html", str(page), "--networkx", str(graph)]) == 0
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
    assert compared["loss"] == pytest.approx(alone["loss"])
    assert compared["loss"] - compared["loss_original"] == pytest.approx(compared["loss_increase"], abs=1e-6)
    assert "loss_optimized" not in compared
    assert 0.0 < compared["kl"] < 1.0


def test_recover_on_text(
    saved: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    arguments = ["recover", str(saved), "--original", str(model_folder), "-o", str(new), "--steps", "2"]
    assert main([*arguments, "--json", *SMALL]) == 0
    report = document(capsys)
    assert [item["step"] for item in report["recovery"]] == [0, 2]
    assert main(["eval", str(new), "--text", "python", "--tokens", "128", "--length", "32"]) == 0


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


@pytest.mark.parametrize("command", [["eval", "--text", "python"], ["bench"]], ids=["eval", "bench"])
def test_another_model_than_the_original_is_refused(
    command: list[str], saved: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    model = transformers.AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    model.save_pretrained(other)
    assert main([command[0], str(saved), *command[1:], "--original", str(other)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is not the model that the saved result was made from" in captured.err
    assert "where: --original other" in captured.err


def test_export(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(saved)]) == 2
    capfd.readouterr()
    file = tmp_path / "model.onnx"
    archive = tmp_path / "model.pt2"
    assert main(["export", str(saved), "--onnx", str(file), "--pt2", str(archive), "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    assert made["onnx"]["path"] == "model.onnx"
    assert made["pt2"]["operations"] == []
    assert file.is_file()
    assert archive.is_file()


@pytest.mark.parametrize("command", ["inspect", "eval", "bench", "export"])
def test_what_is_not_a_result_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"eval": ["--text", "python"], "export": ["--onnx", str(tmp_path / "m.onnx")]}.get(command, [])
    assert main([command, str(tmp_path), *extra]) == 6
    assert "error: " in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"geofx {metadata.version('geofx')}\n"


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
        assert report[side]["size_bytes"] < report[side]["disk_bytes"] < 1.5 * report[side]["size_bytes"]
    assert report["optimized"]["disk_bytes"] == (folder / "model" / "geofx.safetensors").stat().st_size
    assert json.loads((folder / "model" / "report.json").read_text()) == report
    assert report["optimized"]["onnx_bytes"] < report["original"]["onnx_bytes"]
    assert sorted(file.suffix for file in folder.iterdir()) == ["", ".data", ".html", ".onnx"]


def test_a_pattern_that_matches_nothing_is_an_error_before_work(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_analysis, "analyze", None)
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


def test_what_was_made_is_kept_where_it_misses_the_budget(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_slow(analysis: geofx.Analysis, budget: geofx.Budget, **_: Any) -> Any:
        result = geofx.optimization.optimize_analysis(analysis, geofx.Budget(size=0.9))
        raise BudgetInfeasibleError("asked for 1 ms", where="eager", best=result.plan, result=result)

    monkeypatch.setattr("geofx.cli_optimize.optimize_analysis", too_slow)
    out = tmp_path / "out"
    assert main(["optimize", str(model_folder), "-o", str(out), "--latency", "0.5", *SMALL]) == 3
    assert "fix: raise latency; what was made lies in out" in capsys.readouterr().err
    assert geofx.load(out).plan.rewritten


def test_an_impossible_budget(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o"
    assert main(["optimize", str(model_folder), "-o", str(out), "--size", "100B", *SMALL]) == 3
    assert not out.exists()
    assert "error: " in capsys.readouterr().err
