"""geofx frontier: the least loss at every size, from one analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from geofx import cli_options as options
from geofx.cli_analysis import Wanted, check_held_out, check_written, kept_or_new
from geofx.cli_console import show, show_json, working
from geofx.frontier_run import frontier_of, require_measurable
from geofx.frontier_views import draw_frontier, frontier_table
from geofx.sources import load_source


def frontier(
    context: typer.Context,
    model: options.Model,
    text: options.Text = None,
    data: options.Data = None,
    holdout: options.Holdout = None,
    by: Annotated[
        Literal["size", "flops", "parameters"], typer.Option("--by", help="What the shares are of.")
    ] = "size",
    shares: Annotated[
        str | None, typer.Option(metavar="SHARES", help="Such as 0.9,0.8; by default 0.95 to 0.3.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option(metavar="SHARES", help="Rewrite and measure the model at these (slow).")
    ] = None,
    scope: options.Scope = "model",
    include: options.Include = None,
    ignore: options.Ignore = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the frontier as JSON.")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw loss against size: .svg, .png or .pdf.")
    ] = None,
    analysis: options.KeptAnalysis = None,
    mode: options.Mode = "two_sided",
    tokens: options.Tokens = options.CALIBRATION_TOKENS,
    length: options.Length = options.WINDOW_TOKENS,
    effort: options.Effort = "fast",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Show what each size of MODEL would lose, from one analysis."""
    wanted = Wanted(text, data, holdout, mode, tokens, length, seed, effort)
    kept = check_written(output, chart, analysis, wanted, context)
    planned, measured = (
        None if given is None else options.shares_of(given, whole=True) for given in (shares, measure)
    )
    options.check_data(text, data, holdout, needed=mode != "data_free" and kept is None)
    if measured:
        check_held_out(kept, wanted, "measure")
        require_measurable(mode if kept is None else kept.mode)
    with working() as progress:
        with progress.step("load"):
            source = load_source(model)
        options.check_patterns(source, include, ignore)
        found = kept_or_new(analysis, source, wanted, progress)
        made = frontier_of(
            found,
            by,
            planned,
            measured=measured or (),
            scope=scope,
            name=source.description,
            include=include,
            ignore=ignore or (),
        )
        if output is not None:
            made.save(output)
        if chart is not None:
            draw_frontier(made, chart)
    if as_json:
        show_json(made.to_json())
    else:
        show(*frontier_table(made))
