"""Charts as files: one style, one way to fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from geofx.errors import ArtifactError, ConfigError
from geofx.folder import check_files
from geofx.report_figures import STYLE

SUFFIXES = (".svg", ".png", ".pdf")


def check_chart(path: Path) -> None:
    """Raises before long work where `write_chart` would: a wrong suffix, a place that cannot be written."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path.name!r} is not a chart file", fix=f"end it in {' or '.join(SUFFIXES)}")
    check_files(path)


def write_chart(path: str | Path, size_inches: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Let ``draw`` fill a figure of this size and write it to ``path``; the same data gives the same SVG.

    Raises:
        ConfigError, ArtifactError: the file has another suffix, or cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    target = Path(path)
    check_chart(target)
    with matplotlib.rc_context({**STYLE, "text.color": "black", "axes.edgecolor": "black"}):
        figure = Figure(figsize=size_inches, layout="constrained")
        draw(figure)
        try:
            figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
        except OSError as error:
            raise ArtifactError(f"cannot write the chart: {error.strerror}", where=target.name) from error
