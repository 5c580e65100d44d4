"""A comparison in a terminal: for each scope and share what the methods lose, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from geofx.comparison import Comparison, Engine, Figures, Row
from geofx.report_rows import ABSENT, in_bytes, in_count, in_loss, in_percent, in_seconds, plain

Column = tuple[str, Callable[[Figures], str]]
Value = TypeVar("Value")


def comparison_tables(comparison: Comparison) -> Iterator[RenderableType]:
    """What was compared on what, two tables per scope and share, and why some rows have no figures."""
    original = comparison.original
    yield Text(plain(comparison.model), style="bold")
    size, flops = in_bytes(original.size_bytes), in_count(original.flops_per_token)
    loss = _number(original.loss, in_loss)
    yield Text(f"{size}, {flops} flops per token, loss {loss} on {comparison.tokens} tokens", style="dim")
    measured = f" predicted, in {comparison.measured_unit} measured" if comparison.measured_unit else ""
    yield Text(plain(f"Losses in {comparison.unit}{measured}."), style="dim")
    for scope, keep in dict.fromkeys((row.scope, row.keep) for row in comparison.rows):
        rows = [row for row in comparison.rows if (row.scope, row.keep) == (scope, keep)]
        ranked = sorted((row for row in rows if row.figures), key=_loss)
        if ranked:
            title = f"{scope}, {in_percent(keep)} of the bytes"
            yield _table(f"{title}: what is lost", ranked, LOSSES)
            yield _table(f"{title}: what it costs", ranked, COSTS)
            timed = [
                column
                for engine, columns in LATENCIES.items()
                if _timed(ranked, engine)
                for column in columns
            ]
            if timed:
                yield _table(f"{title}: time", ranked, timed)
    yield from _notes(comparison.rows)


def _loss(row: Row) -> float:
    increase = row.figures.loss_increase if row.figures else None
    return float("inf") if increase is None else increase


def _number(value: Value | None, form: Callable[[Value], str]) -> str:
    return ABSENT if value is None else form(value)


def _timed(rows: Sequence[Row], engine: Engine) -> bool:
    return any(row.figures is not None and engine in row.figures.latency for row in rows)


def _short(value: float) -> str:
    return f"{value:.2g}"


def _seconds(engine: Engine) -> Callable[[Figures], str]:
    return lambda figures: _number(figures.latency.get(engine), lambda found: in_seconds(found.seconds))


def _ratio(engine: Engine) -> Callable[[Figures], str]:
    return lambda figures: _number(figures.latency.get(engine), lambda found: f"{found.ratio:.2f}")


LOSSES: tuple[Column, ...] = (
    ("CR", lambda figures: f"{figures.compression_ratio:.3f}"),
    ("FDL", lambda figures: _short(figures.parameter_mae)),
    ("predicted", lambda figures: _short(figures.predicted_loss)),
    ("measured", lambda figures: _number(figures.loss_increase, _short)),
    ("KL", lambda figures: _number(figures.kl, _short)),
    ("top-1", lambda figures: _number(figures.top1_agreement, in_percent)),
)
COSTS: tuple[Column, ...] = (
    ("bytes", lambda figures: in_bytes(figures.size_bytes)),
    ("numbers", lambda figures: in_count(figures.parameters)),
    ("linear", lambda figures: in_count(figures.linear_parameters)),
    ("flops", lambda figures: in_count(figures.flops_per_token)),
    ("fit", lambda figures: in_seconds(figures.fit_s)),
)
LATENCIES: Mapping[Engine, tuple[Column, ...]] = {
    "torch": (("torch", _seconds("torch")), ("ratio", _ratio("torch"))),
    "onnx": (("ONNX Runtime", _seconds("onnx")), ("ratio", _ratio("onnx"))),
}


def _table(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD
    )
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column("method", overflow="fold", min_width=16)
    for name in ("kept", *(name for name, _ in columns)):
        table.add_column(name, justify="right", no_wrap=True)
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
        yield Text("* allocated by the planner, the others the same share of every region.", style="dim")
    if any(row.figures and row.figures.latency for row in rows):
        yield Text("ratio: to the original, timed in turns with it.", style="dim")
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        for note in row.notes:
            reasons.setdefault(note, {})[f"{name_of(row)} {row.keep:g}"] = None
    for reason, names in reasons.items():
        yield Text(f"Note: {plain(reason)}: {', '.join(names)}", style="dim")
