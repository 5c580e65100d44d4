"""The report as one HTML file that needs no network and runs no script."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from geofx.block_figure import block_svg
from geofx.frontier_views import frontier_svg
from geofx.report import Report
from geofx.report_figures import heat_map_svg, spectra_svg, stages_svg
from geofx.report_rows import (
    comparison,
    in_loss,
    in_percent,
    plain,
    recovery_rows,
)

MOST_REFUSALS = 20
HEADLINE = ("Bytes of weights", "Flops per token", "Perplexity, held-out")


def report_html(report: Report) -> str:
    """The page; every name in it is escaped, and its policy lets nothing be fetched or run."""
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"loss": in_loss, "percent": in_percent, "plain": plain}
    template = page.from_string(
        resources.files("geofx").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        report=report,
        rows=comparison(report),
        headline=_headline(report),
        recovery=recovery_rows(report),
        rewritten=[row for row in report.regions if row.factorization != "dense"],
        most_refusals=MOST_REFUSALS,
        frontier=Markup(frontier_svg(report)),  # noqa: S704
        block=Markup("" if report.block is None else block_svg(report.block)),  # noqa: S704
        heat_map=Markup(heat_map_svg(report)),  # noqa: S704 (our own drawing; matplotlib escapes the labels)
        spectra=Markup(spectra_svg(report)),  # noqa: S704
        stages=Markup(stages_svg(report)),  # noqa: S704
    )


def _headline(report: Report) -> list[tuple[str, str, str]]:
    """(figure, label, small print) of what a reader looks for first."""
    found = []
    for row in comparison(report):
        if row.change and (row.label in HEADLINE or row.label.startswith("Latency")):
            found.append((row.change, row.label, f"{row.original} → {row.optimized}"))
    agreement = report.figure("top1_agreement")
    if agreement is not None:
        found.append((in_percent(agreement), "Top-1 agreement", "same most likely next token"))
    if report.measured_loss is not None and report.predicted_loss is not None:
        predicted = f"{in_loss(report.predicted_loss)} predicted"
        found.append((in_loss(report.measured_loss), "Loss increase, held-out", predicted))
    return found
