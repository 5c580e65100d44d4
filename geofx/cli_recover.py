"""geofx recover: distil the original into the factors of a saved result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from geofx import cli_options as options
from geofx.cache import Cache
from geofx.cli_console import show, show_json, working
from geofx.cli_original import original_of
from geofx.errors import ConfigError
from geofx.folder import check_target
from geofx.report_table import report_tables
from geofx.restore import load
from geofx.sources import load_source, load_tokenizer
from geofx.training import Training, native_autocast


def recover(
    saved: options.Saved,
    original: Annotated[
        str, typer.Option(metavar="MODEL", help="The original model, whose outputs are learnt.")
    ],
    output: options.Output,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="UTF-8 text to train on, or 'python' for Python's own manual."),
    ] = None,
    data: options.Data = None,
    holdout: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text to measure on; by default an eighth, not trained on."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = Training.steps,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak; by default it goes by the loss at the start.")
    ] = None,
    labels: Annotated[
        float, typer.Option(help="Share of the text's own next tokens in the loss; 0: the original's alone.")
    ] = Training.labels,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the run is kept; an interrupted one goes on from there."),
    ] = None,
    tokens: options.Tokens = options.CALIBRATION_TOKENS,
    length: options.Length = options.WINDOW_TOKENS,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Train the factors, norms and biases of a saved result to give the original's outputs again.

    Ranks and size stay. An eighth of the data is not trained on: the state with the least loss there is kept.
    """
    training: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "labels": labels,
        "checkpoint": checkpoint,
        "seed": seed,
        "autocast": native_autocast(torch.device("cpu")),
    }
    Training.of(training)
    check_target(output, overwrite=overwrite)
    if not text and not data:
        raise ConfigError("there is nothing to train on", fix="give --text FILE or --data module:function")
    options.check_data(text, data, holdout)
    if checkpoint is not None:
        Cache(checkpoint)
    with working() as progress:
        with progress.step("load"):
            result, source = load(saved), load_source(original)
            source = dataclasses.replace(source, tokenizer=source.tokenizer or load_tokenizer(saved))
        with progress.step("trace the original"):
            result = dataclasses.replace(result, original=original_of(result, source))
        batches, held = options.calibration_of(source, text, data, holdout, tokens, length)
        made = result.recover(batches, holdout=held, progress=progress, **training)
        with progress.step("save"):
            made.save(output, overwrite=overwrite)
    if as_json:
        show_json(made.report.to_json())
    else:
        show(*report_tables(made.report))
