"""Small comparisons, and what to look up in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models

from geofx.analysis import Analysis
from geofx.compare_run import compare_analysis
from geofx.comparison import Comparison, Figures, Row

BATCHES = [tiny_models.example("mlp", 64, seed=seed) for seed in range(4)]
BLOCKS = 32 * 64 + 64 * 64 + 64 * 10
BIASES = 64 + 64 + 10


def run(analysis: Analysis, folder: Path, keep: Any = 0.8, **settings: Any) -> Comparison:
    settings = {"formats": ["low_rank"], "recipes": "none", "latency": (), **settings}
    return compare_analysis(analysis, keep, cache=folder, **settings)


def row_of(comparison: Comparison, name: str, allocation: str = "uniform", keep: float = 0.8) -> Row:
    (found,) = (
        row for row in comparison.rows if (row.name, row.allocation, row.keep) == (name, allocation, keep)
    )
    return found


def figures_of(*arguments: Any) -> Figures:
    figures = row_of(*arguments).figures
    assert figures is not None
    return figures
