"""Results on stdout, everything else on stderr; progress as bars, or as lines where there is no terminal."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from geofx.errors import GeofxError
from geofx.report_rows import plain

LINE_INTERVAL_S = 10.0
"""Without a terminal, a stage says how far it is at most this often."""

START_S = 1.0
"""Without a terminal, a stage says that it has started once it has lasted so long."""


def stderr_console() -> Console:
    """A console on the present stderr."""
    return Console(stderr=True, highlight=False)


class ConsoleProgress:
    """A `geofx.progress.Progress` that is also a context manager.

    On a terminal every stage is a bar with the time it still needs; elsewhere a line now and then.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or stderr_console()
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lines = ProgressLines(self._console)

    def __enter__(self) -> ConsoleProgress:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Bars(TextColumn("{task.description}"), *columns, console=self._console)
            self._bars.start()
        else:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        else:
            self._lines.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``stage`` has come to ``done`` of ``total``."""
        if total == 0:
            return
        if self._bars is not None:
            self._draw(self._bars, stage, done, total)
        else:
            self._lines(stage, done, total)

    @contextlib.contextmanager
    def step(self, stage: str) -> Iterator[None]:
        """A stage of one step, which can only be said to have begun and ended."""
        self(stage, 0, 1)
        yield
        self(stage, 1, 1)

    def _draw(self, bars: Bars, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = bars.add_task(plain(stage), total=total)
        elif done == 0:
            bars.reset(self._tasks[stage], total=total)
        bars.update(self._tasks[stage], completed=done, total=total)


@dataclass
class _Running:
    """A stage that goes on: where and when it began, and when it was last heard of."""

    first: int
    began: float
    said: float | None = None


class ProgressLines:
    """Stages as lines: that one has started once it lasts, how far it is now and then, that it is done.

    One that comes again and again, and is short, is said to be done the first time only.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: dict[str, _Running] = {}
        self._known: set[str] = set()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin to look for stages that have lasted a while: one of a single step says nothing of itself."""
        self._watcher.start()

    def stop(self) -> None:
        """No more lines."""
        self._ended.set()
        self._watcher.join()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note that ``stage`` has come to ``done`` of ``total``."""
        now = time.monotonic()
        with self._lock:
            if done == 0 or stage not in self._running:
                self._running[stage] = _Running(done, now)
            running = self._running[stage]
            if done == total:
                del self._running[stage]
                if running.said is not None or stage not in self._known:
                    self._say(stage, f"done in {now - running.began:.1f} s")
                self._known.add(stage)
            elif done > running.first and now - (running.said or running.began) >= LINE_INTERVAL_S:
                running.said = now
                left = (now - running.began) / (done - running.first) * (total - done)
                self._say(stage, f"{done} of {total}, about {left:.0f} s left")

    def _watch(self) -> None:
        while not self._ended.wait(START_S / 4):
            now = time.monotonic()
            with self._lock:
                for stage, running in self._running.items():
                    if running.said is None and now - running.began >= START_S:
                        running.said = now
                        self._say(stage, "started")

    def _say(self, stage: str, what: str) -> None:
        self._console.print(f"{plain(stage)}: {what}", markup=False)


@contextlib.contextmanager
def working() -> Iterator[ConsoleProgress]:
    """Work with progress shown; whatever writes to stdout meanwhile, in Python or in C, lands on stderr."""
    with _stdout_on_stderr(), ConsoleProgress(stderr_console()) as progress:
        yield progress


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def show(*parts: RenderableType) -> None:
    """Print results on stdout; text as it is, lines not wrapped."""
    console = Console(highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(Text(_lines(part)), soft_wrap=True)
        else:
            console.print(part)


def show_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def show_error(error: GeofxError) -> None:
    """What, where and what to do, on stderr."""
    lines = [("error", error.what), ("where", error.where), ("fix", error.fix)]
    _write_error("\n".join(f"{label}: {_lines(text)}" for label, text in lines if text))


def show_usage_error(message: str) -> None:
    """A wrong command line, on stderr."""
    _write_error(f"error: {_lines(message)}\nfix: see geofx --help, or geofx COMMAND --help")


def set_up_streams(verbose: bool) -> None:
    """Send logs and warnings to stderr, and let no character stop a stream."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")
    logger = logging.getLogger("geofx")
    logger.handlers[:] = [RichHandler(console=Console(stderr=True), show_path=False)]
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    logger.propagate = False
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        _silence_bars()


def _silence_bars() -> None:
    """Bars of libraries would run through ours; tqdm has read its environment before this runs."""
    tqdm: Any = sys.modules.get("tqdm")
    if tqdm is not None:
        tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)


def _lines(text: str) -> str:
    return "\n".join(plain(line) for line in text.splitlines())


def _write_error(text: str) -> None:
    sys.stderr.write(text + "\n")
