"""The report's figures as lines of text, the same in a terminal and in HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from geofx.report import RegionRow, Report

Format = Callable[[float], str]

ABSENT = "–"
MOST_VALIDATIONS = 12


@dataclass(frozen=True)
class Row:
    """One line of the comparison; ``change`` is empty where there is nothing to compare."""

    label: str
    original: str
    optimized: str
    change: str = ""


@dataclass(frozen=True)
class Cell:
    """Where a region stands on the map: which layer, and which matmul of that layer."""

    layer: int
    matmul: str
    region: RegionRow


def comparison(report: Report) -> tuple[Row, ...]:
    """Original against optimized, one row per figure that was taken of either."""
    rows = [_row(label, name, form, report) for label, name, form in FIGURES]
    return tuple(row for row in (*rows, *_timings(report), *_differences(report)) if row is not None)


def recovery_rows(report: Report) -> tuple[tuple[str, str, str], ...]:
    """(step, training, validation) of the training after the rewrite, thinned evenly between its ends."""
    history, most = report.recovery, MOST_VALIDATIONS
    if len(history) > most:
        history = tuple(history[index * (len(history) - 1) // (most - 1)] for index in range(most))
    return tuple(
        (
            _shown(item.get("step"), "{:.0f}".format),
            _shown(item.get("training"), in_loss),
            _shown(item.get("validation"), in_loss),
        )
        for item in history
    )


def heat_map(report: Report) -> tuple[Cell, ...]:
    """The regions whose name holds a layer number; ``a.layers.3.mlp.up.weight`` is (3, ``mlp.up``)."""
    cells = [_cell(region) for region in report.regions]
    return tuple(cell for cell in cells if cell is not None)


def plain(text: str) -> str:
    """``text`` without control characters, so that no name can drive a terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)


def in_bytes(value: float) -> str:
    """``538.1 MB``; MB is 10⁶ bytes."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.1f} {unit}"
    return f"{value:.0f} B"


def in_count(value: float) -> str:
    """``134.5 M``."""
    for power, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.1f} {unit}"
    return f"{value:.0f}"


def in_seconds(value: float) -> str:
    """``12.3 ms``, seconds from one second on, microseconds below one millisecond."""
    if 0.0 < value < 1e-3:
        return f"{value * 1e6:.1f} µs"
    return f"{value:.1f} s" if value >= 1.0 else f"{value * 1e3:.1f} ms"


def in_loss(value: float) -> str:
    """Four digits behind the point, or exponent form where those would all be zero."""
    return f"{value:.4f}" if value == 0.0 or abs(value) >= 1e-3 else f"{value:.2e}"


def in_percent(value: float) -> str:
    """``97.1 %``."""
    return f"{value:.1%}".replace("%", " %")


FIGURES: tuple[tuple[str, str, Format], ...] = (
    ("Bytes of weights", "size_bytes", in_bytes),
    ("All parameters", "parameters", in_count),
    ("Linear parameters", "linear_parameters", in_count),
    ("Flops per token", "flops_per_token", in_count),
    ("Bytes on disk", "disk_bytes", in_bytes),
    ("Bytes as ONNX", "onnx_bytes", in_bytes),
    ("Loss, held-out", "loss", in_loss),
    ("Perplexity, held-out", "perplexity", "{:.2f}".format),
    ("Latency, torch", "latency_torch_s", in_seconds),
    ("Latency, ONNX Runtime", "latency_onnx_s", in_seconds),
)


def _row(label: str, name: str, form: Format, report: Report) -> Row | None:
    before, after = getattr(report.original, name), getattr(report.optimized, name)
    if (before is None and after is None) or (name == "perplexity" and not _predicts_tokens(report)):
        return None
    return Row(label, _shown(before, form), _shown(after, form), _change(name, before, after))


def _timings(report: Report) -> Iterator[Row]:
    """Each target of a budget for the latency; the change is the median of ratios of neighbouring calls."""
    for item in report.timings:
        change = f"{item.ratio - 1.0:+.1%}".replace("%", " %")
        yield Row(
            f"Latency, {item.target}", in_seconds(item.original_s), in_seconds(item.optimized_s), change
        )


def _shown(value: float | None, form: Format) -> str:
    return ABSENT if value is None else form(value)


def _change(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    if name == "loss":
        return f"{after - before:+.4f}"
    return f"{after / before - 1.0:+.1%}".replace("%", " %") if before else ""


def _predicts_tokens(report: Report) -> bool:
    return report.figure("kl") is not None


def _differences(report: Report) -> Iterator[Row]:
    unit = f", {report.calibration.unit}" if report.calibration else ""
    shown: tuple[tuple[str, float | None, Format], ...] = (
        ("KL(original ‖ optimized), nats", report.figure("kl"), in_loss),
        ("Top-1 agreement", report.figure("top1_agreement"), in_percent),
        ("Relative L2 of the outputs", report.figure("relative_l2"), in_loss),
        ("Predicted latency, of the original's", report.predicted_latency_ratio, in_percent),
        (f"Predicted loss{unit}", report.predicted_loss, in_loss),
        ("Measured loss increase", report.measured_loss, in_loss),
    )
    for label, value, form in shown:
        if value is not None:
            yield Row(label, "", form(value))


def _cell(region: RegionRow) -> Cell | None:
    parts = region.name.split(".")
    number = next((position for position, part in enumerate(parts) if part.isdigit()), None)
    if number is None or len(parts[number]) > 4:
        return None
    rest = [part for part in parts[number + 1 :] if part != "weight"]
    return Cell(int(parts[number]), ".".join(rest) or ".".join(parts[:number]), region)
