"""Folders from strangers: nothing in a file is ever run, and no number in one takes memory."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_results import FILES, edit, reseal, save_to

from geofx import artifact, tensor_file
from geofx.errors import (
    ArtifactCorruptError,
    ArtifactError,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_to(tmp_path / "model")


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
