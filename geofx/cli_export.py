"""geofx export: a saved result as files for other runtimes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from geofx import cli_options as options
from geofx.batches import longest_sequence
from geofx.cli_console import show, show_json, working
from geofx.cli_results import EVAL_TOKENS, windows_of
from geofx.errors import ConfigError
from geofx.export.staging import target_file
from geofx.model import OptimizedModel
from geofx.report_rows import in_bytes
from geofx.restore import load
from geofx.sources import load_source

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".pt"}


def export(
    saved: options.Saved,
    onnx: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write an ONNX file, run and checked.")
    ] = None,
    torchscript: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write a TorchScript file.")
    ] = None,
    pt2: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write an archive of torch.export.")
    ] = None,
    with_past: Annotated[
        bool,
        typer.Option(help="The ONNX file is a decoder with its keys and values, in a folder of its own."),
    ] = False,
    dtype: Annotated[
        Literal["fp16"] | None, typer.Option(help="Type of the ONNX file's weights; by default the model's.")
    ] = None,
    int8: Annotated[
        bool, typer.Option(help="Hold matmul weights of the ONNX file in 8 bits, for ONNX Runtime alone.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Measure on it what the ONNX file loses; or 'python'."),
    ] = None,
    tokens: options.Tokens = EVAL_TOKENS,
    compiled: Annotated[
        bool, typer.Option(help="The .pt2 holds machine code for this kind of computer, by AOTInductor.")
    ] = False,
    original: options.Original = None,
    as_json: options.Json = False,
) -> None:
    """Export a saved result; it is published only after it ran and agreed.

    TorchScript, fp16 and decoders with their past are made from the model's own class, and need --original
    where that is not known.
    """
    paths = {"onnx": onnx, "pt2": pt2, "torchscript": torchscript}
    if not any(paths.values()):
        raise ConfigError("nothing to export to", fix="give --onnx PATH, --pt2 PATH or --torchscript PATH")
    _check_onnx(onnx, with_past or dtype or int8 or text, int8 and text is None)
    if compiled and pt2 is None:
        raise ConfigError("--compiled is of a .pt2 file", fix="give --pt2 PATH")
    for kind, path in paths.items():
        if path is not None:
            target_file(path, SUFFIXES[kind], own_folder=with_past and kind == "onnx")

    def to_onnx(result: OptimizedModel, path: Path) -> Any:
        longest, length = longest_sequence(result.config), options.WINDOW_TOKENS
        held = None if text is None else windows_of(saved, None, text, tokens, length, longest)
        half: Literal["float16"] | None = "float16" if dtype else None
        return result.to_onnx(path, with_past=with_past, dtype=half, int8=int8, holdout=held)

    makers: dict[str, Callable[[OptimizedModel, Path], Any]] = {
        "onnx": to_onnx,
        "pt2": lambda result, path: result.to_pt2(path, compiled=compiled),
        "torchscript": OptimizedModel.to_torchscript,
    }
    made: dict[str, dict[str, Any]] = {}
    with working() as progress:
        result = load(saved, module=None if original is None else load_source(original).model)
        if (torchscript or with_past or dtype) and result.module is None and result.rebuild is None:
            raise ConfigError("the model's own class is not known", fix="give --original MODEL")
        for kind, path in paths.items():
            if path is not None:
                with progress.step(f"export {kind}"):
                    made[kind] = _fields(makers[kind](result, path))
    if as_json:
        show_json(made)
        return
    for kind, fields in made.items():
        show(f"{kind}: {fields['path']}, {in_bytes(fields['size_bytes'])}{_lost(fields.get('fidelity'))}")


def _check_onnx(onnx: Path | None, special: object, unmeasured: bool) -> None:
    if onnx is None and special:
        what = "--with-past, --dtype, --int8 and --text are of an ONNX file"
        raise ConfigError(what, fix="give --onnx PATH; with the past, FOLDER/model.onnx")
    if unmeasured:
        raise ConfigError("what 8 bits lose has to be measured", where="--int8", fix="give --text FILE")


def _lost(fidelity: dict[str, Any] | None) -> str:
    if fidelity is None:
        return ""
    return f", {fidelity['loss_increase']:+.4f} {fidelity['unit']} on {fidelity['tokens']} tokens"


def _fields(report: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(report)
    return {name: value.name if isinstance(value, Path) else value for name, value in fields.items()}
