"""A saved folder: the same result back, or an error that names what is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_results import FILES, NEW, OLD, assert_is, contents, edit, make_program, reseal, save_to

from geofx import artifact, tensor_file
from geofx.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactVersionError,
    NumericsError,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_to(tmp_path / "model")


def test_everything_comes_back(saved: Path) -> None:
    assert_is(saved, OLD, '{"is": "old"}\n')
    loaded = artifact.load(saved)
    assert loaded.report == {"loss": 1.5}
    assert loaded.config == {"model_type": "llama", "hidden_size": 3}
    assert loaded.files == {"tokenizer.json": b"\x00not checked by geofx\n"}
    assert loaded.program.dynamic_shapes == OLD.dynamic_shapes
    assert artifact.bytes_on_disk(OLD, saved.parent / "x") == (saved / "geofx.safetensors").stat().st_size
    assert [entry.name for entry in saved.parent.iterdir()] == ["model"]
    other = torch.randn(7, 3)
    assert torch.equal(loaded.program(other), OLD(other))


def test_saves_are_byte_identical_and_name_no_place(saved: Path, tmp_path: Path) -> None:
    again = save_to(tmp_path / "elsewhere", make_program(0))
    from_loaded = save_to(tmp_path / "third", artifact.load(saved).program)
    assert contents(saved) == contents(again) == contents(from_loaded)
    for data in contents(saved).values():
        assert str(tmp_path).encode() not in data
        assert b"/home" not in data


def test_every_type_of_tensor_comes_back(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in tensor_file._DTYPES.values()}
    tensors |= {
        "none": torch.zeros(0, 5),
        "scalar": torch.tensor(3.0),
        "infinite": torch.tensor([-torch.inf]),
    }
    stored = tensor_file.storable(tensors | {"view": tensors["scalar"].expand(4), "part": torch.ones(9)[2:4]})
    tensor_file.write_tensors(tmp_path / "x.safetensors", stored)
    back = tensor_file.read_tensors(tmp_path / "x.safetensors", tensor_file.describe(stored))
    for name, tensor in stored.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_promise_g13_no_value_that_is_not_finite_is_written(tmp_path: Path, value: float) -> None:
    program = make_program()
    name, weight = next(iter(program.tensors()))
    with torch.no_grad():
        weight.view(-1)[-1] = value
    with pytest.raises(NumericsError, match="1 values are not finite") as caught:
        save_to(tmp_path / "model", program)
    assert caught.value.where == name
    assert not list(tmp_path.iterdir())


def test_json_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"plan\.json"):
        save_to(tmp_path / "model", plan='{"a": NaN}')
    with pytest.raises(ArtifactError, match=r"report\.json"):
        artifact.save(tmp_path / "model", OLD, "{}", {"loss": torch.nan})
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_read_back_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tensor_file.save_file
    monkeypatch.setattr(tensor_file, "save_file", lambda t, f: real({k: v + 1 for k, v in t.items()}, f))
    with pytest.raises(ArtifactError, match="does not read back"):
        save_to(tmp_path / "model")
    assert not list(tmp_path.iterdir())


PLAIN = [
    "../x.json",
    "/x.json",
    "a/b.json",
    "a\\b.json",
    "",
    "..json",
    ".hidden.json",
    "C:x.json",
    "x\0.json",
]
OURS = ["config.json", "Config.JSON", "geofx.json", "adapter_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", [*PLAIN, *OURS, "x.json\n", "x" * 130 + ".json", "x.bin", "x.pkl", "x.py"])
def test_row_117_names_of_further_files_are_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot be the name"):
        artifact.save(tmp_path / "model", OLD, "{}", {}, extra={name: b"{}"})


# --- damage


def test_row_103_truncated_flipped_and_swapped_files_are_named(saved: Path) -> None:
    for name in FILES:
        file = saved / name
        data = file.read_bytes()
        flips = [
            data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in (0, 8, len(data) // 2, len(data) - 1)
        ]
        for damaged in (data[:-1], b"", data + b"\0", *flips):
            file.write_bytes(damaged)
            with pytest.raises(ArtifactCorruptError) as caught:
                artifact.load(saved)
            assert caught.value.where == name
        file.unlink()
        with pytest.raises(ArtifactCorruptError, match=name):
            artifact.load(saved)
        file.write_bytes(data)
    assert_is(saved, OLD, '{"is": "old"}\n')


def test_row_103_the_weights_of_another_model(saved: Path, tmp_path: Path) -> None:
    other = save_to(tmp_path / "other", NEW)
    shutil.copy(other / "geofx.safetensors", saved)
    with pytest.raises(ArtifactCorruptError, match=r"geofx\.safetensors is damaged"):
        artifact.load(saved)


MANIFEST_DAMAGE: dict[str, Callable[[Any], Any]] = {
    "extra": lambda m: m["tensors"].update(x={"dtype": "float32", "shape": [1]}),
    "missing": lambda m: m["tensors"].pop("0.weight"),
    "dtype": lambda m: m["tensors"]["0.weight"].update(dtype="int32"),
    "shape": lambda m: m["tensors"]["0.weight"].update(shape=[3, 5]),
    "flat": lambda m: m["tensors"]["0.weight"].update(shape=[15]),
    "entry": lambda m: m["tensors"].update({"0.weight": 3}),
    "list": lambda m: m.update(tensors=[]),
    "files": lambda m: m.update(files=[]),
    "no graph": lambda m: m["files"].pop("graph.json"),
    "key": lambda m: m.update(more=1),
    "hash": lambda m: m["files"]["plan.json"].update(sha256="0" * 63),
    "bytes": lambda m: m["files"]["plan.json"].update(bytes=True),
    "negative": lambda m: m["files"]["plan.json"].update(bytes=-1),
    "case": lambda m: m["files"].update({"TOKENIZER.json": m["files"]["tokenizer.json"]}),
}


@pytest.mark.parametrize("case", MANIFEST_DAMAGE)
def test_row_104_a_manifest_that_disagrees(saved: Path, case: str) -> None:
    edit(saved / "geofx.json", MANIFEST_DAMAGE[case])
    with pytest.raises(ArtifactCorruptError):
        artifact.load(saved)


@pytest.mark.parametrize("case", ["extra", "missing", "dtype", "shape", "renamed"])
def test_row_104_weights_that_disagree(saved: Path, case: str) -> None:
    tensors = load_file(saved / "geofx.safetensors")
    weight = tensors.pop("0.weight")
    change = {"dtype": weight.double(), "shape": weight.reshape(3, 5), "extra": weight.clone()}
    tensors |= {"0.weight": change[case]} if case in change else {}
    tensors |= {case: weight} if case in ("extra", "renamed") else {}
    save_file(tensors, saved / "geofx.safetensors")
    reseal(saved, "geofx.safetensors")
    with pytest.raises(ArtifactCorruptError, match="is expected"):
        artifact.load(saved)
    described = tensor_file.describe(tensors)
    edit(saved / "geofx.json", lambda manifest: manifest.update(tensors=described))
    if case in ("extra", "missing", "renamed"):
        with pytest.raises(ArtifactCorruptError, match="graph"):
            artifact.load(saved)


def test_row_105_newer_and_impossible_schema_versions(saved: Path) -> None:
    edit(
        saved / "geofx.json",
        lambda m: m.update(schema_version=2, geofx_version="9.1", more="of a later format"),
    )
    with pytest.raises(ArtifactVersionError, match=r"made by geofx 9\.1 with schema 2; .* up to 1"):
        artifact.load(saved)
    for version in (0, -1, True, "1", 1.0, None):
        edit(saved / "geofx.json", lambda m, version=version: m.update(schema_version=version))
        with pytest.raises(ArtifactCorruptError, match="schema version"):
            artifact.load(saved)


def test_row_105_not_a_saved_folder(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "no", tmp_path / "a\0b"):
        with pytest.raises(ArtifactError):
            artifact.load(place)


@pytest.mark.parametrize("with_config", [True, False])
def test_row_106_plain_transformers_refuses_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_config: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    path = artifact.save(
        tmp_path / "m", OLD, "{}", {}, config={"model_type": "llama"} if with_config else None
    )
    message = "geofx" if with_config else "model_type|config"
    for loader in (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoModel):
        for options in ({}, {"trust_remote_code": True}):
            with pytest.raises((ValueError, OSError), match=message):
                loader.from_pretrained(path, **options)
    with pytest.raises((ValueError, OSError)):
        transformers.LlamaForCausalLM.from_pretrained(path)
