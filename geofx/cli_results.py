"""geofx inspect and eval: what is in a saved result, and what it loses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import networkx
import typer

from geofx import cli_options as options
from geofx.batches import Batch, longest_sequence
from geofx.cli_console import show, show_json, working
from geofx.cli_original import original_of
from geofx.errors import CalibrationError
from geofx.folder import check_files, write_file
from geofx.graph_explorer import graph_model_explorer
from geofx.graph_text import graph_diff, graph_dot
from geofx.objective import choose_objective
from geofx.report import Measured
from geofx.report_html import report_html
from geofx.report_rows import Format, in_loss, in_percent, plain
from geofx.report_table import figures_table, report_tables
from geofx.restore import load
from geofx.sources import Source, load_source, load_tokenizer
from geofx.text import windows
from geofx.verify import Fidelity, verify

EVAL_TOKENS = 16384


def inspect(
    saved: options.Saved,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML file.")
    ] = None,
    dot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the graph in the DOT language of Graphviz.")
    ] = None,
    model_explorer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the graph as JSON for Google's Model Explorer.")
    ] = None,
    node_link: Annotated[
        Path | None,
        typer.Option("--networkx", metavar="FILE", help="Write the graph as networkx node-link JSON."),
    ] = None,
    diff: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Print what was rewritten in the original's graph."),
    ] = None,
    regions: Annotated[int, typer.Option(min=0, help="How many regions to list.")] = 12,
    as_json: options.Json = False,
) -> None:
    """Show the report and the plan of a saved result."""
    check_files(html, dot, model_explorer, node_link)
    with working():
        result = load(saved)
        changes = []
        if diff is not None:
            original = original_of(result, load_source(diff), "--diff")
            changes = list(graph_diff(original, result.program))
        if html is not None:
            write_file(html, report_html(result.report))
        if dot is not None:
            write_file(dot, graph_dot(result.program))
        if model_explorer is not None:
            write_file(model_explorer, graph_model_explorer(result.program, result.report))
        if node_link is not None:
            nodes = networkx.node_link_data(result.program.to_networkx(), edges="edges")
            write_file(node_link, json.dumps(nodes, default=str))
    if diff is not None and as_json:
        show_json({"diff": changes})
    elif diff is not None:
        for line in changes:
            typer.echo(plain(line))
    elif as_json:
        show_json({"report": result.report.to_json(), "plan": json.loads(result.plan.to_json())})
    else:
        show(*report_tables(result.report, regions))


def evaluate(
    saved: options.Saved,
    text: Annotated[
        str, typer.Option(metavar="FILE", help="UTF-8 text, or 'python' for Python's own manual.")
    ],
    original: options.Original = None,
    tokens: options.Tokens = EVAL_TOKENS,
    length: options.Length = options.WINDOW_TOKENS,
    as_json: options.Json = False,
) -> None:
    """Measure a saved result on text, against the original if that is given."""
    options.check_data(text, None, None)
    with working() as progress:
        result = load(saved)
        source = None if original is None else load_source(original)
        reference = result.program if source is None else original_of(result, source)
        batches = windows_of(saved, source, text, tokens, length, longest_sequence(result.config))
        objective = choose_objective(reference, batches[0], None)
        fidelity = verify(reference, result.program, batches, objective, progress=progress)
    figures = _figures(fidelity, compared=source is not None)
    if as_json:
        show_json(figures)
    else:
        forms: dict[str, Format] = {"tokens": "{:.0f}".format, "perplexity": "{:.2f}".format}
        forms |= {"top1_agreement": in_percent, "sqnr_db": "{:.1f}".format}
        rows = {key: forms.get(key, in_loss)(value) for key, value in figures.items() if value is not None}
        show(figures_table("measured", rows))


def windows_of(
    saved: Path, source: Source | None, text: str, tokens: int, length: int, longest: int | None
) -> list[Batch]:
    """Batches of a text, cut by the tokenizer that was saved, or the original's.

    Raises:
        CalibrationError: there is no tokenizer, or no such text.
    """
    tokenizer = load_tokenizer(saved) or (source and source.tokenizer)
    if tokenizer is None:
        raise CalibrationError(
            "no tokenizer was saved with the model", where=saved.name, fix="give --original MODEL"
        )
    cut = windows(
        options.corpus(text),
        tokenizer,
        length=length,
        batch_size=options.BATCH_ROWS,
        limit_tokens=tokens,
        max_positions=longest,
    )
    return list(cut)


def _figures(fidelity: Fidelity, compared: bool) -> dict[str, float | None]:
    """Loss and perplexity alone, or everything where there is an original."""
    found: dict[str, float | None] = {"loss": fidelity.loss_optimized, "tokens": fidelity.tokens}
    if fidelity.kl is not None:
        found["perplexity"] = Measured(loss=fidelity.loss_optimized).perplexity
    if compared:
        found |= {
            key: value
            for key, value in dataclasses.asdict(fidelity).items()
            if isinstance(value, float) and key not in ("loss_optimized", "parameter_mae")
        }
    return {key: value if value is None or math.isfinite(value) else None for key, value in found.items()}
