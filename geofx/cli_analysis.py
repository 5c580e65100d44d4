"""The analysis that a command works on: a new one, one that was kept, or one to keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from geofx import cli_options as options
from geofx.analysis import Analysis
from geofx.api import analyze, load_analysis
from geofx.charts import check_chart
from geofx.cli_console import ConsoleProgress
from geofx.folder import check_files, check_target
from geofx.sources import Source, tokenizer_files


def check_written(output: Path | None, chart: Path | None, analysis: Path | None) -> bool:
    """Whether the analysis is there already; raises where it, or a file, could not be written later."""
    check_files(output, chart)
    if chart is not None:
        check_chart(chart)
    if analysis is None or analysis.exists():
        return analysis is not None
    check_target(analysis)
    return False


def new_analysis(
    source: Source,
    text: str | None,
    data: str | None,
    holdout: str | None,
    mode: options.Mode,
    tokens: int,
    length: int,
    seed: int,
    progress: ConsoleProgress,
    directions: bool = False,
) -> Analysis:
    """Analyze the model of ``source`` on what the options name."""
    calibration, held = options.calibration_of(source, text, data, holdout, tokens, length)
    return analyze(
        source.model,
        calibration,
        mode=mode,
        holdout=held,
        example=options.example_of(source, calibration),
        seed=seed,
        progress=progress,
        files=_files(source),
        directions=directions,
    )


def kept_analysis(folder: Path, source: Source, progress: ConsoleProgress) -> Analysis:
    """The analysis in ``folder``, of the model of ``source``."""
    return load_analysis(folder, source.model, files=_files(source), progress=progress)


def kept_or_new(
    folder: Path | None, source: Source, progress: ConsoleProgress, make: Callable[[], Analysis]
) -> Analysis:
    """The analysis in ``folder`` where that is there; else a new one, kept in it where one is named."""
    if folder is not None and folder.exists():
        return kept_analysis(folder, source, progress)
    made = make()
    if folder is not None:
        made.save(folder)
    return made


def _files(source: Source) -> dict[str, bytes]:
    return {} if source.tokenizer is None else tokenizer_files(source.tokenizer)
