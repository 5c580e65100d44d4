"""How long each stage took and the memory that the process had needed by its end."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from geofx.report import Stage

STATUS = Path("/proc/self/status")
"""Where Linux says what a process takes up."""


class Stages:
    """Collects a `Stage` per ``with stages("name"):`` block."""

    def __init__(self) -> None:
        self.done: list[Stage] = []
        self._is_inside = False

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one block, recorded unless it fails; what followed an earlier ``name`` is forgotten.

        A block within another one is a part of that, and has no stage of its own.
        """
        if self._is_inside:
            yield
            return
        names = [stage.name for stage in self.done]
        if name in names:
            del self.done[names.index(name) :]
        start, self._is_inside = time.perf_counter(), True
        try:
            yield
        finally:
            self._is_inside = False
        self.done.append(Stage(name, time.perf_counter() - start, peak_memory_bytes()))


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far; the present one where the system keeps no peak."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().rss)
    own = _peak_since_exec()
    if own is not None:
        return own
    import resource  # a POSIX module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_since_exec() -> int | None:
    """What Linux says; ``ru_maxrss`` is there no less than the parent's when it started this process."""
    if not STATUS.is_file():
        return None
    found = re.search(r"^VmHWM:\s*(\d+) kB$", STATUS.read_text("utf-8", "replace"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
