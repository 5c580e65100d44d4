"""Decoders with their past: exported, checked, and run by what reads such exports."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from tiny_models import build, example, letters

import geofx
from geofx import decoder_bench
from geofx.cli import main
from geofx.errors import (
    ArtifactCorruptError,
    ArtifactError,
    CaptureError,
    ConfigError,
    ExportError,
    VerificationError,
)
from geofx.export import onnx_file
from geofx.export.decoder_session import DecoderSession, left_padded
from geofx.export.onnx_decoder import require_same_tokens, to_onnx_decoder
from geofx.factorizations import GaugeFixed, LowRank
from geofx.model import OptimizedModel
from geofx.runtime import Generator
from geofx.sampling import Sampling
from geofx.sources import tokenizer_files


@pytest.fixture(scope="module")
def result() -> OptimizedModel:
    """A decoder that likes to go on: norms are larger than they come, so that logits are far apart."""
    model = build("llama")
    model.generation_config.eos_token_id = 0
    with torch.no_grad():
        model.model.norm.weight.mul_(6.0)
    analysis = geofx.analyze(model, example("llama"), files=tokenizer_files(letters()))
    plan = analysis.plan(geofx.Budget(parameters=1.0))
    forms = {
        item.region: (LowRank(9) if "mlp" in item.region else GaugeFixed(11))
        for item in plan.choices
        if "layers" in item.region
    }
    return analysis.apply(plan.edit(forms))


@pytest.fixture(scope="module")
def folder(result: OptimizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line exports of the saved result."""
    place = tmp_path_factory.mktemp("decoder")
    saved, folder = result.save(place / "saved"), place / "onnx"
    folder.mkdir()
    assert main(["export", str(saved), "--onnx", str(folder / "model.onnx"), "--with-past"]) == 0
    return folder


def test_inputs_and_outputs_are_named_as_deployments_expect(folder: Path) -> None:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    past = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    inputs = {value.name: value.shape for value in session.get_inputs()}
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{name: ["batch_size", 2, "past_sequence_length", 16] for name in past},
    }
    outputs = [value.name for value in session.get_outputs()]
    assert outputs == ["logits", *(name.replace("past_key_values", "present") for name in past)]


def test_what_lies_beside_is_read_by_others(folder: Path, result: OptimizedModel) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "genai_config.json", "tokenizer.json"} < names
    assert transformers.AutoConfig.from_pretrained(folder).num_hidden_layers == 2
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == 0
    assert transformers.AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == [3, 4]
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["num_key_value_heads"] == 2
    assert (config["model"]["eos_token_id"], config["model"]["pad_token_id"]) == (0, 0)


def test_onnxruntime_genai_writes_the_same(folder: Path, result: OptimizedModel) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    ids = [5, 9, 30, 12]
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=24, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array([ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    wanted = [int(token[0]) for token in Generator(folder).tokens([ids], 20)]
    assert list(generator.get_sequence(0))[4:] == [token if token >= 0 else 0 for token in wanted]


def test_rows_of_unlike_length_are_written_as_each_alone(folder: Path, result: OptimizedModel) -> None:
    generator, rows = Generator(folder), [[5, 9, 30, 12, 8, 8], [70], [3, 4, 5]]
    together = np.stack(list(generator.tokens(rows, 20)), 1)
    assert len({tuple(row) for row in together.tolist()}) == 3
    module = result.to_module()
    for row, found in zip(rows, together, strict=True):
        alone = np.stack(list(generator.tokens([row], 20)), 1)[0]
        assert found[: len(alone)].tolist() == alone.tolist()
        whole = module.generate(torch.tensor([row]), do_sample=False, max_new_tokens=20)[0, len(row) :]
        assert [token for token in found if token >= 0] == [int(token) for token in whole if token]


def test_the_model_is_checked_token_by_token(folder: Path, result: OptimizedModel) -> None:
    module, prompts = result.to_module(), [[5, 6, 7], [8]]
    found = require_same_tokens(module, folder / "model.onnx", prompts)
    assert list(found) == ["2 x 3 tokens", "2 x 3 tokens, 32 written"]
    assert max(found.values()) < 1e-4
    with torch.no_grad():
        next(module.model.layers[1].mlp.down_proj.parameters()).mul_(1.5)
    with pytest.raises(VerificationError, match=r"logits differ by .*token 0 that ONNX Runtime writes"):
        require_same_tokens(module, folder / "model.onnx", prompts)


def test_nothing_is_published_unless_it_writes_the_same(
    folder: Path, result: OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(program: geofx.Program) -> Any:
        """Keys of one layer for those of the other."""
        model = ir.load(folder / "model.onnx")
        first, other = (value for value in model.graph.inputs if value.name.endswith("key"))
        first.name, other.name = "aside", first.name
        first.name = "past_key_values.1.key"
        return model

    monkeypatch.setattr(onnx_file, "to_onnx_model", swapped)
    with pytest.raises(VerificationError, match=r"token [1-9]\d* that ONNX Runtime writes"):
        result.to_onnx(tmp_path / "model.onnx", with_past=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_a_folder_of_something_else_is_left_alone(name: str, result: OptimizedModel, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ArtifactError, match=rf"holds {name} of something else.*folder of its own"):
        result.to_onnx(tmp_path / "model.onnx", with_past=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_export_replaces_its_like_and_nothing_else(
    folder: Path, result: OptimizedModel, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "model.onnx"
    shutil.copytree(folder, target.parent)
    first = sorted(path.name for path in target.parent.iterdir())
    result.to_onnx(target, with_past=True)
    assert sorted(path.name for path in target.parent.iterdir()) == first
    with pytest.raises(ArtifactError, match=r"holds chat_template\.jinja of something else"):
        to_onnx_decoder(build("llama"), target)
    with pytest.raises(ArtifactError, match=r"holds model\.onnx\S* of something else"):
        result.to_onnx(target.with_name("other.onnx"), with_past=True)


def test_row_125_no_path_beside_it(
    result: OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"_name_or_path": "/home/someone/model", "text_config": {"_name_or_path": "/home/someone"}}
    given: dict[str, bytes] = {}
    monkeypatch.setattr("geofx.model.to_onnx_decoder", lambda *_, beside, **__: given.update(beside))
    dataclasses.replace(result, config=config).to_onnx(tmp_path / "model.onnx", with_past=True)
    assert json.loads(given["config.json"]) == {"text_config": {}}


def test_half_precision_is_allowed_its_own_rounding(tmp_path: Path) -> None:
    report = to_onnx_decoder(build("llama").half(), tmp_path / "model.onnx")
    assert 0.0 < report.max_difference < 1e-2
    with pytest.raises(VerificationError, match="raise rtol"):
        require_same_tokens(build("llama").half(), tmp_path / "model.onnx", [[5, 6]], rtol=1e-7)


def test_a_model_of_few_positions_is_checked_within_them(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    report = to_onnx_decoder(transformers.GPT2LMHeadModel(config), tmp_path / "model.onnx")
    assert list(report.differences) == [
        "2 x 11 tokens",
        "2 x 11 tokens, 1 written",
        "1 x 1 tokens",
        "1 x 1 tokens, 11 written",
    ]


@pytest.mark.parametrize("name", ["bert", "mlp"])
def test_what_does_not_write_has_no_past(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"does not write tokens.*without the past"):
        to_onnx_decoder(build(name), tmp_path / "model.onnx")


def test_what_keeps_something_else_has_no_such_past(tmp_path: Path) -> None:
    model = build("llama")
    forward = model.forward

    def states(*args: Any, **given: Any) -> Any:
        output = forward(*args, **given)
        output.past_key_values = transformers.DynamicCache()
        return output

    model.forward = states
    model.forward.__signature__ = inspect.signature(forward)
    with pytest.raises(ExportError, match="not keys and values by layer"):
        to_onnx_decoder(model, tmp_path / "model.onnx")


def test_what_reads_with_an_encoder_has_no_such_past(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ExportError, match="encoder"):
        to_onnx_decoder(transformers.T5ForConditionalGeneration(config).eval(), tmp_path / "model.onnx")
    with pytest.raises(CaptureError, match="meta"):
        to_onnx_decoder(build("llama").to("meta"), tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_other_decoders(name: str, tmp_path: Path) -> None:
    model = build(name)
    report = to_onnx_decoder(model, tmp_path / "model.onnx")
    assert report.max_difference < 1e-4
    session, ids = DecoderSession(tmp_path / "model.onnx"), example(name)["input_ids"]
    assert session.start(ids.numpy()).shape == (2, 128)
    assert session.tokens == 16


def test_text_comes_piece_by_piece(folder: Path, result: OptimizedModel) -> None:
    generator = Generator(folder)
    pieces = list(generator.stream("ab cd", max_new_tokens=12))
    assert len(pieces) > 3
    assert "".join(pieces) == generator.generate(["ab cd", "x"], max_new_tokens=12)[0]
    speed = generator.speed
    assert speed is not None
    assert speed.prompt_tokens == 6, "5 and 1"
    assert 0 < speed.later_tokens <= 22
    assert speed.prefill_per_s > 0 < (speed.decode_per_s or 0)
    assert generator.ids_of("ab", chat=True) == generator.ids_of("<ab>")
    drawn = {generator.generate(["ab"], sampling=Sampling(1.0, seed=seed))[0] for seed in (1, 1, 2)}
    assert len(drawn) == 2


def test_prompts_that_cannot_be_written_on(folder: Path) -> None:
    generator = Generator(folder)
    for prompts, count in (([], 4), ([[]], 4), ([[1]], 0)):
        with pytest.raises(ConfigError, match="give 1 or more of each"):
            next(generator.tokens(prompts, count))
    with pytest.raises(ConfigError, match="64 tokens of a prompt and 1 to write; give 64 together"):
        next(generator.tokens([[1] * 64], 4))
    assert len(list(generator.tokens([[5] * 60], 100))) <= 4, "it ends where the model does"
    generator.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        generator.ids_of("a", chat=True)
    generator.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        generator.ids_of("a")
    with pytest.raises(ConfigError, match="padded on the left"):
        generator.session.start(np.ones((1, 2), np.int64), np.array([[1, 0]]))


def test_folders_that_are_no_export(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not the folder of an exported decoder.*--with-past"):
        Generator(tmp_path)
    for text in ("[1]", '{"model": {}}', '{"model": {"decoder": {"filename": "../x.onnx"}}}', "nonsense"):
        (tmp_path / "genai_config.json").write_text(text)
        with pytest.raises((ArtifactCorruptError, ArtifactError), match=r"genai_config|name"):
            Generator(tmp_path)


def test_a_graph_without_the_past_is_no_decoder(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", 1])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.INT64, ["batch", 1])
    node = onnx.helper.make_node("Identity", ["input_ids"], ["logits"])
    graph = onnx.helper.make_graph([node], "none", [value], [logits])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "model.onnx",
    )
    with pytest.raises(ExportError, match=r"not of a decoder with its past.*--with-past"):
        DecoderSession(tmp_path / "model.onnx")


def test_rows_are_padded_on_the_left() -> None:
    ids, mask = left_padded([[7, 8, 9], [5]])
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_what_is_written_does_not_drive_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\x1b[31m\n\tb\r\x9b\u202e\u2066 \u3000\xa0\u200c\u200d\u200f\ufeff\ue000"
    monkeypatch.setattr(Generator, "_decode", lambda self, ids: text * len(ids))
    assert main(["generate", str(folder), "ab", "--tokens", "1"]) == 0
    shown = "a\ufffd[31m\n\tb\ufffd\ufffd\ufffd\ufffd \u3000\xa0\u200c\u200d\u200f\ufeff\ue000\n"
    assert capsys.readouterr().out == shown


def test_data_outside_the_folder_is_not_read(folder: Path, tmp_path: Path) -> None:
    inside = tmp_path / "export"
    shutil.copytree(folder, inside)
    (data,) = inside.glob("*.data")
    data.rename(tmp_path / data.name)
    model = onnx.load(inside / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"../{data.name}"
    (inside / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="ONNX Runtime cannot load the model"):
        Generator(inside)


def test_on_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = folder.parent / "saved"
    assert main(["export", str(saved), "--with-past"]) == 2
    capsys.readouterr()
    assert main(["generate", str(folder), "ab cd", "--tokens", "9"]) == 0
    told = capsys.readouterr()
    assert told.out == Generator(folder).generate(["ab cd"], max_new_tokens=9)[0] + "\n"
    assert "5 prompt tokens read in" in told.err
    assert main(["generate", str(folder), "ab cd", "--tokens", "9", "--json", "--temperature", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 5
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab cd"))
    assert main(["generate", str(folder), "-", "--tokens", "9"]) == 0
    assert capsys.readouterr().out == told.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    assert main(["generate", str(folder), "-"]) == 2
    assert "byte 2 is not utf-8\nwhere: stdin\nfix: " in capsys.readouterr().err
    assert main(["generate", str(folder), "ab\udcff"]) == 2
    assert "character 2 is a lone surrogate\nwhere: prompt\nfix: " in capsys.readouterr().err
    assert main(["generate", str(saved), "ab"]) == 6
    assert main(["generate", str(folder), "ab", "--top-p", "2"]) == 2


def test_decoders_are_run_in_turns(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["--length", "8", "--new-tokens", "4", "--rounds", "3"]
    assert main(["bench", str(folder), "--against", str(folder), *sizes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["load"] == {"rows": 1, "prompt_tokens": 8, "new_tokens": 4}
    base, optimized = found["decoders"]["base"], found["decoders"]["optimized"]
    assert base["size_bytes"] == optimized["size_bytes"] == Generator(folder).size_bytes > 100_000
    assert base["memory_bytes"] > 100_000
    for name in ("first_s", "prefill_per_s", "decode_per_s"):
        assert 0 < optimized[name]["low"] <= optimized[name]["median"] <= optimized[name]["high"]
    monkeypatch.setattr(decoder_bench, "_memory_bytes", lambda *_: 1)
    assert main(["bench", str(folder), "--against", str(folder), *sizes, "--rounds", "1"]) == 0
    assert "written tokens/s" in capsys.readouterr().out
    assert main(["bench", str(folder), "--against", str(folder), "--length", "64"]) == 2
    monkeypatch.setattr(OptimizedModel, "to_onnx", lambda *_, **__: pytest.fail("it is refused before"))
    assert main(["bench", str(folder.parent / "saved"), "--against", str(folder), "--length", "64"]) == 2
    assert main(["bench", str(folder), "--against", str(folder), "--original", "x"]) == 2
