"""geofx bench: how long a saved result takes, and what an exported decoder reads and writes per second."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from geofx import cli_options as options
from geofx.batches import longest_sequence
from geofx.bench_inputs import bench_inputs
from geofx.cli_console import show, show_json, working
from geofx.cli_original import original_of
from geofx.decoder_bench import DecoderFigures, Load, Spread, bench_decoders
from geofx.errors import ConfigError
from geofx.export.genai import FILE as GENAI
from geofx.export.onnx_decoder import to_onnx_decoder
from geofx.export.onnx_runtime import OnnxRunner
from geofx.exported_decoder import require_room
from geofx.folder import MANIFEST
from geofx.latency import interleaved_medians
from geofx.progress import Progress
from geofx.report_rows import in_bytes, in_seconds
from geofx.report_table import figures_table
from geofx.restore import load
from geofx.sources import load_source


def bench(
    saved: Annotated[str, typer.Argument(metavar="OUT", help="What geofx saved, or an exported decoder.")],
    original: options.Original = None,
    onnx: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Its ONNX export, to be timed too.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Compare decoders in ONNX Runtime: with this folder or MODEL."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a call; by default 1.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a row; by default 128.")] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens that a decoder writes; by default 64.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Calls of each; by default 7, decoders 10.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Time a saved result, in turns with the original if that is given; or decoders, prompt and text.

    With --against, what is not an exported decoder is exported for the time of the measurement.
    """
    if against is not None:
        if original is not None or onnx is not None:
            raise ConfigError("--against is without --original and --onnx", fix="give BASE alone")
        wanted = Load(batch or 1, length or 128, new_tokens or 64)
        _bench_decoders(saved, against, wanted, rounds or 10, as_json)
    else:
        _require_no_decoder(Path(saved), new_tokens)
        _bench_calls(Path(saved), original, onnx, (batch, length), rounds or 7, as_json)


def _require_no_decoder(saved: Path, new_tokens: int | None) -> None:
    """Raises ConfigError where what is wanted takes --against."""
    if (saved.expanduser() / GENAI).is_file():
        fix = "give --against BASE: the folder of another one, or the original MODEL"
        raise ConfigError("an exported decoder is timed beside another one", where=saved.name, fix=fix)
    if new_tokens is not None:
        raise ConfigError("--new-tokens is of decoders", fix="give --against BASE, or leave it out")


def _bench_calls(
    saved: Path,
    original: str | None,
    onnx: Path | None,
    sizes: tuple[int | None, int | None],
    rounds: int,
    as_json: bool,
) -> None:
    if onnx is not None and not onnx.is_file():
        raise ConfigError("no such ONNX file", where=str(onnx), fix="make it with geofx export")
    with working() as progress:
        result = load(saved)
        inputs = bench_inputs(result.program, *sizes)
        calls: dict[str, Callable[[], object]] = {}
        if original is not None:
            program = original_of(result, load_source(original))
            calls["original, torch"] = lambda: program(**inputs)
        calls["optimized, torch"] = lambda: result.program(**inputs)
        if onnx is not None:
            runner = OnnxRunner(onnx)
            calls["optimized, ONNX Runtime"] = lambda: runner(inputs)
        with torch.no_grad():
            seconds = interleaved_medians(calls, rounds, progress)
    if as_json:
        shapes = {name: list(value.shape) for name, value in inputs.items()}
        show_json({"inputs": shapes, "rounds": rounds, "seconds": seconds})
        return
    table = figures_table(f"median of {rounds}", {name: in_seconds(value) for name, value in seconds.items()})
    show(table, ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items()))


def _bench_decoders(saved: str, against: str, wanted: Load, rounds: int, as_json: bool) -> None:
    with working() as progress, tempfile.TemporaryDirectory() as scratch:
        folders = {
            name: _exported(given, Path(scratch) / name, wanted, progress)
            for name, given in (("base", against), ("optimized", saved))
        }
        found = bench_decoders(folders, wanted, rounds=rounds, progress=progress)
    if as_json:
        rows = {name: dataclasses.asdict(figures) for name, figures in found.items()}
        show_json({"load": dataclasses.asdict(wanted), "rounds": rounds, "decoders": rows})
        return
    said = f"{wanted.rows} x {wanted.prompt_tokens} tokens read, {wanted.new_tokens} written, greedily"
    show(_table(found, rounds), f"ONNX Runtime, {said}; medians and quartiles, ratios turn by turn")


def _exported(given: str, scratch: Path, wanted: Load, progress: Progress) -> Path:
    """The folder of an exported decoder: ``given`` or, made of it, ``scratch``."""
    folder = Path(given).expanduser()
    if (folder / GENAI).is_file():
        return folder
    longest, export = _export_of(given)
    if longest is not None:
        require_room(longest, wanted.prompt_tokens, wanted.new_tokens)
    scratch.mkdir()
    progress(f"export {folder.name}", 0, 1)
    export(scratch / "model.onnx")
    progress(f"export {folder.name}", 1, 1)
    return scratch


def _export_of(given: str) -> tuple[int | None, Callable[[Path], object]]:
    """How much a saved result or a model reads, where that is known, and its export."""
    folder = Path(given).expanduser()
    if (folder / MANIFEST).is_file():
        result = load(folder)
        return longest_sequence(result.config), functools.partial(result.to_onnx, with_past=True)
    source = load_source(given)
    return source.max_positions, functools.partial(to_onnx_decoder, source.model)


def _table(found: Mapping[str, DecoderFigures], rounds: int) -> Table:
    table = Table(f"medians of {rounds}", *found, "ratio", header_style="bold")
    base, optimized = found.values()
    rows: dict[str, tuple[Callable[[DecoderFigures], str], float]] = {
        "file": (lambda item: in_bytes(item.size_bytes), optimized.size_bytes / base.size_bytes),
        "memory": (lambda item: in_bytes(item.memory_bytes), optimized.memory_bytes / base.memory_bytes),
        "first token": (lambda item: in_seconds(item.first_s.median), 1 / optimized.prefill_ratio),
        "prompt tokens/s": (lambda item: _spread(item.prefill_per_s), optimized.prefill_ratio),
        "written tokens/s": (lambda item: _spread(item.decode_per_s), optimized.decode_ratio),
    }
    for name, (shown, ratio) in rows.items():
        table.add_row(name, *map(shown, found.values()), f"{ratio:.3f}")
    return table


def _spread(value: Spread) -> str:
    return f"{value.median:.1f} ({value.low:.1f} to {value.high:.1f})"
