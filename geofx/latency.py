"""How long calls take, measured in turns so that a busy machine is unfair to none of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from geofx.progress import Progress, log_progress

LIMIT_S, LEAST_ROUNDS = 30.0, 3
"""Calls that take very long are called fewer times."""


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], rounds: int = 7, progress: Progress = log_progress
) -> dict[str, float]:
    """Median seconds of each call, of its `interleaved_times`."""
    return {
        name: statistics.median(found) for name, found in interleaved_times(calls, rounds, progress).items()
    }


def interleaved_times(
    calls: Mapping[str, Callable[[], object]], rounds: int, progress: Progress = log_progress
) -> dict[str, list[float]]:
    """Seconds of each call in ``rounds`` turns of one call each, after one unmeasured turn.

    Once `LIMIT_S` have passed, `LEAST_ROUNDS` are enough.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    progress("measure latency", 0, rounds)
    for call in calls.values():
        call()
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - begun > LIMIT_S:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        progress("measure latency", done + 1, rounds)
    return times
