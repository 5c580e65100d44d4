"""geofx compare: every format and recipe at equal bytes, as a table, JSON and a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from geofx import cli_options as options
from geofx.cache import Cache, default_folder
from geofx.cli_analysis import Wanted, check_held_out, check_written, kept_or_new
from geofx.cli_console import show, show_json, working
from geofx.compare_run import ROUNDS, compare_analysis
from geofx.compare_subjects import reads_directions, subjects
from geofx.comparison import Engine
from geofx.comparison_figures import draw_chart
from geofx.comparison_table import comparison_tables
from geofx.errors import ConfigError
from geofx.sources import load_source

KEEP = "0.8"


def compare(
    context: typer.Context,
    model: options.Model,
    text: options.Text = None,
    data: options.Data = None,
    holdout: options.Holdout = None,
    keep: Annotated[
        str, typer.Option(metavar="SHARES", help="Shares of the bytes, such as 0.9,0.8,0.6.")
    ] = KEEP,
    formats: Annotated[str, typer.Option(metavar="NAMES", help="all, none, or names with commas.")] = "all",
    recipes: Annotated[str, typer.Option(metavar="NAMES", help="all, none, or names with commas.")] = "all",
    latency: Annotated[
        str, typer.Option(metavar="ENGINES", help="torch, onnx (exports each result: slow), both, or none.")
    ] = "torch",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the comparison as JSON.")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw loss against bytes: .svg, .png or .pdf.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where what is done is kept; an interrupted run goes on."),
    ] = None,
    analysis: options.KeptAnalysis = None,
    mode: options.Mode = "two_sided",
    tokens: options.Tokens = options.CALIBRATION_TOKENS,
    length: options.Length = options.WINDOW_TOKENS,
    effort: options.Effort = "fast",
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each; medians are shown.")] = ROUNDS,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Set every format and recipe side by side at equal bytes, on the same model and data."""
    shares, engines = options.shares_of(keep), _engines(latency)
    _check_names(_names(formats), _names(recipes))
    wanted = Wanted(text, data, holdout, mode, tokens, length, seed, effort)
    kept = check_written(output, chart, analysis, wanted, context)
    options.check_data(text, data, holdout, needed=kept is None)
    check_held_out(kept, wanted, "compare")
    Cache(cache or default_folder())
    with working() as progress:
        with progress.step("load"):
            source = load_source(model)
        directions = reads_directions(_names(formats), _names(recipes))
        found = kept_or_new(analysis, source, wanted, progress, directions)
        made = compare_analysis(
            found,
            shares,
            formats=_names(formats),
            recipes=_names(recipes),
            latency=engines,
            cache=cache,
            rounds=rounds,
            name=source.description,
        )
        if output is not None:
            made.save(output)
        if chart is not None:
            draw_chart(made, chart)
    if as_json:
        show_json(made.to_json())
    else:
        show(*comparison_tables(made))


def _check_names(formats: Any, recipes: Any) -> None:
    """Raises where a name is not known; which kinds of region the model has shows only later."""
    subjects(formats, recipes, {})
    if formats == recipes == "none":
        raise ConfigError("there is nothing to compare", fix="name --formats or --recipes")


def _engines(text: str) -> Any:
    named = {"none": [], "both": ["torch", "onnx"]}
    engines = named[text] if text in named else [part.strip() for part in text.split(",")]
    for engine in engines:
        if engine not in get_args(Engine):
            raise ConfigError(f"no engine {engine!r}", fix="use torch, onnx, both or none")
    return engines


def _names(text: str) -> Any:
    return text if text in ("all", "none") else [part.strip() for part in text.split(",")]
