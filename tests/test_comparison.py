"""A comparison as text: what its table says, and what is no comparison."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from geofx import comparison_figures
from geofx.comparison import Comparison, Figures, Latency, Row
from geofx.comparison_table import comparison_tables
from geofx.errors import ArtifactCorruptError


def test_comparisons_that_are_none_are_refused() -> None:
    with pytest.raises(ArtifactCorruptError, match="not a comparison: model"):
        Comparison.from_json("{}")


def test_units_of_predicted_and_measured_losses_are_told_apart() -> None:
    original = Figures(1_000_000, 250_000, 120_000, 500_000.0)
    figures = Figures(800_000, 200_000, 90_000, 400_000.0, predicted_loss=0.1, loss_increase=0.12)
    row = Row("low_rank", "format", "uniform", "blocks", 0.8, 0.79, 3, figures)
    one = Comparison("tiny", original, "nats per token", 100, 1000, (row,))
    two = replace(one, unit="relative squared error of site outputs", measured_unit="nats per token")
    console = Console(width=110, file=io.StringIO())
    with console.capture() as capture:
        console.print(*comparison_tables(two), sep="\n")
    assert "Losses in relative squared error of site outputs predicted, in nats per token measured." in (
        capture.get()
    )
    labels = []
    for made in (one, two):
        axes = Figure().add_subplot()
        comparison_figures._draw(axes, "blocks: formats", made.rows, made)
        labels.append(axes.get_ylabel())
    assert labels == ["loss increase, nats per token"] * 2
    assert Comparison.from_json(json.dumps(two.to_json())) == two


TABLE = """\
tiny
1.0 MB, 500.0 k flops per token, loss 2.0000 on 100 tokens
Losses in nats per token.
blocks, 80.0 % of the bytes: what is lost
 method              kept     CR    FDL  predicted  measured    KL   top-1
 ─────────────────────────────────────────────────────────────────────────
 low_rank*         79.0 %  0.250  0.002        0.1      0.12  0.11  91.0 %
blocks, 80.0 % of the bytes: what it costs
 method              kept     bytes  numbers  linear    flops    fit
 ───────────────────────────────────────────────────────────────────
 low_rank*         79.0 %  800.0 kB  200.0 k  90.0 k  400.0 k  1.5 s
blocks, 80.0 % of the bytes: time
 method              kept   torch  ratio
 ───────────────────────────────────────
 low_rank*         79.0 %  9.0 ms   0.90
* allocated by the planner, the others the same share of every region.
ratio: to the original, timed in turns with it.
Note: 2 x too small: cp 0.8
"""


def test_the_table_as_a_whole() -> None:
    original = Figures(1_000_000, 250_000, 120_000, 500_000.0, loss=2.0)
    figures = Figures(
        800_000,
        200_000,
        90_000,
        400_000.0,
        compression_ratio=0.25,
        parameter_mae=0.002,
        predicted_loss=0.1,
        loss_increase=0.12,
        loss=2.12,
        kl=0.11,
        top1_agreement=0.91,
        fit_s=1.5,
        latency={"torch": Latency(0.009, 0.01)},
    )
    rows = (
        Row("low_rank", "format", "planned", "blocks", 0.8, 0.79, 3, figures),
        Row("cp", "format", "uniform", "blocks", 0.8, notes=("2 x too small",)),
    )
    made = Comparison("tiny\x1b", original, "nats per token", 100, 1000, rows)
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(*comparison_tables(made), sep="\n")
    shown = capture.get().replace("�", "").splitlines()
    assert [line.rstrip() for line in shown if line.strip()] == TABLE.splitlines()
