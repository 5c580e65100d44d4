"""The report's figures as inline SVG: which matmuls were cut, and what their spectra looked like."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from geofx.report import RegionRow, Report
from geofx.report_rows import Cell, heat_map, plain

INK, CARD, CHANGED = "#010203", "#010204", "#010205"
"""Drawn with these, shown with the page's own colours: of text, of what lies behind it, of what differs."""
PAGE = {INK: "currentColor", CARD: "var(--card)", CHANGED: "var(--changed)"}

TRUNCATED = ("low_rank", "gauge_fixed")
"""Formats whose rank is where the spectrum is cut; the rank of others counts something else."""

SMALL_MULTIPLES = 12
COLUMNS = 4
LABEL_LENGTH = 36
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "geofx",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
}


def heat_map_svg(report: Report) -> str:
    """Layers x matmuls, coloured by the share of the numbers that was kept; empty without layers."""
    cells = heat_map(report)
    return inline_svg(lambda figures: _draw_heat_map(figures, cells)) if cells else ""


def spectra_svg(report: Report) -> str:
    """σ_i² of the regions where the plan loses most, with the kept rank; empty without spectra."""
    shown = [row for row in report.regions if len(row.spectrum) > 1 and row.spectrum[0] > 0.0]
    shown.sort(key=lambda row: (row.rank is not None, row.loss or 0.0), reverse=True)
    chosen = shown[:SMALL_MULTIPLES]
    return inline_svg(lambda figures: _draw_spectra(figures, chosen)) if chosen else ""


def stages_svg(report: Report) -> str:
    """Seconds of each stage, with the peak memory beside it."""
    return inline_svg(lambda figures: _draw_stages(figures, report)) if report.stages else ""


def inline_svg(draw: Callable[[Any], Any]) -> str:
    """SVG of the figure that ``draw`` makes, given the class of figures; without ids that could repeat."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = draw(Figure)
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            bbox_inches="tight",
            pad_inches=0.03,
            metadata={"Date": None},
        )
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[a-zA-Z]\w*_\d+">', "<g>", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', _OPENING, text, count=1, flags=re.DOTALL)
    for drawn, shown in PAGE.items():
        text = text.replace(drawn, shown)
    return text


_OPENING = (
    r'<svg role="img" viewBox="\1" xmlns="http://www.w3.org/2000/svg" '
    r'xmlns:xlink="http://www.w3.org/1999/xlink">'
)


def _draw_heat_map(figures: Any, cells: Sequence[Cell]) -> Any:
    layers = sorted({cell.layer for cell in cells})
    matmuls = list(dict.fromkeys(cell.matmul for cell in cells))
    kept = np.full((len(matmuls), len(layers)), np.nan)
    for cell in cells:
        kept[matmuls.index(cell.matmul), layers.index(cell.layer)] = cell.region.kept_ratio
    figure = figures(figsize=(8.6, 0.6 + 0.26 * len(matmuls)))
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(np.ma.masked_invalid(kept), cmap="YlGnBu_r", vmin=0.0, vmax=1.0, edgecolor="none")
    if len(layers) <= 40:
        _write_shares(axes, kept)
    axes.set_yticks(np.arange(len(matmuls)) + 0.5, [short(name) for name in matmuls])
    step = max(1, len(layers) // 30)
    axes.set_xticks(np.arange(0, len(layers), step) + 0.5, [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.02, pad=0.01, ticks=[0.0, 0.5, 1.0], format="{x:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


def _write_shares(axes: Any, kept: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    for (row, column), share in np.ndenumerate(kept):
        if np.isfinite(share) and share < 0.995:
            ink = "#ffffff" if share < 0.55 else "#10243e"
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{share * 100:.0f}",
                ha="center",
                va="center",
                color=ink,
                fontsize=6.0,
            )


def _draw_spectra(figures: Any, rows: Sequence[RegionRow]) -> Any:
    lines = -(-len(rows) // COLUMNS)
    figure = figures(figsize=(8.6, 1.55 * lines))
    for position, row in enumerate(rows):
        axes = figure.add_subplot(lines, COLUMNS, position + 1)
        squares = np.maximum(np.asarray(row.spectrum) / row.spectrum[0], 1e-12)
        ranks = np.linspace(1, min(row.shape) if row.shape else len(squares), len(squares))
        axes.plot(ranks, np.log10(squares), color="#2b7bba", linewidth=1.2)
        if row.rank is not None and row.factorization in TRUNCATED:
            axes.axvspan(row.rank, ranks[-1], color="#d9534f", alpha=0.15, linewidth=0)
            axes.axvline(row.rank, color="#d9534f", linewidth=0.8)
        title = short(row.name.removesuffix(".weight"))
        axes.set_title(title, fontsize=6.5, loc="left", pad=3)
        axes.set_xlim(1, ranks[-1])
        axes.tick_params(labelsize=6, length=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter("1e{x:.0f}")
        axes.locator_params(axis="y", nbins=4, integer=True)
    figure.subplots_adjust(hspace=0.55, wspace=0.3)
    return figure


def _draw_stages(figures: Any, report: Report) -> Any:
    names = [short(stage.name) for stage in report.stages]
    seconds = [stage.seconds for stage in report.stages]
    figure = figures(figsize=(8.6, 0.3 + 0.24 * len(names)))
    axes = figure.add_subplot()
    bars = axes.barh(range(len(names)), seconds, color="#2b7bba", height=0.62)
    labels = [_stage_label(stage.seconds, stage.peak_memory_bytes) for stage in report.stages]
    axes.bar_label(bars, labels, padding=4, fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, max(seconds) * 1.25 or 1.0)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _stage_label(seconds: float, peak: int | None) -> str:
    return f"{seconds:.1f} s" + ("" if peak is None else f", peak {peak / 1e9:.2f} GB")


def short(name: str) -> str:
    """``name`` as a label: printable, its end where it is long."""
    text = plain(name)
    return text if len(text) <= LABEL_LENGTH else "…" + text[1 - LABEL_LENGTH :]
