"""One block before and after as inline SVG: boxes in the order in which they run, arrows between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from geofx.graph_block import Block, Box
from geofx.report_figures import CARD, CHANGED, INK, inline_svg, short

WIDTH, ROW = 8.6, 0.44
"""Inches of the drawing, and of a row of boxes."""
SIDES = ("original", "optimized")
FILL, LINE = {False: CARD, True: CHANGED}, {False: "#8a97a6", True: "#2b7bba"}
BEND = 2.4
"""Of an arrow past the boxes of its own column, in rows."""


def block_svg(block: Block) -> str:
    """The original on the left, what became of it on the right; boxes that differ are filled."""
    sides = _rows(block.before), _rows(block.after)
    height = ROW * (max(map(len, sides)) + 1)

    def draw(figures: Any) -> Any:
        figure = figures(figsize=(WIDTH, height))
        for place, (title, rows) in enumerate(zip(SIDES, sides, strict=True)):
            axes = figure.add_axes((0.5 * place, 0.0, 0.49, 1.0))
            axes.set_xlim(0.0, 1.0)
            axes.set_ylim(-height / ROW + 0.5, 0.5)
            axes.set_axis_off()
            axes.text(0.5, 0.2, title, ha="center", va="center", fontsize=8.0, weight="bold")
            _draw(axes, rows)
        return figure

    return inline_svg(draw)


def _rows(boxes: Sequence[Box]) -> list[list[Box]]:
    """Each box one row below the last of those that it reads; within a row in the order of these."""
    depth: dict[str, int] = {}
    rows: dict[int, list[Box]] = defaultdict(list)
    for box in boxes:
        depth[box.name] = 1 + max((depth[name] for name in box.inputs), default=-1)
        rows[depth[box.name]].append(box)
    place: dict[str, float] = {}
    for row in (rows[level] for level in sorted(rows)):
        row.sort(key=lambda box: sum(place[name] for name in box.inputs) / max(1, len(box.inputs)))
        place |= {box.name: (number + 0.5) / len(row) for number, box in enumerate(row)}
    return [rows[level] for level in sorted(rows)]


def _draw(axes: Any, rows: Sequence[Sequence[Box]]) -> None:
    drawn: dict[str, Any] = {}
    for level, row in enumerate(rows):
        for number, box in enumerate(row):
            text = "\n".join(map(short, box.label.split("\n")))
            frame = {"boxstyle": "round,pad=0.3", "facecolor": FILL[box.changed], "linewidth": 0.7}
            frame["edgecolor"] = LINE[box.changed]
            place = (number + 0.5) / len(row), -1.0 - level
            label = axes.text(*place, text, ha="center", va="center", fontsize=5.5, color=INK, bbox=frame)
            for name in box.inputs:
                _connect(axes, drawn[name], label)
            drawn[box.name] = label


def _connect(axes: Any, above: Any, below: Any) -> None:
    """An arrow from edge to edge; past the boxes between where they stand in one column."""
    (x, y), (to_x, to_y) = above.get_position(), below.get_position()
    rows = y - to_y
    bend = BEND / rows if abs(x - to_x) < 0.01 and rows > 1.5 else 0.0
    arrow = {"arrowstyle": "-|>", "mutation_scale": 5, "color": "#8a97a6", "linewidth": 0.7}
    ends = {"patchA": above.get_bbox_patch(), "patchB": below.get_bbox_patch(), "shrinkA": 1, "shrinkB": 1}
    style = {"connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", (to_x, to_y), (x, y), arrowprops={**arrow, **ends, **style}, zorder=0)
