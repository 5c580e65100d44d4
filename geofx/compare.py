"""geofx.compare: analyze a model once, and set every format and recipe side by side on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from geofx.api import analyze
from geofx.compare_run import ROUNDS, compare_analysis
from geofx.compare_subjects import Names, listed, reads_directions
from geofx.comparison import Comparison, Engine
from geofx.recipes import Recipe


def compare(
    model: nn.Module | ExportedProgram,
    calibration: Any,
    keep: float | Iterable[float] = 0.8,
    *,
    formats: Names = "all",
    recipes: Names | Iterable[Recipe] = "all",
    latency: Iterable[Engine] = ("torch",),
    cache: str | Path | None = None,
    rounds: int = ROUNDS,
    **settings: Any,
) -> Comparison:
    """Each format and recipe at each share ``keep`` of the bytes of what it rewrites, on the same data.

    Args:
        model: as for `analyze`, which takes ``settings`` too (tokenizer, holdout, loss, seed, ...).
        calibration: what the methods are fitted on.
        keep: one share or several; several make the lines of the chart.
        formats: names of formats, ``"all"`` or ``"none"``.
        recipes: names, `Recipe` values, ``"all"`` or ``"none"``.
        latency: engines to time each result in, in turns with the original: ``"torch"``, ``"onnx"``.
        cache: folder that keeps what is done; by default in the user's cache folder.
        rounds: calls that a median latency is of.

    Raises:
        CaptureError, CalibrationError, ConfigError: as their messages say.
    """
    formats, recipes = listed(formats), listed(recipes)  # iterators are read twice below
    settings.setdefault("directions", reads_directions(formats, recipes))
    analysis = analyze(model, calibration, **settings)
    return compare_analysis(
        analysis, keep, formats=formats, recipes=recipes, latency=latency, cache=cache, rounds=rounds
    )
