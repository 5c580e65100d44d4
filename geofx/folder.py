"""Write a folder, or a file, whole or not at all: staged beside the target, synced, renamed into place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from filelock import FileLock, Timeout

from geofx import strict_json
from geofx.errors import ArtifactError, ConfigError, ResourceError

logger = logging.getLogger(__name__)

MANIFEST = "geofx.json"
Content: TypeAlias = bytes | Callable[[Path], None]
"""A file's bytes, or what writes them to the path given."""

_WAIT_S = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_target(path: str | Path, *, overwrite: bool = False) -> Path:
    """The real path that a folder at ``path`` would have, links followed; call it before long work.

    Raises:
        ArtifactError: it cannot be written, is no folder, or holds something that must not be replaced.
    """
    with _typed_errors(Path(path), 0):
        target = _resolve(path)
        if not target.parent.is_dir():
            raise ArtifactError("the parent folder does not exist", where=str(path), fix="create it first")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise ArtifactError("the parent folder is read-only", where=str(path), fix="choose another place")
        with contextlib.suppress(FileNotFoundError):
            _check_replaceable(target, target.stat().st_mode, overwrite)
    return target


def check_files(*paths: Path | None) -> None:
    """What can be checked before long work; None is no path.

    Raises:
        ArtifactError: `write_file` would raise it.
        ConfigError: two of them are one file.
    """
    given = [path for path in paths if path is not None]
    for path in given:
        with _typed_errors(path, 0):
            _check_file(path)
    if len({_resolve(path) for path in given}) < len(given):
        names = " and ".join(path.name for path in given)
        raise ConfigError(f"{names} are one file", where=str(given[0]), fix="give two files")


def _check_file(path: Path) -> None:
    target = _resolve(path)
    if not target.parent.is_dir():
        raise ArtifactError("the parent folder does not exist", where=str(path), fix="create it first")
    if target.is_dir():
        raise ArtifactError("the target is a folder", where=str(path), fix="give the path of a file")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ArtifactError("the target cannot be written", where=str(path), fix="choose another place")


def write_file(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, all or nothing; a link stays a link, and a file keeps its mode.

    Pipes and devices, and a file in a folder that is read-only, are written to as they stand.

    Raises:
        ArtifactError: the file cannot be written.
        ResourceError: the disk is full.
    """
    check_files(path)
    place, target, content = path.expanduser(), _resolve(path), text.encode()
    with _typed_errors(target, len(content)):
        special = place.exists() and not place.is_file()
        if special or not os.access(target.parent, os.W_OK | os.X_OK):
            place.write_bytes(content)
            return
        with _only_writer(target, _WAIT_S):
            for leftover in target.parent.glob(_sibling(target, "file.*").name):
                leftover.unlink(missing_ok=True)
            _replace_file(target, content)


def _replace_file(target: Path, content: bytes) -> None:
    staging = _sibling(target, f"file.{_owner()}")
    try:
        staging.write_bytes(content)
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, staging)
        _sync(staging)
        staging.replace(target)
        _sync(target.parent)
    finally:
        staging.unlink(missing_ok=True)


def write_folder(
    path: str | Path, files: Mapping[str, Content], *, overwrite: bool = False, needed_bytes: int = 0
) -> Path:
    """Make the folder ``path`` hold exactly ``files``, written in their order; on failure it is as it was.

    Args:
        path: the folder; a link to one stays a link.
        files: plain names and contents; one that is called may read those before it beside its own path.
        overwrite: replace a folder that geofx wrote, and nothing else.
        needed_bytes: what the contents that are called will take.

    Raises:
        ArtifactError: see `check_target`; or another process is writing the same folder.
        ResourceError: the disk is too small.
    """
    target = check_target(path, overwrite=overwrite)
    needed = needed_bytes + sum(len(content) for content in files.values() if isinstance(content, bytes))
    with _typed_errors(target, needed), _only_writer(target, 0.0):
        _clear_leftovers(target)
        check_target(target, overwrite=overwrite)
        if shutil.disk_usage(target.parent).free < needed:
            raise _disk_full(target, needed)
        staging = _sibling(target, f"new.{_owner()}")
        try:
            _fill(staging, files, target)
            _swap(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return Path(path)


def real_folder(path: str | Path) -> Path:
    """The folder at ``path``, links followed; the old one is put back where a kill came between two renames.

    Raises:
        ArtifactError: there is none.
    """
    with _typed_errors(Path(path), 0):
        target = _resolve(path)
        if not target.exists() and _sibling(target, "old").exists():
            with _only_writer(target, _WAIT_S):
                _clear_leftovers(target)
    if not target.is_dir():
        raise ArtifactError("there is no folder", where=str(path), fix="pass a folder that geofx saved")
    return target


def _resolve(path: str | Path) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (ValueError, RuntimeError) as error:  # a NUL, or links in a circle
        raise ArtifactError(
            f"not a usable path: {error}", where=str(path)[:300], fix="choose another"
        ) from error


def _check_replaceable(target: Path, mode: int, overwrite: bool) -> None:
    if not stat.S_ISDIR(mode):
        raise ArtifactError("the target is not a folder", where=str(target), fix="choose another path")
    names = {entry.name for entry in target.iterdir()}
    if not names:
        return
    if MANIFEST not in names:
        raise ArtifactError(
            "the folder holds files that geofx did not write", where=str(target), fix="choose another"
        )
    if not overwrite:
        raise ArtifactError(
            "the folder holds a saved model", where=str(target), fix="pass overwrite=True, or --overwrite"
        )
    strange = sorted(names - {MANIFEST} - _names_in(target / MANIFEST))
    if strange:
        what = f"the folder also holds {strange[0]!r}, which geofx did not write"
        raise ArtifactError(what, where=str(target), fix="move it away first")


def _names_in(manifest: Path) -> set[str]:
    try:
        return set(strict_json.loads(manifest.read_bytes(), MANIFEST)["files"])
    except (ArtifactError, LookupError, TypeError):
        return set()


def _fill(staging: Path, files: Mapping[str, Content], target: Path) -> None:
    staging.mkdir()
    for name, content in files.items():
        file = staging / name
        file.touch()
        mode = stat.S_IMODE(file.stat().st_mode)  # 0666 & ~umask; safetensors makes it 0600
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            content(file)
        with contextlib.suppress(FileNotFoundError):
            mode = stat.S_IMODE((target / name).stat().st_mode)
        file.chmod(mode)
        _sync(file)
    with contextlib.suppress(FileNotFoundError):
        shutil.copymode(target, staging)
    _sync(staging)


def _swap(staging: Path, target: Path) -> None:
    """Two renames, as no folder is renamed onto another; `_clear_leftovers` undoes a kill between them."""
    old = _sibling(target, "old")
    if target.exists():
        target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(target: Path) -> None:
    old = _sibling(target, "old")
    if old.exists() and not target.exists():
        logger.warning("an interrupted save is undone: %s", target.name)
        old.rename(target)
    for leftover in (old, *target.parent.glob(_sibling(target, "new.*").name)):
        shutil.rmtree(leftover, ignore_errors=True)


def _sibling(target: Path, suffix: str) -> Path:
    key = hashlib.sha256(target.name.encode(errors="surrogateescape")).hexdigest()[:16]
    return target.parent / f".tmp-geofx-{key}.{suffix}"


def _owner() -> str:
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64]
    return f"{host}-{os.getpid()}"


@contextmanager
def _only_writer(target: Path, wait_s: float) -> Iterator[None]:
    """The kernel drops the lock of a process that died, so none is ever stale."""
    lock = FileLock(_sibling(target, "lock"), timeout=wait_s)
    try:
        held = lock.acquire()
    except Timeout as error:
        writers = target.parent.glob(_sibling(target, "new.*").name)
        names = ", ".join(entry.name.split(".new.")[-1] for entry in writers) or "just started"
        what = f"another process is writing it ({names})"
        raise ArtifactError(what, where=str(target), fix="wait for it to end") from error
    with held:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()


@contextmanager
def _typed_errors(target: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(target, needed) from error
        what = f"the system refuses: {error.strerror or error}"
        raise ArtifactError(what, where=str(target)[:300], fix="choose another place") from error


def _disk_full(target: Path, needed: int) -> ResourceError:
    free = shutil.disk_usage(target.parent).free
    what = f"the disk is too small: {needed} bytes are needed, {free} are free"
    return ResourceError(what, where=str(target), fix="free some space; nothing was changed")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
