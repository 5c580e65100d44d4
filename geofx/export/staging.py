"""Write beside the target, publish by one rename: a reader sees the old file or the new one."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from geofx.errors import ArtifactError, ConfigError, ExportError, ResourceError

logger = logging.getLogger(__name__)

LOCK = ".lock"


def target_file(path: str | Path, suffix: str, *, own_folder: bool = False) -> Path:
    """``path`` with links followed, checked before any work is done; its ``own_folder`` is made if need be.

    Raises:
        ConfigError: it has not the ``suffix``.
        ArtifactError: it is a folder or no regular file, or its folder does not exist or cannot be made.
    """
    target = Path(path).expanduser().resolve()
    if target.suffix != suffix:
        raise ConfigError(
            f"{target.name!r} does not end in {suffix}", fix=f"pass a path such as model{suffix}"
        )
    if target.exists() and not target.is_file():
        raise ArtifactError("the target is not a regular file", where=target.name, fix="pass another path")
    if own_folder and target.parent.parent.is_dir():
        with contextlib.suppress(OSError):
            target.parent.mkdir(exist_ok=True)
    if not target.parent.is_dir():
        raise ArtifactError(
            "the target's folder does not exist", where=target.parent.name, fix="create it first"
        )
    return target


@contextmanager
def staging(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A scratch folder on the target's disk, removed at the end, as are those of processes that died.

    Raises:
        ResourceError: less than ``needed_bytes`` is free, or the disk became full.
        ExportError: the folder cannot be written.
    """
    try:
        _clear_leftovers(target.parent)
        _require_space(target, needed_bytes)
        with _scratch(target.parent) as folder:
            yield folder
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _too_small(target, needed_bytes) from error
        raise ExportError(f"cannot write: {error.strerror or error}", where=target.name) from error


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A new folder, locked for as long as it exists; the kernel drops the lock of a process that died."""
    folder = parent / f".tmp-geofx-{secrets.token_hex(8)}.export"
    with _locked(folder.with_name(folder.name + LOCK)):
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with FileLock(file, timeout=0):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _clear_leftovers(parent: Path) -> None:
    for lock in parent.glob(f".tmp-geofx-*.export{LOCK}"):
        with contextlib.suppress(Timeout), _locked(lock):
            logger.info("an interrupted export is cleared: %s", lock.name)
            shutil.rmtree(lock.with_name(lock.name.removesuffix(LOCK)), ignore_errors=True)


def _require_space(target: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(target.parent).free < needed_bytes:
        raise _too_small(target, needed_bytes)


def _too_small(target: Path, needed_bytes: int) -> ResourceError:
    free = shutil.disk_usage(target.parent).free
    what = f"the disk is too small: {needed_bytes / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
    return ResourceError(what, where=target.name, fix="free some space; nothing was published")
