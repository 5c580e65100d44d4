"""A folder is written whole or not at all, under kills, on full disks and in odd places."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import stat
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from saved_results import FILES, NEW, OLD, assert_is, contents, save_to

from geofx import artifact, folder, tensor_file
from geofx.errors import (
    ArtifactError,
    ResourceError,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_to(tmp_path / "model")


# --- kills and full disks


class Killed(BaseException):
    pass


OPERATIONS = [
    (os, "rename"),
    (os, "mkdir"),
    (os, "fsync"),
    (os, "chmod"),
    (os, "unlink"),
    (io, "open"),
    (os, "replace"),
]
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


@pytest.mark.parametrize(
    "error", [Killed(), OSError(errno.EIO, "broken"), OSError(errno.ENOSPC, "full")], ids=repr
)
def test_rows_97_98_at_every_operation_a_file_is_the_old_one_or_the_new(
    tmp_path: Path, error: BaseException
) -> None:
    file, seen = tmp_path / "plan.json", set()
    for at in itertools.count(1):
        folder.write_file(file, "old")
        assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, at, error)
            with contextlib.suppress(Killed, ArtifactError, ResourceError):
                folder.write_file(file, "new")
        seen.add(file.read_text())
        if fault.count < at:
            break
    assert seen == {"old", "new"}
    assert at > 4


def test_rows_101_102_a_file_keeps_its_link_and_its_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    folder.write_file(link, "first")
    real.chmod(0o640)
    folder.write_file(link, "second")
    assert link.is_symlink()
    assert (real.read_text(), mode(real)) == ("second", 0o640)
    os.umask(before := os.umask(0))
    folder.write_file(tmp_path / "new.json", "new")
    assert mode(tmp_path / "new.json") == 0o666 & ~before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.json", "new.json", "real.json"]


def test_row_101_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    folder.write_file(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_file_in_a_folder_that_is_read_only_is_written_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.json"
    file.write_text("old")
    monkeypatch.setattr(os, "access", lambda path, how: Path(path) == file)
    folder.write_file(file, "new")
    assert file.read_text() == "new"


def test_what_the_system_refuses_is_not_called_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the system refuses: File name too long"):
        folder.write_file(tmp_path / ("n" * 300), "text")


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
    assert torch.equal(loaded.program(**OLD.example), OLD(**OLD.example))


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
