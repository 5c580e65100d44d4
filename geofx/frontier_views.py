"""A frontier in a terminal, as a chart and in a report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from geofx.charts import write_chart
from geofx.frontier import Frontier, Point
from geofx.report import Report
from geofx.report_figures import inline_svg
from geofx.report_rows import ABSENT, in_bytes, in_count, in_loss, in_percent, plain

CHART_INCHES = (6.4, 4.0)
AXES = {"size": "MB (10⁶ bytes)", "flops": "M flops per token", "parameters": "M numbers stored"}


def frontier_table(frontier: Frontier) -> Iterator[RenderableType]:
    """One row per point, the model as it was first; then what was measured."""
    dense = frontier.dense
    if frontier.model:
        yield Text(plain(frontier.model), style="bold")
    what = "the model" if frontier.scope == "model" else "what can be rewritten"
    yield Text(f"Share of the {frontier.axis} of {what}; losses in {plain(frontier.unit)}.", style="dim")
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    for name in ("share", "kept", "bytes", "numbers", "linear", "flops", "rewritten", "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    linear = in_count(frontier.points[0].linear_parameters + dense.parameters - frontier.points[0].parameters)
    first = ("dense", in_percent(1.0), in_bytes(dense.bytes), in_count(dense.parameters), linear)
    table.add_row(*first, in_count(dense.flops), "0", in_loss(0.0))
    for point in frontier.points:
        table.add_row(*_cells(point))
    yield table
    if frontier.is_measured:
        yield _measured_table(frontier)
    last = frontier.points[-1]
    if last.kept > last.share:
        yield Text(f"No plan keeps less than {in_percent(last.kept)}.", style="dim")


def _measured_table(frontier: Frontier) -> Table:
    """Predicted beside measured, in a table of its own: both would not fit a line of 80 characters."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    for name in ("share", "kept", "predicted", "measured", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in frontier.points:
        if point.loss_increase is not None:
            kl = ABSENT if point.kl is None else in_loss(point.kl)
            losses = in_loss(point.predicted_loss), in_loss(point.loss_increase), kl
            table.add_row(in_percent(point.share), in_percent(point.kept), *losses)
    return table


def _cells(point: Point) -> tuple[str, ...]:
    return (
        in_percent(point.share),
        in_percent(point.kept),
        in_bytes(point.size_bytes),
        in_count(point.parameters),
        in_count(point.linear_parameters),
        in_count(point.flops_per_token),
        str(point.rewritten),
        in_loss(point.predicted_loss),
    )


def draw_frontier(frontier: Frontier, path: str | Path) -> None:
    """Predicted loss against the axis as a line, measured points as dots.

    Raises:
        ConfigError, ArtifactError: the file is no chart, or cannot be written.
    """
    write_chart(path, CHART_INCHES, lambda figure: _draw(figure.add_subplot(), frontier))


def frontier_svg(report: Report) -> str:
    """The frontier of a report with what its result is predicted and measured to lose; empty without one."""
    frontier = report.frontier
    if frontier is None:
        return ""

    def draw(figures: Any) -> Any:
        figure = figures(figsize=(8.6, 2.8))
        axes = figure.add_subplot()
        _draw(axes, frontier)
        size = (report.optimized.size_bytes or 0) / 1e6
        reached = (("predicted", report.predicted_loss, "o"), ("measured", report.measured_loss, "s"))
        for label, loss, marker in reached:
            if loss is not None:
                axes.plot([size], [loss], marker, markersize=6, label=f"this result, {label}")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    return inline_svg(draw)


def _draw(axes: Any, frontier: Frontier) -> None:
    attribute = {"size": "size_bytes", "flops": "flops_per_token", "parameters": "parameters"}[frontier.axis]
    dense = {"size": "bytes", "flops": "flops", "parameters": "parameters"}[frontier.axis]
    places = [getattr(point, attribute) / 1e6 for point in frontier.points]
    losses = [point.predicted_loss for point in frontier.points]
    whole = getattr(frontier.dense, dense) / 1e6
    axes.plot([whole, *places], [0.0, *losses], "-o", markersize=3, linewidth=1.2, label="predicted")
    held = [
        (place, point.loss_increase)
        for place, point in zip(places, frontier.points, strict=True)
        if point.loss_increase is not None
    ]
    if held:
        label = f"measured on {frontier.tokens} tokens" if frontier.tokens else "measured"
        axes.plot(*zip(*held, strict=True), "s", markersize=5, fillstyle="none", label=label)
    axes.set_xlabel(AXES[frontier.axis])
    axes.set_ylabel(f"loss increase, {frontier.unit}")
    axes.set_title(plain(frontier.model), loc="left")
    axes.grid(alpha=0.2, linewidth=0.5)
    axes.legend(frameon=False)
