"""Exported decoders side by side: prompts read and tokens written per second, in turns, and memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import psutil

from geofx.errors import ConfigError, ExportError
from geofx.export.decoder_session import DecoderSession
from geofx.exported_decoder import ExportedDecoder
from geofx.progress import Progress, log_progress
from geofx.stages import peak_memory_bytes

FOLD = 1000
"""Ids of prompts repeat after so many."""


@dataclass(frozen=True)
class Load:
    """What is run: ``rows`` prompts of ``prompt_tokens``, each written on by ``new_tokens``, greedily.

    Raises:
        ConfigError: one of them is not a whole number, or too small: the first of the new tokens is not timed
            with the others, so that there are 2 at least.
    """

    rows: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 64

    def __post_init__(self) -> None:
        _require_count("rows", self.rows, 1)
        _require_count("prompt_tokens", self.prompt_tokens, 1)
        _require_count("new_tokens", self.new_tokens, 2)

    def run(self, session: DecoderSession, vocabulary: int) -> tuple[float, float]:
        """Seconds until the first token, and of the others; the model may not end the text."""
        count = self.rows * self.prompt_tokens
        ids = (3 + np.arange(count) % min(FOLD, vocabulary - 3)).reshape(self.rows, self.prompt_tokens)
        start = time.perf_counter()
        last = session.start(ids).argmax(1)
        first_s = time.perf_counter() - start
        for _ in range(self.new_tokens - 1):
            last = session.step(last).argmax(1)
        return first_s, time.perf_counter() - start - first_s


@dataclass(frozen=True)
class Spread:
    """The median of some runs, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
        return cls(float(middle), float(low), float(high))


@dataclass(frozen=True)
class DecoderFigures:
    """One decoder among those that were run in turns.

    Attributes:
        size_bytes: of the ONNX file and its data.
        memory_bytes: that a process needs beyond what it takes to start, at its peak.
        first_s: seconds until the first token.
        prefill_per_s: prompt tokens per second.
        decode_per_s: tokens per second after the first.
        prefill_ratio: median over the turns of the rate over that of the first decoder named.
        decode_ratio: likewise.
    """

    size_bytes: int
    memory_bytes: int
    first_s: Spread
    prefill_per_s: Spread
    decode_per_s: Spread
    prefill_ratio: float
    decode_ratio: float


def bench_decoders(
    folders: Mapping[str, Path],
    load: Load | None = None,
    *,
    rounds: int = 10,
    threads: int = 0,
    progress: Progress = log_progress,
) -> dict[str, DecoderFigures]:
    """Run every decoder in turns, after one turn that does not count; those are folders that were exported.

    Raises:
        ArtifactError: one of them is not.
        ConfigError: there is none, the texts are longer than a model reads, or a count is too small.
        ExportError: one does not run.
    """
    wanted = load or Load()
    _require_count("decoders", len(folders), 1)
    _require_count("rounds", rounds, 1)
    _require_count("threads", threads, 0)
    decoders = {name: ExportedDecoder.of(folder) for name, folder in folders.items()}
    for decoder in decoders.values():
        decoder.require_room(wanted.prompt_tokens, wanted.new_tokens)
    memory = {name: _memory_bytes(folder, wanted, threads) for name, folder in folders.items()}
    sessions = {name: DecoderSession(decoder.file, threads=threads) for name, decoder in decoders.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in folders}
    for turn in range(rounds + 1):
        progress("run decoders", turn, rounds + 1)
        for name, session in sessions.items():
            found = wanted.run(session, decoders[name].vocabulary)
            if turn:
                times[name].append(found)
    progress("run decoders", rounds + 1, rounds + 1)
    first = next(iter(times.values()))
    return {
        name: _figures(decoders[name].size_bytes, memory[name], wanted, found, first)
        for name, found in times.items()
    }


def _figures(
    size_bytes: int,
    memory_bytes: int,
    load: Load,
    times: Sequence[tuple[float, float]],
    against: Sequence[tuple[float, float]],
) -> DecoderFigures:
    prompts, later = load.rows * load.prompt_tokens, load.rows * (load.new_tokens - 1)
    firsts, rests = zip(*times, strict=True)
    ratios = [
        statistics.median(other[part] / own[part] for own, other in zip(times, against, strict=True))
        for part in (0, 1)
    ]
    return DecoderFigures(
        size_bytes=size_bytes,
        memory_bytes=memory_bytes,
        first_s=Spread.of(firsts),
        prefill_per_s=Spread.of([prompts / seconds for seconds in firsts]),
        decode_per_s=Spread.of([later / seconds for seconds in rests]),
        prefill_ratio=ratios[0],
        decode_ratio=ratios[1],
    )


def _require_count(name: str, count: int, least: int) -> None:
    """Raises ConfigError unless ``count`` is a whole number, ``least`` or more."""
    if not isinstance(count, int) or count < least:
        raise ConfigError(f"{name} {count!r}", where="decoder bench", fix=f"give {least} or more")


def _memory_bytes(folder: Path, load: Load, threads: int) -> int:
    """What a process of its own needs at most to do it once, beyond what it takes to start.

    Raises:
        ExportError: it does not come to its end.
    """
    place = Path(folder).expanduser().resolve()
    command = [sys.executable, "-m", "geofx.decoder_bench", str(place), *map(str, (threads, *astuple(load)))]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=root)  # noqa: S603
    found = done.stdout.splitlines()[-1:]
    if done.returncode or not found:
        said = "".join(done.stderr.strip().splitlines()[-1:]) or f"exit status {done.returncode}"
        what = f"the decoder does not run in a process of its own: {said[:300]}"
        fix = "see what geofx generate says of it; free memory if it was killed"
        raise ExportError(what, where=place.name, fix=fix)
    return int(found[0])


def _alone(folder: str, threads: str, *load: str) -> None:
    """Say in the last line how far memory rises; nothing is loaded but the decoder."""
    decoder, before = ExportedDecoder.of(folder), psutil.Process().memory_info().rss
    Load(*map(int, load)).run(DecoderSession(decoder.file, threads=int(threads)), decoder.vocabulary)
    sys.stdout.write(f"{peak_memory_bytes() - before}\n")


if __name__ == "__main__":
    _alone(*sys.argv[1:])
