"""The comparison as a chart: loss against bytes, one line per method."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from geofx.charts import write_chart
from geofx.comparison import Comparison, Role, Row

COLOURS, MARKERS = 20, "os^vD*PX<>"
PANEL_INCHES = (6.4, 4.2)


def draw_chart(comparison: Comparison, path: str | Path) -> None:
    """Measured loss against bytes of the whole model, a panel each for formats and recipes of each scope.

    Raises:
        ConfigError, ArtifactError: the file has another suffix, or cannot be written.
    """
    panels = _panels(comparison)

    def draw(figure: Any) -> None:
        for position, (title, rows) in enumerate(panels):
            _draw(figure.add_subplot(len(panels), 1, position + 1), title, rows, comparison)

    width, height = PANEL_INCHES
    write_chart(path, (width, height * max(1, len(panels))), draw)


def _panels(comparison: Comparison) -> list[tuple[str, list[Row]]]:
    roles: tuple[Role, ...] = ("format", "recipe")
    found = [
        (f"{scope}: {role}s", [row for row in comparison.rows if (row.scope, row.role) == (scope, role)])
        for scope in dict.fromkeys(row.scope for row in comparison.rows)
        for role in roles
    ]
    return [(title, rows) for title, rows in found if any(_measured(row) for row in rows)]


def _measured(row: Row) -> bool:
    return row.figures is not None and row.figures.loss_increase is not None


def _draw(axes: Any, title: str, rows: Sequence[Row], comparison: Comparison) -> None:
    import matplotlib

    names = list(dict.fromkeys(row.name for row in rows if _measured(row)))
    colours = matplotlib.colormaps["tab20"]
    for index, (name, marker) in enumerate(zip(names, cycle(MARKERS), strict=False)):
        for allocation, dashes in (("uniform", "-"), ("planned", ":")):
            points = sorted(
                (row.figures.size_bytes / 1e6, row.figures.loss_increase)
                for row in rows
                if row.figures and _measured(row) and (row.name, row.allocation) == (name, allocation)
            )
            if points:
                shown = name if allocation == "uniform" else f"{name}*"
                style = {"color": colours(index % COLOURS), "marker": marker, "markersize": 3.5}
                axes.plot(*zip(*points, strict=True), dashes, label=shown, linewidth=1.0, **style)
    axes.set_title(title, loc="left")
    axes.set_xlabel("model, MB (10⁶ bytes)")
    axes.set_ylabel(f"loss increase, {comparison.measured_unit or comparison.unit}")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.2, linewidth=0.5)
    axes.legend(fontsize=5.5, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
