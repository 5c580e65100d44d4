"""geofx taxonomy: every format and module as subspaces and what happens among them."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from geofx import cli_options as options
from geofx.cli_console import show, show_json
from geofx.errors import ConfigError
from geofx.report_rows import in_count
from geofx.taxonomy import SHAPE, TaxonomyRow
from geofx.taxonomy import taxonomy as rows_of


def taxonomy(
    shape: Annotated[
        str, typer.Option(metavar="OUTxIN", help="Shape of the weight that the examples are of.")
    ] = f"{SHAPE[0]}x{SHAPE[1]}",
    as_json: options.Json = False,
) -> None:
    """List every format: how many subspaces, which, what happens among them, on which regions, by whom.

    Each stands for its setting nearest to half the numbers; the first rows are a model's own modules.
    """
    rows = rows_of(_sides(shape))
    if as_json:
        show_json([row.to_json() for row in rows])
    else:
        show(taxonomy_table(rows, shape), "Subspaces: dimension, and of how many where it is a part.")


def taxonomy_table(rows: tuple[TaxonomyRow, ...], shape: str) -> Table:
    """One line per form, with a rule between."""
    table = Table(header_style="bold", show_lines=True, title_justify="left", title_style="bold")
    table.title = f"Weights of {shape}, at half their numbers"
    table.add_column("form", no_wrap=True)
    for name in ("subspaces", "transformations", "regions; papers"):
        table.add_column(name, overflow="fold", min_width=15)
    for row in rows:
        numbers = "" if row.numbers is None else f"\n{in_count(row.numbers)}"
        table.add_row(
            Text(f"{row.name}{numbers}"),
            Text(f"{row.form.count}: {row.form.which}" if row.form.count else "none at this shape"),
            Text(row.form.operations),
            Text("\n".join(filter(None, (", ".join(row.regions), "; ".join(row.papers))))),
        )
    return table


def _sides(shape: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", shape)
    if found is None or "0" in found.groups():
        fix = "write it like 768x768, sides from 1 to 99999"
        raise ConfigError(f"shape {shape!r} is not OUTxIN", fix=fix)
    return int(found[1]), int(found[2])
