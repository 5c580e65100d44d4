"""Results on stdout, everything else on stderr; progress as bars, or as lines where there is no terminal."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import IO, Any

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
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}

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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``stage`` has come to ``done`` of ``total``."""
        if self._bars is not None:
            self._draw(self._bars, stage, done, total)
        else:
            self._say(stage, done, total)

    @contextlib.contextmanager
    def step(self, stage: str) -> Iterator[None]:
        """A stage of one step, which can only be said to have begun and ended."""
        self(stage, 0, 1)
        yield
        self(stage, 1, 1)

    def _draw(self, bars: Bars, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = bars.add_task(plain(stage), total=total or None)
        elif done == 0:
            bars.reset(self._tasks[stage], total=total or None)
        bars.update(self._tasks[stage], completed=done, total=total or None)

    def _say(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == 0:
            self._started[stage] = self._said[stage] = now
            self._console.print(f"{plain(stage)}: started", markup=False)
        elif done == total:
            seconds = now - self._started.get(stage, now)
            self._console.print(f"{plain(stage)}: done in {seconds:.1f} s", markup=False)
        elif now - self._said.get(stage, 0.0) >= LINE_INTERVAL_S:
            self._said[stage] = now
            left = (now - self._started.get(stage, now)) / done * (total - done)
            self._console.print(f"{plain(stage)}: {done} of {total}, about {left:.0f} s left", markup=False)


@contextlib.contextmanager
def working(quiet: bool = False) -> Iterator[ConsoleProgress]:
    """Work with progress shown; whatever writes to stdout meanwhile, in Python or in C, lands on stderr."""
    console = Console(stderr=True, quiet=True) if quiet else stderr_console()
    with _stdout_on_stderr(), ConsoleProgress(console) as progress:
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


def set_up_streams(verbose: bool, stream: IO[str] | None = None) -> None:
    """Send logs and warnings to stderr, and let no character stop a stream."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")
    logger = logging.getLogger("geofx")
    logger.handlers[:] = [RichHandler(console=Console(file=stream, stderr=stream is None), show_path=False)]
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
