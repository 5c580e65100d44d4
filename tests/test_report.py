"""The report: round trip, figures as text, escaped HTML that needs no network."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import platform
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from geofx.errors import ArtifactCorruptError
from geofx.report import CalibrationCard, Measured, RegionRow, Report, Stage
from geofx.report_figures import heat_map_svg, spectra_svg, stages_svg
from geofx.report_html import report_html
from geofx.report_rows import (
    comparison,
    heat_map,
    in_bytes,
    in_count,
    in_loss,
    in_seconds,
    plain,
    recovery_rows,
)
from geofx.report_table import region_table, report_tables

EVIL = "<img src=x onerror=alert(1)>\x1b]8;;http://evil\x07$x$"


def example(name: str = "model.layers.0.mlp.up.weight") -> Report:
    """A report with a value in every field."""
    return Report(
        model=name,
        budget="size at most 80 %",
        counting="tied weights once",
        original=Measured(1000, 250, 200, 400.0, 2.0, 0.010, 0.008, 1100, 1050),
        optimized=Measured(800, 200, 150, 300.0, 2.1, 0.009, 0.0075, 900, 840),
        predicted_loss=0.09,
        fidelity={"kl": 0.05, "top1_agreement": 0.875, "loss_increase": 0.1, "tokens": 63, "unit": "nats"},
        stages=(Stage("trace", 1.5, 10**9), Stage(name, 0.25)),
        calibration=CalibrationCard("two_sided", "nats per token", 512, 500, {"empty": 2}),
        regions=(
            RegionRow(
                name,
                "single",
                (4, 6),
                "low_rank",
                2,
                0.75,
                0.09,
                ("NO_GAIN: x",),
                0.5,
                2.5,
                3,
                (3.0, 2.0, 1.0),
            ),
            RegionRow("head.weight", "single", (4, 6), "dense"),
        ),
        notes=(name,),
    )


def test_round_trip() -> None:
    report = example()
    assert Report.from_json(json.dumps(report.to_json())) == report
    assert Report.from_json(report.to_json()) == report


def test_numbers_that_are_not_finite_become_null() -> None:
    report = dataclasses.replace(example(), fidelity={"sqnr_db": math.inf}, predicted_loss=math.nan)
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (data["fidelity"]["sqnr_db"], data["predicted_loss"]) == (None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra"),
        ({"model": 3}, "model"),
        ({"regions": [{"name": "a"}]}, r"regions\.0"),
        ({"original": {"size_bytes": "1"}}, r"original\.size_bytes"),
        ({"predicted_loss": math.nan}, "JSON|predicted_loss"),
    ],
)
def test_what_is_not_a_report_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactCorruptError, match=message):
        Report.from_json(json.dumps(example().to_json() | change), where="report.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", b"\xff"])
def test_what_is_not_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(ArtifactCorruptError, match="not a report"):
        Report.from_json(text)


def test_comparison() -> None:
    rows = {row.label: (row.original, row.optimized, row.change) for row in comparison(example())}
    assert rows == {
        "Bytes of weights": ("1.0 kB", "800 B", "-20.0 %"),
        "All parameters": ("250", "200", "-20.0 %"),
        "Linear parameters": ("200", "150", "-25.0 %"),
        "Flops per token": ("400", "300", "-25.0 %"),
        "Bytes on disk": ("1.1 kB", "840 B", "-20.0 %"),
        "Bytes as ONNX": ("1.1 kB", "900 B", "-18.2 %"),
        "Loss, held-out": ("2.0000", "2.1000", "+0.1000"),
        "Perplexity, held-out": ("7.39", "8.17", "+10.5 %"),
        "Latency, torch": ("10.0 ms", "9.0 ms", "-10.0 %"),
        "Latency, ONNX Runtime": ("8.0 ms", "7.5 ms", "-6.2 %"),
        "KL(original ‖ optimized), nats": ("", "0.0500", ""),
        "Top-1 agreement": ("", "87.5 %", ""),
        "Predicted loss, nats per token": ("", "0.0900", ""),
        "Measured loss increase": ("", "0.1000", ""),
    }


def test_figures_that_were_not_taken_are_left_out() -> None:
    bare = Report("m", "b", "c", Measured(parameters=10), Measured(loss=0.5))
    assert [row.label for row in comparison(bare)] == ["All parameters", "Loss, held-out"]
    assert comparison(bare)[0].optimized == "–"
    assert report_html(bare).count("<section>") == 2


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (in_bytes, 999, "999 B"),
        (in_bytes, 538_100_000, "538.1 MB"),
        (in_count, 134.5e6, "134.5 M"),
        (in_count, 12, "12"),
        (in_seconds, 0.0123, "12.3 ms"),
        (in_seconds, 61.0, "61.0 s"),
        (in_seconds, 30e-6, "30.0 µs"),
        (in_seconds, 0.00075, "750.0 µs"),
        (in_seconds, 0.0, "0.0 ms"),
        (in_loss, 0.19, "0.1900"),
        (in_loss, 0.00004, "4.00e-05"),
        (in_loss, 0.0, "0.0000"),
    ],
)
def test_units(form: Any, value: float, text: str) -> None:
    assert form(value) == text


def test_the_heat_map_reads_layer_and_matmul_from_the_name() -> None:
    names = ["a.layers.3.mlp.up.weight", "h.11.attn.c_attn.weight", "head.weight", "x.0.weight"]
    report = dataclasses.replace(
        example(), regions=tuple(RegionRow(name, "single", (2, 2), "dense") for name in names)
    )
    found = [(cell.layer, cell.matmul) for cell in heat_map(report)]
    assert found == [(3, "mlp.up"), (11, "attn.c_attn"), (0, "x")]


def test_the_recovery_is_shown_in_both_reports() -> None:
    history = ({"step": 0, "validation": 0.5}, {"step": 20, "validation": 0.25, "training": 0.375})
    report = dataclasses.replace(example(), recovery=history)
    assert recovery_rows(report) == (("0", "–", "0.5000"), ("20", "0.3750", "0.2500"))
    console = Console(file=io.StringIO(), width=80)
    console.print(*report_tables(report))
    for written in (console.file.getvalue(), Page(report_html(report)).text):  # type: ignore[attr-defined]
        for figure in (
            "Recovery",
            "validation",
            "0.5000",
            "0.3750",
            "0.2500",
        ):
            assert figure in written
    assert "Recovery" not in report_html(example())


def test_a_long_recovery_is_thinned_to_its_ends_and_between() -> None:
    history = tuple({"step": step, "validation": 1.0, "training": 1.0} for step in range(0, 2001, 20))
    rows = recovery_rows(dataclasses.replace(example(), recovery=history))
    assert len(rows) == 12
    assert (rows[0][0], rows[-1][0]) == ("0", "2000")


def test_a_plan_that_rewrites_nothing_has_no_table_of_regions() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(*report_tables(dataclasses.replace(example(), regions=(example().regions[1],))))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0 of 1 regions rewritten" in written
    assert "dearest" not in written


# --- HTML ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_figure_of_a_region_is_there_on_a_line_of_80_characters() -> None:
    report = example("model.layers.11.self_attn.q_proj.weight")
    row = dataclasses.replace(report.regions[0], factorization="low_rank_plus_sparse", rank=1024)
    row = dataclasses.replace(row, kept_ratio=1.0, loss=1.23e-07, rank_99=1024)
    console = Console(file=io.StringIO(), width=80)
    console.print(region_table(dataclasses.replace(report, regions=(row,)), 12))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("low_rank_plus_sparse", "1024", "100.0 %", "1.23e-07", "1024 │"):
        assert text in written


def test_a_spectrum_is_shaded_only_where_a_rank_cuts_it() -> None:
    row = example().regions[0]
    monarch = dataclasses.replace(row, factorization="monarch")
    shaded = "#d9534f"
    assert shaded in spectra_svg(dataclasses.replace(example(), regions=(row,)))
    assert shaded not in spectra_svg(dataclasses.replace(example(), regions=(monarch,)))


def test_row_123_names_are_escaped_in_html() -> None:
    page = Page(report_html(example(f"model.layers.0.{EVIL}.weight")))
    assert not [tag for tag, _ in page.tags if tag in ("img", "script", "iframe", "link", "object")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<img src=x onerror=alert(1)>" in page.text  # there to be read, not to be run
    assert "\x1b" not in page.text
    assert "\x07" not in page.text


def test_row_123_svg_labels_are_escaped() -> None:
    report = example(f"model.layers.0.{EVIL[:20]}.weight")
    for drawing in (heat_map_svg(report), spectra_svg(report), stages_svg(report)):
        assert drawing.startswith("<svg")
        assert "<img" not in drawing
        assert "<metadata" not in drawing
        assert html.escape("<img") in drawing


def test_html_fetches_nothing_and_runs_nothing() -> None:
    text = report_html(example())
    page = Page(text)
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    links = [
        value for _, a in page.tags for name, value in a.items() if name in ("src", "href", "xlink:href")
    ]
    assert links
    assert all(value is not None and value.startswith(("#", "data:image/png;base64,")) for value in links)
    assert "url(http" not in text
    assert "@import" not in text


def test_row_125_no_path_and_no_name_in_the_report() -> None:
    text = json.dumps(example().to_json()) + report_html(example())
    for secret in (str(Path.home()), str(Path.cwd()), platform.node()):
        assert len(secret) < 2 or secret not in text
    assert Path.home().name not in json.dumps(example().to_json()["environment"])


def test_figures_are_the_same_every_time() -> None:
    assert report_html(example()) == report_html(example())


# --- terminal --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [20, 80])
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_row_132_any_width_and_encoding(width: int, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = Console(file=stream, width=width, no_color=True)
    for part in report_tables(example()):
        console.print(part)
    stream.flush()
    written = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert max(map(len, written.splitlines())) <= width
    assert "low_rank" in written.replace("\n", "") or width == 20


def test_row_123_names_cannot_drive_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=True, color_system=None)
    for part in report_tables(example(f"[red]{EVIL}[/red]")):
        console.print(part)
    assert "\x1b]8" not in stream.getvalue()
    assert "\x07" not in stream.getvalue()
    assert "[red]<img" in stream.getvalue()  # markup in a name is text
    assert plain("a\x1b[2Jb\n\x9b") == "a�[2Jb��"
