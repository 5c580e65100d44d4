"""A saved folder: the same result back, whole or not at all, and nothing in a file is ever run."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import stat
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from geofx import artifact, folder, tensor_file
from geofx.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactVersionError,
    NumericsError,
    ResourceError,
)
from geofx.program import Program
from geofx.trace import trace

FILES = ["graph.json", "plan.json", "report.json", "config.json", "tokenizer.json", "geofx.safetensors"]
CONFIG = {"model_type": "llama", "hidden_size": 3, "_name_or_path": "/home/someone/model"}


def make_program(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)).eval()
    return trace(layers, {"input": torch.arange(6.0).view(2, 3)})


OLD, NEW = make_program(0), make_program(1)


def save_to(path: Path, program: Program = OLD, plan: str = '{"is": "old"}\n', **options: Any) -> Path:
    extra = {"tokenizer.json": b"\x00not checked by geofx\n"}
    return artifact.save(path, program, plan, {"loss": 1.5}, extra=extra, config=CONFIG, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_to(tmp_path / "model")


def contents(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


def assert_is(path: Path, program: Program, plan: str) -> None:
    loaded = artifact.load(path)
    assert loaded.plan_json == plan
    assert torch.equal(loaded.program(**loaded.program.example), program(**program.example))
    assert set(contents(path)) == {*FILES, "geofx.json"}


def reseal(path: Path, *names: str) -> None:
    """Make the manifest agree with files that a test has changed."""
    manifest = json.loads((path / "geofx.json").read_bytes())
    for name in names:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (path / "geofx.json").write_text(json.dumps(manifest))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


# --- round trip


def test_everything_comes_back(saved: Path) -> None:
    assert_is(saved, OLD, '{"is": "old"}\n')
    loaded = artifact.load(saved)
    assert loaded.report == {"loss": 1.5}
    assert loaded.config == {"model_type": "llama", "hidden_size": 3}
    assert loaded.files == {"tokenizer.json": b"\x00not checked by geofx\n"}
    assert loaded.program.dynamic_shapes == OLD.dynamic_shapes
    assert artifact.weight_file_bytes(saved) == (saved / "geofx.safetensors").stat().st_size
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


# --- kills and full disks


class Killed(BaseException):
    pass


OPERATIONS = [(os, "rename"), (os, "mkdir"), (os, "fsync"), (os, "chmod"), (os, "unlink"), (io, "open")]
OPERATIONS += [(shutil, "rmtree"), (tensor_file, "save_file")]


class Fault:
    """Makes the ``at``-th operation on the disk fail, and for a kill all that come after it."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.count, self.at, self.error = 0, at, error
        for module, name in OPERATIONS:
            patch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at or (self.count > self.at and isinstance(self.error, Killed)):
                raise self.error
            return real(*args, **kwargs)

        return call


def save_with_fault(path: Path, at: int, error: BaseException) -> int:
    """Tries to replace the old result by the new; returns how many operations that takes."""
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, at, error)
        with contextlib.suppress(
            Killed, ArtifactError if getattr(error, "errno", 0) == errno.EIO else ResourceError
        ):
            save_to(path, NEW, '"new"', overwrite=True)
    return fault.count


@pytest.mark.parametrize(
    "error", [Killed(), OSError(errno.EIO, "broken"), OSError(errno.ENOSPC, "full")], ids=repr
)
def test_rows_97_98_at_every_operation_the_folder_is_the_old_one_or_the_new(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path = save_to(tmp_path / "model")
    total = save_with_fault(path, 10**9, error)
    assert total > 20
    seen = set()
    for at in range(1, total + 1):
        save_to(path, overwrite=True)
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
        save_with_fault(path, at, error)
        assert path.is_dir() or isinstance(error, Killed)
        plan = artifact.load(path).plan_json
        assert_is(path, NEW if plan == '"new"' else OLD, plan)
        seen.add(plan)
    assert seen == {'{"is": "old"}\n', '"new"'}


def write_for_ever(path: Path, started: Any) -> None:
    listing = b'{"files": {"a.txt": 0, "b.txt": 0, "c.txt": 0}}'
    for count in itertools.count():
        body = str(count % 2).encode() * 20_000
        files: dict[str, Any] = {
            "a.txt": body,
            "b.txt": body,
            "c.txt": lambda file, body=body: file.write_bytes(body),
        }
        folder.write_folder(path, {**files, "geofx.json": listing}, overwrite=True)
        started.set()


def test_row_97_sigkill_leaves_a_whole_folder(tmp_path: Path) -> None:
    path = tmp_path / "model"
    fork = multiprocessing.get_context("fork")
    for attempt in range(25):
        started = fork.Event()
        child = fork.Process(target=write_for_ever, args=(path, started))
        child.start()
        assert started.wait(30)
        time.sleep(0.0017 * attempt)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found = contents(folder.real_folder(path))
        assert set(found) == {"a.txt", "b.txt", "c.txt", "geofx.json"}
        assert found["a.txt"] == found["b.txt"] == found["c.txt"]
        assert len(found["a.txt"]) == 20_000
    folder.write_folder(path, {"geofx.json": b"{}"}, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_row_98_a_disk_that_is_too_small_is_told_before_the_work(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 100))
    monkeypatch.setattr(tensor_file, "save_file", None)
    with pytest.raises(ResourceError, match=r"\d{4,} bytes are needed, 100 are free"):
        save_to(saved, NEW, overwrite=True)
    assert contents(saved) == before


def test_row_98_safetensors_on_a_full_disk(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    before = contents(saved)
    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(ResourceError, match="are free"):
        save_to(saved, NEW, overwrite=True)
    assert contents(saved) == before


# --- places


def test_row_99_places_that_cannot_be_written_are_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    places = [tmp_path / "no" / "x", tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("n" * 256)]
    for place in (*places, tmp_path / "loop", tmp_path / "a\0b", Path("/proc/x")):
        with pytest.raises(ArtifactError):
            folder.check_target(place) if "proc" not in str(place) else save_to(place)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ArtifactError, match="read-only"):
        folder.check_target(tmp_path / "x")


@pytest.mark.parametrize("name", ["with space", "ünï-код-模型", "n" * 255, ".hidden", "-dash"])
def test_row_99_odd_names_work(tmp_path: Path, name: str) -> None:
    assert_is(save_to(tmp_path / name), OLD, '{"is": "old"}\n')


def test_row_100_what_geofx_did_not_write_is_never_replaced(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="overwrite=True"):
        save_to(saved, NEW)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        save_to(saved, NEW, overwrite=True)
    (saved / "notes.txt").unlink()
    assert_is(saved, OLD, '{"is": "old"}\n')
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.bin").write_bytes(b"x")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="did not write"):
            save_to(other, overwrite=overwrite)
    (other / "model.bin").unlink()
    assert_is(save_to(other), OLD, '{"is": "old"}\n')


def test_row_100_saving_where_it_was_loaded_from(saved: Path) -> None:
    before = contents(saved)
    loaded = artifact.load(saved)
    save_to(saved, loaded.program, overwrite=True)
    assert contents(saved) == before
    assert torch.equal(loaded.program(**loaded.program.example), OLD(**OLD.example))


def test_row_101_a_link_is_followed_and_kept(tmp_path: Path) -> None:
    for name, make in (("real", True), ("later", False)):
        link = tmp_path / f"link-{name}"
        link.symlink_to(tmp_path / name)
        if make:
            (tmp_path / name).mkdir()
        save_to(link)
        save_to(link, overwrite=True)
        assert link.is_symlink()
        assert_is(tmp_path / name, OLD, '{"is": "old"}\n')
        assert_is(link, OLD, '{"is": "old"}\n')


def test_row_101_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(ArtifactError, match="not a folder"):
            save_to(place, overwrite=True)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_row_102_modes_follow_the_umask_and_are_kept(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = save_to(tmp_path / "model")
        assert {mode(path / name) for name in (*FILES, "geofx.json")} == {0o666 & ~umask}
        assert mode(path) == 0o777 & ~umask
        (path / "geofx.safetensors").chmod(0o640)
        path.chmod(0o750)
        save_to(path, NEW, overwrite=True)
    finally:
        os.umask(before)
    assert mode(path / "geofx.safetensors") == 0o640
    assert mode(path / "plan.json") == 0o666 & ~umask
    assert mode(path) == 0o750


def test_row_108_one_writer_a_folder(tmp_path: Path) -> None:
    def second(file: Path) -> None:
        with pytest.raises(ArtifactError, match=rf"another process is writing.*-{os.getpid()}"):
            folder.write_folder(tmp_path / "model", {"geofx.json": b"{}"})
        file.write_bytes(b"{}")

    folder.write_folder(tmp_path / "model", {"geofx.json": second})
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    key = folder._sibling(tmp_path / "other", "lock")
    key.write_text("left by a process that died")
    folder.write_folder(tmp_path / "other", {"geofx.json": b"{}"})


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


# --- untrusted folders


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [*FILES[:-2], "geofx.safetensors", "geofx.json"])
def test_row_113_a_pickle_under_another_name_is_never_run(saved: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    for data in (pickle.dumps(Canary(canary)), zipped(Canary(canary))):
        (saved / name).write_bytes(data)
        if name != "geofx.json":
            reseal(saved, name)
        with pytest.raises(ArtifactCorruptError, match=name):
            artifact.load(saved)
        assert not canary.exists()
        if name == "geofx.json":
            break
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()


def zipped(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_row_113_a_stray_bin_is_never_opened(saved: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (saved / "pytorch_model.bin").write_bytes(zipped(Canary(canary)))
    (saved / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    os.mkfifo(saved / "fifo.bin")
    artifact.load(saved)
    assert not canary.exists()
    edit(saved / "geofx.json", lambda m: m["files"].update({"pytorch_model.bin": m["files"]["plan.json"]}))
    with pytest.raises(ArtifactCorruptError, match=r"pytorch_model\.bin"):
        artifact.load(saved)


@pytest.mark.parametrize(
    "bomb", ["[" * 10**5, '{"a": NaN}', '{"a": 1, "a": 2}', "9" * 4000, '"' + "x" * 2**24 + '"']
)
@pytest.mark.parametrize("name", ["plan.json", "report.json", "graph.json", "config.json", "geofx.json"])
def test_row_115_json_bombs(saved: Path, name: str, bomb: str) -> None:
    (saved / name).write_text(bomb)
    if name != "geofx.json":
        reseal(saved, name)
    with pytest.raises(ArtifactCorruptError, match=name):
        artifact.load(saved)


PATHS = [
    "../plan.json",
    "/etc/passwd",
    "sub/plan.json",
    "sub/../plan.json",
    "..",
    ".",
    "",
    "a\\b.json",
    "C:\\x.json",
]


@pytest.mark.parametrize(
    "name", [*PATHS, "\\\\host\\x.json", "x\0.json", "Graph.json", "CONFIG.JSON", "~/x.json"]
)
def test_row_117_paths_in_the_manifest(saved: Path, name: str) -> None:
    shutil.copy(saved / "plan.json", saved.parent / "plan.json")
    edit(saved / "geofx.json", lambda m: m["files"].update({name: m["files"]["plan.json"]}))
    with pytest.raises(ArtifactCorruptError, match="manifest"):
        artifact.load(saved)


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "folder", "fifo"])
@pytest.mark.parametrize("name", [*FILES, "geofx.json"])
def test_row_117_links_and_special_files(saved: Path, name: str, kind: str) -> None:
    file, outside = saved / name, saved.parent / "outside"
    file.rename(outside)
    make = {"symlink": lambda: file.symlink_to(outside), "hardlink": lambda: file.hardlink_to(outside)}
    make |= {"folder": file.mkdir, "fifo": lambda: os.mkfifo(file)}
    make[kind]()
    with pytest.raises(ArtifactError, match=name):
        artifact.load(saved)


def test_row_118_a_graph_that_names_a_function_of_the_system(saved: Path) -> None:
    def attack(graph: Any) -> None:
        node = next(node for node in graph["nodes"] if node["op"] == "call_function")
        node.update(target="os.system", args=["touch canary"])

    edit(saved / "graph.json", attack)
    reseal(saved, "graph.json")
    with pytest.raises(ArtifactCorruptError, match=r"'os\.system', which is not a tensor operator"):
        artifact.load(saved)
    assert not Path("canary").exists()


HUGE: dict[str, tuple[list[Any], list[Any]]] = {
    "huge": ([2**40, 2**20], [0, 60]),
    "huge in the data too": ([2**40], [0, 2**42]),
    "overflow": ([2**62, 4], [0, 60]),
    "rank": ([1] * 100_000, [0, 4]),
    "no numbers, huge": ([0, 2**62, 2**62], [0, 0]),
    "negative": ([-1, -15], [0, 60]),
    "float": ([5.0, 3], [0, 60]),
    "overlap": ([5, 3], [4, 64]),
    "backwards": ([5, 3], [60, 0]),
}


@pytest.mark.parametrize("case", HUGE)
def test_rows_114_120_declared_shapes_are_checked_before_memory_is_taken(saved: Path, case: str) -> None:
    shape, offsets = HUGE[case]
    write_header(saved, {"0.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}})
    edit(saved / "geofx.json", lambda m: m.update(tensors={"0.weight": {"dtype": "float32", "shape": shape}}))
    with pytest.raises(ArtifactCorruptError, match=r"geofx\.safetensors"):
        artifact.load(saved)


def write_header(saved: Path, header: Any, length: int | None = None, data: bytes = b"\0" * 60) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (saved / "geofx.safetensors").write_bytes((length or len(text)).to_bytes(8, "little") + text + data)
    reseal(saved, "geofx.safetensors")


def test_row_114_headers_that_lie(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = '{"dtype": "F32", "shape": [15], "data_offsets": [0, 60]}'
    cases = [
        (f'{{"a": {entry}, "a": {entry}}}', None),
        ("{}", 2**62),
        ("[]", None),
        ('{"a": 1}', None),
        ("{}", 2**64 - 1),
    ]
    for text, length in cases:
        write_header(saved, text, length)
        with pytest.raises(ArtifactCorruptError, match=r"geofx\.safetensors"):
            artifact.load(saved)
    monkeypatch.setattr(tensor_file, "MAX_TENSORS", 10)
    many = {str(index): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(11)}
    write_header(saved, many, data=b"")
    with pytest.raises(ArtifactCorruptError, match="11 tensors"):
        artifact.load(saved)


def test_row_120_a_graph_of_very_many_nodes_is_refused_by_size(saved: Path) -> None:
    edit(saved / "graph.json", lambda graph: graph.update(nodes=[copy.copy(graph["nodes"][0])] * 300_000))
    reseal(saved, "graph.json")
    with pytest.raises(ArtifactCorruptError, match="are allowed"):
        artifact.load(saved)


@pytest.fixture(autouse=True)
def _nothing_left_in_the_working_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any
) -> Iterator[None]:
    place = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(place)
    yield
    assert not list(place.iterdir())
