"""The analysis that a command works on: a new one, one that was kept, or one to keep."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import typer

from geofx import cli_options as options
from geofx.analysis import Analysis
from geofx.analysis_store import Heading, read_heading
from geofx.api import analyze, load_analysis
from geofx.charts import check_chart
from geofx.cli_console import ConsoleProgress
from geofx.effort import Level
from geofx.errors import ConfigError
from geofx.folder import check_files, check_target
from geofx.sources import Source, tokenizer_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What the options ask of a new analysis; each field is the option of its name."""

    text: str | None
    data: str | None
    holdout: str | None
    mode: options.Mode
    tokens: int
    length: int
    seed: int
    effort: Level

    @property
    def held_out(self) -> bool:
        """Whether there is something to measure results on: where none is named, part of the calibration."""
        return bool(self.text or self.data or self.holdout)


def check_written(
    output: Path | None, chart: Path | None, analysis: Path | None, wanted: Wanted, context: typer.Context
) -> Heading | None:
    """What the analysis that is there already says of itself, None where it will be a new one.

    Raises:
        ArtifactError: it, or a file, could not be written later, or is not an analysis.
        ConfigError: see `check_kept`.
    """
    check_files(output, chart)
    if chart is not None:
        check_chart(chart)
    if analysis is None:
        return None
    if analysis.exists():
        return check_kept(analysis, wanted, context)
    check_target(analysis)
    return None


def check_kept(folder: Path, wanted: Wanted, context: typer.Context) -> Heading:
    """What the analysis in ``folder`` says of itself; warns of options that it makes useless.

    Raises:
        ConfigError: another ``--mode`` is asked for.
        ArtifactError: there is no analysis.
    """
    found, given = read_heading(folder), options.given(context)
    if "mode" in given and wanted.mode != found.mode:
        raise ConfigError(
            f"the analysis was made with --mode {found.mode}, not {wanted.mode}",
            where=str(folder),
            fix="leave --mode out, or name another folder to analyze anew",
        )
    useless = [f"--{name}" for name in vars(wanted) if name in given and name != "mode"]
    if useless:
        verb = "has" if len(useless) == 1 else "have"
        logger.warning(
            "the analysis in %s is used: %s %s no effect; name another folder to analyze anew",
            folder,
            " and ".join(filter(None, (", ".join(useless[:-1]), useless[-1]))),
            verb,
        )
    return found


def check_held_out(kept: Heading | None, wanted: Wanted, what: str) -> None:
    """Raises before any work if there will be nothing to ``what`` on."""
    if not (wanted.held_out if kept is None else kept.held_out):
        anew = "" if kept is None else "name another folder to analyze anew, and "
        fix = f"{anew}give --text FILE, --data module:function or --holdout FILE"
        raise ConfigError(f"there is no held-out data to {what} on", fix=fix)


def new_analysis(
    source: Source, wanted: Wanted, progress: ConsoleProgress, directions: bool = False
) -> Analysis:
    """Analyze the model of ``source`` on what the options name."""
    calibration, held = options.calibration_of(
        source, wanted.text, wanted.data, wanted.holdout, wanted.tokens, wanted.length
    )
    return analyze(
        source.model,
        calibration,
        mode=wanted.mode,
        holdout=held,
        example=options.example_of(source, calibration),
        seed=wanted.seed,
        progress=progress,
        files=_files(source),
        directions=directions,
        effort=wanted.effort,
    )


def kept_analysis(folder: Path, source: Source, progress: ConsoleProgress) -> Analysis:
    """The analysis in ``folder``, of the model of ``source``."""
    return load_analysis(folder, source.model, files=_files(source), progress=progress)


def kept_or_new(
    folder: Path | None, source: Source, wanted: Wanted, progress: ConsoleProgress, directions: bool = False
) -> Analysis:
    """The analysis in ``folder`` where that is there; else a new one, kept in it where one is named."""
    if folder is not None and folder.exists():
        return kept_analysis(folder, source, progress)
    made = new_analysis(source, wanted, progress, directions)
    if folder is not None:
        made.save(folder)
    return made


def _files(source: Source) -> dict[str, bytes]:
    return {} if source.tokenizer is None else tokenizer_files(source.tokenizer)
