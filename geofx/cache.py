"""Results on disk, each written once it is known: what was interrupted goes on from there."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from geofx import strict_json
from geofx.digest import digest
from geofx.errors import ArtifactError, GeofxError
from geofx.tensor_file import describe, read_tensors, storable, write_tensors

logger = logging.getLogger(__name__)


def default_folder(kind: str = "compare") -> Path:
    """Where comparisons, or ``"latency"``, are kept: ``geofx/compare`` in this system's cache folder."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "geofx" / kind


@dataclass(frozen=True)
class Cache:
    """Entries by key: a JSON value each, with tensors where there are any; all checked by hash.

    An entry that is damaged counts as missing. Writing replaces whole files, so a reader sees all or nothing.
    """

    folder: Path

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"the cache folder cannot be made: {error.strerror}"
            raise ArtifactError(what, where=str(self.folder), fix="give another folder") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            what = "the cache folder is read-only"
            raise ArtifactError(what, where=str(self.folder), fix="give another folder")

    @contextmanager
    def claimed(self, key: str) -> Iterator[None]:
        """One process at a time works on ``key``; a second waits and then finds what the first wrote."""
        with FileLock(self.folder / f"{key[:32]}.lock"):
            yield

    def read(self, key: str) -> Any | None:
        """The value at ``key``, or None."""
        entry = self._entry(key)
        return None if entry is None else entry["value"]

    def read_tensors(self, key: str) -> dict[str, Tensor] | None:
        """The tensors at ``key``, or None where they were dropped or are damaged."""
        entry = self._entry(key)
        file = None if entry is None or entry["tensors"] is None else self._tensors(key, entry["sha256"])
        if entry is None or file is None or not file.exists():
            return None
        try:
            if hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
                raise ValueError("its hash is another")
            return read_tensors(file, entry["tensors"])
        except (OSError, ValueError, GeofxError) as error:
            logger.warning("kept tensors are damaged, and made again: %s", error)
            return None

    def write(self, key: str, value: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Put a JSON value, and tensors, at ``key``; what stands there is whole until all is written.

        Raises:
            ArtifactError: the cache cannot be written.
        """
        try:
            entry: dict[str, Any] = {"value": value, "tensors": None, "sha256": ""}
            if tensors is not None:
                ready = storable(tensors)
                with self._scratch(key) as scratch:
                    write_tensors(scratch, ready)
                    found = hashlib.sha256(scratch.read_bytes()).hexdigest()
                    scratch.replace(self._tensors(key, found))
                entry |= {"tensors": describe(ready), "sha256": found}
            text = strict_json.dumps({"entry": entry, "sha256": digest(entry)})
            with self._scratch(key) as scratch:
                scratch.write_text(text, encoding="utf-8")
                scratch.replace(self._json(key))
            self._drop_tensors(key, but=str(entry["sha256"]))
        except OSError as error:
            what = f"the cache cannot be written: {error.strerror}"
            raise ArtifactError(
                what, where=str(self.folder), fix="free some disk, or give another folder"
            ) from error

    def drop_tensors(self, keys: Iterable[str]) -> None:
        """Forget the tensors at ``keys``; their values stay."""
        for key in keys:
            self._drop_tensors(key)

    def _drop_tensors(self, key: str, but: str = "") -> None:
        for file in self.folder.glob(f"{key}.*.safetensors"):
            if file != self._tensors(key, but):
                file.unlink(missing_ok=True)

    def _entry(self, key: str) -> dict[str, Any] | None:
        try:
            found = strict_json.parse(self._json(key).read_bytes())
            if found["sha256"] != digest(found["entry"]):
                raise ValueError("its hash is another")
            entry: dict[str, Any] = found["entry"]
            return entry
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            logger.warning("a cached entry is computed again: %s", error)
            return None

    def _json(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _tensors(self, key: str, content: str) -> Path:
        return self.folder / f"{key}.{content[:16]}.safetensors"

    @contextmanager
    def _scratch(self, key: str) -> Iterator[Path]:
        """A file to write aside, gone at the end unless it was moved."""
        scratch = self.folder / f"{key}.{os.getpid()}.tmp"
        try:
            yield scratch
        finally:
            scratch.unlink(missing_ok=True)
