"""The report in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from geofx.report import RegionRow, Report
from geofx.report_rows import comparison, in_bytes, in_loss, in_percent, in_seconds, plain, recovery_rows

MOST_REGIONS = 12


def report_tables(report: Report, regions: int = MOST_REGIONS) -> Iterator[RenderableType]:
    """What was asked, original against optimized, the dearest regions, the recovery, the stages."""
    yield Text(f"{plain(report.model)}: {plain(report.budget)}", style="bold")
    yield Text(f"Counted as {plain(report.counting)}.", style="dim")
    yield comparison_table(report)
    if report.regions and regions:
        yield region_table(report, regions) if _rewritten(report) else _nothing_rewritten(report)
        if any(row.subspaces for row in report.regions):
            yield geometry_table(report)
    if report.recovery:
        yield recovery_table(report)
    if report.stages:
        yield stage_table(report)
    for note in report.notes[:MOST_REGIONS]:
        yield Text(f"Note: {plain(note)}", style="dim")


def comparison_table(report: Report) -> Table:
    """Original against optimized."""
    table = _table("", "original", "optimized", "change")
    for row in comparison(report):
        table.add_row(Text(plain(row.label)), row.original, row.optimized, row.change)
    return table


def region_table(report: Report, most: int) -> Table:
    """The rewritten regions with the largest predicted loss."""
    rewritten = _rewritten(report)
    dearest = sorted(rewritten, key=lambda row: row.loss or 0.0, reverse=True)[:most]
    table = _table("region", "form", "rank", "kept", "predicted\nloss", "99 %\nrank")
    table.columns[0].min_width = 20  # so that the figures fit a line of 80 characters beside it
    for column in table.columns[1:4]:
        column.no_wrap = True
    table.title = f"{len(rewritten)} of {len(report.regions)} regions rewritten; the {len(dearest)} dearest"
    for row in dearest:
        rank = "" if row.rank is None else str(row.rank)
        loss = "" if row.loss is None else in_loss(row.loss)
        table.add_row(
            Text(plain(row.name.removesuffix(".weight"))),
            Text(plain(row.factorization)),
            rank,
            in_percent(row.kept_ratio),
            loss,
            "" if row.rank_99 is None else str(row.rank_99),
        )
    return table


def _rewritten(report: Report) -> list[RegionRow]:
    return [row for row in report.regions if row.factorization != "dense"]


def _nothing_rewritten(report: Report) -> Text:
    return Text(f"0 of {len(report.regions)} regions rewritten", style="bold")


def geometry_table(report: Report) -> Table:
    """The forms in the plan: how many subspaces, and what happens among them."""
    kinds = Counter(
        (row.factorization, row.subspaces.partition(":")[0], row.transformations) for row in report.regions
    )
    table = Table(header_style="bold")
    for name in ("form", "regions", "subspaces", "transformations"):
        table.add_column(
            name, justify="right" if name in ("regions", "subspaces") else "left", overflow="fold"
        )
    for (form, subspaces, transformations), number in kinds.most_common():
        table.add_row(Text(plain(form)), str(number), Text(plain(subspaces)), Text(plain(transformations)))
    return table


def recovery_table(report: Report) -> Table:
    """How the training after the rewrite went."""
    table = _table("step", "training", "validation")
    table.title = "Recovery: what was trained for"
    for row in recovery_rows(report):
        table.add_row(*row)
    return table


def stage_table(report: Report) -> Table:
    """Seconds and peak memory of each stage."""
    table = _table("stage", "time", "peak memory")
    for stage in report.stages:
        peak = "" if stage.peak_memory_bytes is None else in_bytes(stage.peak_memory_bytes)
        table.add_row(Text(plain(stage.name)), in_seconds(stage.seconds), peak)
    return table


def figures_table(title: str, values: Mapping[str, str]) -> Table:
    """A figure per row, under one title."""
    table = Table("", title, header_style="bold")
    table.columns[1].justify = "right"
    for name, value in values.items():
        table.add_row(name, value)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(title_justify="left", title_style="bold", header_style="bold")
    table.add_column(first, overflow="fold", min_width=28)
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table
