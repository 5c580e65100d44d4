"""geofx optimize, plan and apply: from a model to a saved result, in one step or in three."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from geofx import cli_options as options
from geofx.analysis import Analysis
from geofx.cli_analysis import Wanted, check_kept, check_written, kept_analysis, kept_or_new, new_analysis
from geofx.cli_console import ConsoleProgress, show, show_json, working
from geofx.errors import BudgetInfeasibleError
from geofx.folder import check_files, check_target, write_file
from geofx.latency_budget import check_wanted
from geofx.model import OptimizedModel
from geofx.optimization import optimize_analysis
from geofx.plan import Plan
from geofx.report_html import report_html
from geofx.report_table import report_tables
from geofx.sources import Source, load_source
from geofx.summary import with_source

PLAN_FILE = Path("plan.json")

HtmlFile = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML file.")
]


def optimize(
    model: options.Model,
    output: options.Output,
    text: options.Text = None,
    data: options.Data = None,
    holdout: options.Holdout = None,
    size: options.Size = None,
    parameters: options.Parameters = None,
    flops: options.Flops = None,
    latency: options.Latency = None,
    target: options.Targets = None,
    loss: options.Loss = None,
    scope: options.Scope = "model",
    include: options.Include = None,
    ignore: options.Ignore = None,
    mode: options.Mode = "two_sided",
    tokens: options.Tokens = options.CALIBRATION_TOKENS,
    length: options.Length = options.WINDOW_TOKENS,
    effort: options.Effort = "fast",
    seed: options.Seed = 0,
    html: HtmlFile = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Compress MODEL to a budget, verify it on held-out data and save it in OUT."""
    budget = options.budget_of(size, parameters, flops, latency, loss, scope)
    targets = options.targets_of(target, latency)
    check_wanted(budget, targets)
    options.check_loss(loss, mode)
    check_target(output, overwrite=overwrite)
    check_files(html)
    wanted = Wanted(text, data, holdout, mode, tokens, length, seed, effort)
    options.check_data(text, data, holdout, needed=mode != "data_free")
    with working() as progress:
        with progress.step("load"):
            source = load_source(model)
        options.check_patterns(source, include, ignore)
        analysis = new_analysis(source, wanted, progress)
        try:
            result = optimize_analysis(analysis, budget, include=include, ignore=ignore or (), target=targets)
        except BudgetInfeasibleError as error:
            if error.result is None:
                raise
            _saved(error.result, analysis, source, output, overwrite, html, progress)
            fix = f"raise latency; what was made lies in {output.name}"
            raise BudgetInfeasibleError(error.what, where=error.where, fix=fix) from error
        result = _saved(result, analysis, source, output, overwrite, html, progress)
    _show_result(result, as_json)


def plan(
    context: typer.Context,
    model: options.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PLAN", help="File to write.")
    ] = PLAN_FILE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    text: options.Text = None,
    data: options.Data = None,
    size: options.Size = None,
    parameters: options.Parameters = None,
    flops: options.Flops = None,
    latency: options.Latency = None,
    target: options.Targets = None,
    loss: options.Loss = None,
    scope: options.Scope = "model",
    include: options.Include = None,
    ignore: options.Ignore = None,
    mode: options.Mode = "two_sided",
    tokens: options.Tokens = options.CALIBRATION_TOKENS,
    length: options.Length = options.WINDOW_TOKENS,
    effort: options.Effort = "fast",
    seed: options.Seed = 0,
    analysis: options.KeptAnalysis = None,
    as_json: options.Json = False,
) -> None:
    """Say what would be done to MODEL within a budget, and write it as a file that can be edited."""
    budget = options.budget_of(size, parameters, flops, latency, loss, scope)
    targets = options.targets_of(target, latency)
    check_wanted(budget, targets)
    wanted = Wanted(text, data, None, mode, tokens, length, seed, effort)
    kept = check_written(None if dry_run else output, None, analysis, wanted, context)
    options.check_loss(loss, mode if kept is None else kept.mode)
    options.check_data(text, data, None, needed=mode != "data_free" and kept is None)
    with working() as progress:
        with progress.step("load"):
            source = load_source(model)
        options.check_patterns(source, include, ignore)
        found = kept_or_new(analysis, source, wanted, progress)
        made = found.plan(budget, include=include, ignore=ignore or (), target=targets)
        if not dry_run:
            write_file(output, made.to_json())
    if as_json:
        show_json(json.loads(made.to_json()))
    else:
        show(str(made))


def apply(
    context: typer.Context,
    model: options.Model,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan that geofx plan wrote.")],
    output: options.Output,
    text: options.Text = None,
    data: options.Data = None,
    holdout: options.Holdout = None,
    mode: options.Mode = "two_sided",
    tokens: options.Tokens = options.CALIBRATION_TOKENS,
    length: options.Length = options.WINDOW_TOKENS,
    effort: options.Effort = "fast",
    seed: options.Seed = 0,
    analysis: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The analysis that the plan is of.")
    ] = None,
    html: HtmlFile = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Rewrite MODEL as PLAN says, verify it and save it in OUT."""
    made = Plan.load(plan_file)
    check_target(output, overwrite=overwrite)
    check_files(html)
    wanted = Wanted(text, data, holdout, mode, tokens, length, seed, effort)
    options.check_data(text, data, holdout, needed=mode != "data_free" and analysis is None)
    if analysis is not None:
        check_kept(analysis, wanted, context)
    with working() as progress:
        with progress.step("load"):
            source = load_source(model)
        if analysis is not None:
            found = kept_analysis(analysis, source, progress)
        else:
            found = new_analysis(source, wanted, progress)
        result = _saved(found.apply(made), found, source, output, overwrite, html, progress)
    _show_result(result, as_json)


def _saved(
    result: OptimizedModel,
    analysis: Analysis,
    source: Source,
    output: Path,
    overwrite: bool,
    html: Path | None,
    progress: ConsoleProgress,
) -> OptimizedModel:
    """The result, saved, its report with the source's name and what both models weigh on disk."""
    with progress.step("save"):
        report = with_source(result.report, source, analysis.original, result.program, output)
        result = dataclasses.replace(result, report=report)
        result.save(output, overwrite=overwrite)
    if html is not None:
        write_file(html, report_html(report))
    return result


def _show_result(result: OptimizedModel, as_json: bool) -> None:
    if as_json:
        show_json(result.report.to_json())
    else:
        show(*report_tables(result.report))
