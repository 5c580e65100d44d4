"""A comparison in a terminal: for each scope and share what the methods lose, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from geofx.comparison import Comparison, Engine, Figures, Row
from geofx.report_rows import ABSENT, in_bytes, in_count, in_loss, in_percent, in_seconds, plain

Column = tuple[str, Callable[[Figures], str]]


def comparison_tables(comparison: Comparison) -> Iterator[RenderableType]:
    """What was compared on what, two tables per scope and share, and why some rows have no figures."""
    original = comparison.original
    yield Text(plain(comparison.model), style="bold")
    size, flops = in_bytes(original.size_bytes), in_count(original.flops_per_token)
    loss = _number(original.loss, in_loss)
    yield Text(f"{size}, {flops} flops per token, loss {loss} on {comparison.tokens} tokens", style="dim")
    yield Text(f"Losses in {plain(comparison.unit)}.", style="dim")
    for scope, keep in dict.fromkeys((row.scope, row.keep) for row in comparison.rows):
        rows = [row for row in comparison.rows if (row.scope, row.keep) == (scope, keep)]
        ranked = sorted((row for row in rows if row.figures), key=_loss)
        if ranked:
            title = f"{scope}: {in_percent(keep)} kept"
            yield _table(f"{title}; what is lost", ranked, LOSSES)
            yield _table(f"{title}; what it costs", ranked, COSTS)
    yield from _notes(comparison.rows)


def _loss(row: Row) -> float:
    increase = row.figures.loss_increase if row.figures else None
    return float("inf") if increase is None else increase


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return ABSENT if value is None else form(value)


def _latency(engine: Engine) -> Callable[[Figures], str]:
    def shown(figures: Figures) -> str:
        found = figures.latency.get(engine)
        return ABSENT if found is None else f"{in_seconds(found.seconds)} ({found.ratio:.2f})"

    return shown


LOSSES: tuple[Column, ...] = (
    ("CR", lambda figures: f"{figures.compression_ratio:.3f}"),
    ("FDL", lambda figures: f"{figures.parameter_mae:.1e}"),
    ("predicted", lambda figures: in_loss(figures.predicted_loss)),
    ("measured", lambda figures: _number(figures.loss_increase, in_loss)),
    ("KL", lambda figures: _number(figures.kl, in_loss)),
    ("top-1", lambda figures: _number(figures.top1_agreement, in_percent)),
)
COSTS: tuple[Column, ...] = (
    ("bytes", lambda figures: in_bytes(figures.size_bytes)),
    ("numbers", lambda figures: in_count(figures.parameters)),
    ("linear", lambda figures: in_count(figures.linear_parameters)),
    ("flops", lambda figures: in_count(figures.flops_per_token)),
    ("torch", _latency("torch")),
    ("ONNX Runtime", _latency("onnx")),
    ("fit", lambda figures: in_seconds(figures.fit_s)),
)


def _table(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("method", overflow="fold")
    table.add_column("kept", justify="right")
    for name, _ in columns:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        if row.figures is not None:
            cells = (form(row.figures) for _, form in columns)
            table.add_row(Text(name_of(row)), _number(row.kept, in_percent), *cells)
    return table


def name_of(row: Row) -> str:
    """``low_rank*`` where the planner allocated; a recipe has its paper's name."""
    return plain(f"{row.name}{'*' if row.allocation == 'planned' else ''}")


def _notes(rows: Sequence[Row]) -> Iterator[RenderableType]:
    """Each reason once, with the methods and shares that it is of."""
    if any(row.allocation == "planned" for row in rows):
        yield Text("* allocated by the planner, the others the same share of every region", style="dim")
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        for note in row.notes:
            reasons.setdefault(note, {})[f"{name_of(row)} {row.keep:g}"] = None
    for reason, names in reasons.items():
        yield Text(f"Note: {plain(reason)}: {', '.join(names)}", style="dim")
