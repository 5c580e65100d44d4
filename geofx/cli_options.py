"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from geofx.batches import Batch
from geofx.budget import Amount, Budget
from geofx.effort import Level
from geofx.errors import CalibrationError, ConfigError
from geofx.patterns import matching
from geofx.sources import Source, call_named
from geofx.target import Target
from geofx.text import WINDOW_TOKENS as WINDOW_TOKENS
from geofx.text import Texts, python_text, require_file, windows
from geofx.trace import forward_names

CALIBRATION_TOKENS = 24576
BATCH_ROWS = 2
PYTHON_TEXT = "python"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder or hub id, a .gguf file, module:function, smollm2 or minilm.",
    ),
]
Saved = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that geofx saved.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to save the result in.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what geofx saved there before.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Text = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="UTF-8 text to calibrate on, or 'python' for Python's own manual."),
]
Data = Annotated[
    str | None,
    typer.Option(metavar="MODULE:FUNCTION", help="Function that returns batches, instead of text."),
]
Holdout = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Text to verify on; by default an eighth of the calibration."),
]
Tokens = Annotated[int, typer.Option(min=2, help="How many tokens of the text to use.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per window, as far as the model takes so many.")]
Mode = Annotated[
    Literal["two_sided", "forward", "data_free"],
    typer.Option(help="Statistics: forward and backward, forward only, or from the weights alone."),
]
Effort = Annotated[
    Level,
    typer.Option(
        help="fast: one pass over the calibration data. balanced, about 3 times as long: an eighth of it "
        "is kept to choose and to set the predicted loss on, and the model writes as much text again. "
        "best, 6 to 9 times: it writes twice as much, and optimize refines the factors."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of what the analysis draws.")]
Size = Annotated[
    str | None, typer.Option(metavar="AMOUNT", help="Bytes: a share (0.8, 80%) or 120MB, 350MiB.")
]
Parameters = Annotated[str | None, typer.Option(metavar="AMOUNT", help="Numbers stored: a share or a count.")]
Flops = Annotated[str | None, typer.Option(metavar="AMOUNT", help="Flops per token: a share or a count.")]
Latency = Annotated[
    str | None, typer.Option(metavar="AMOUNT", help="Time of a call, as measured: a share (0.8) or 12ms.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="RUNTIME",
        help="What --latency is of: eager, compile or onnxruntime, and what differs from "
        "eager,device=cpu,batch=1,tokens=128. May be given several times, with weight=.",
    ),
]
Loss = Annotated[
    float | None, typer.Option(help="Largest predicted increase of the loss, in nats per token.")
]
Scope = Annotated[
    Literal["model", "factorizable"], typer.Option(help="What shares and limits are of: all, or the matmuls.")
]
Include = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Only these weights; glob or re:REGEX.")
]
Ignore = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Not these weights; glob or re:REGEX.")
]
KeptAnalysis = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep the analysis here; it is used again if it is there."),
]
Original = Annotated[str | None, typer.Option(metavar="MODEL", help="The original model, to compare with.")]


def given(context: typer.Context) -> set[str]:
    """The names of the options that stand on the command line, so not those left at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def budget_of(
    size: str | None,
    parameters: str | None,
    flops: str | None,
    latency: str | None,
    loss: float | None,
    scope: Any,
) -> Budget:
    """The budget that the options ask for.

    Raises:
        ConfigError: none was given, or one has no accepted form.
    """
    amounts = {"size": size, "parameters": parameters, "flops": flops, "latency": latency}
    return Budget(**{name: _amount(name, text) for name, text in amounts.items()}, loss=loss, scope=scope)


def targets_of(texts: Iterable[str] | None, latency: str | None) -> tuple[Target, ...] | None:
    """``onnxruntime,tokens=512,weight=2`` as a target.

    Raises:
        ConfigError: it has another form, or there is no budget for the latency.
    """
    if not texts:
        return None
    if latency is None:
        raise ConfigError("--target says what --latency is of", fix="give --latency 0.8")
    return tuple(_target(text) for text in texts)


def _target(text: str) -> Target:
    runtime, *settings = text.split(",")
    pairs = dict(setting.partition("=")[::2] for setting in settings)
    numbers = {"batch": int, "tokens": int, "weight": float}
    known = {**numbers, "device": str, "dtype": str}
    for name in pairs:
        if name not in known:
            raise ConfigError(f"no setting {name!r}", where=text, fix=f"use {', '.join(known)}")
    try:
        return Target(runtime, **{name: known[name](value) for name, value in pairs.items()})  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(
            f"a target's setting is no number: {error}", where=text, fix="give tokens=128"
        ) from error


def shares_of(text: str, whole: bool = False) -> list[float]:
    """``0.9,0.8`` as numbers between 0 and 1, or 1 too where the ``whole`` is a share like others.

    Raises:
        ConfigError: it is something else.
    """
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} are no shares", fix="give 0.8 or 0.9,0.8,0.6") from None
    for share in shares:
        if not (0.0 < share < 1.0 or (whole and share == 1.0)):
            fix = "give shares above 0 and at most 1" if whole else "give shares between 0 and 1"
            raise ConfigError(f"{share} is not a share that can be kept", fix=fix)
    return shares


def check_loss(loss: float | None, mode: Mode) -> None:
    """Raises before any work if a budget for the loss is asked of statistics that do not measure it."""
    if loss is not None and mode != "two_sided":
        raise ConfigError(
            f"--loss needs gradients, and --mode {mode} takes none",
            fix="use --mode two_sided, or another budget than --loss",
        )


def check_data(text: str | None, data: str | None, holdout: str | None, needed: bool = True) -> None:
    """Raises before any work if what would be read later is not there."""
    if text and data:
        raise ConfigError("both --text and --data were given", fix="give one of them")
    if needed and not text and not data:
        raise ConfigError(
            "there is nothing to calibrate on",
            fix="give --text FILE, --data module:function or --mode data_free",
        )
    for name in (text, holdout):
        if name is not None and name != PYTHON_TEXT:
            require_file(Path(name))


def check_patterns(source: Source, include: Iterable[str] | None, ignore: Iterable[str] | None) -> None:
    """Raises before any work if a pattern matches no parameter at all."""
    names = [name for name, _ in source.model.named_parameters(remove_duplicate=False)]
    matching(names, include or (), ignore or ())


def calibration_of(
    source: Source, text: str | None, data: str | None, holdout: str | None, tokens: int, length: int
) -> tuple[Any, list[Batch] | None]:
    """(calibration, held-out) batches; either may be None."""
    calibration = None if data is None else call_named(data)
    held = None
    if text is not None:
        calibration = _batches(
            source, python_text()[0] if text == PYTHON_TEXT else Path(text), tokens, length
        )
    if holdout is None and text == PYTHON_TEXT:
        holdout = PYTHON_TEXT
    if holdout is not None:
        held = _batches(source, corpus(holdout), max(length, tokens // 8), length)
    return calibration, held


def corpus(text: str) -> Texts:
    """The held-out part of Python's manual, or a file."""
    return python_text()[1] if text == PYTHON_TEXT else Path(text)


def example_of(source: Source, calibration: Any) -> Any:
    """Inputs to trace with where there is no calibration data; None where there is.

    Raises:
        ConfigError: the model says none that it takes.
    """
    if calibration is not None:
        return None
    if source.tokenizer is not None:
        ids = source.tokenizer("An example to trace with.")["input_ids"]
        rows = torch.tensor([ids, ids])
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    made = getattr(source.model, "dummy_inputs", None) or {}
    if not set(made) & set(forward_names(source.model)):
        fix = "give --data module:function; its first batch is traced with"
        raise ConfigError("there are no inputs to trace the model with", where=source.description, fix=fix)
    return made


def _batches(source: Source, texts: Texts, tokens: int, length: int) -> list[Batch]:
    if source.tokenizer is None:
        raise CalibrationError(
            "the model came without a tokenizer", fix="give --data module:function instead of text"
        )
    return list(
        windows(
            texts,
            source.tokenizer,
            length=length,
            batch_size=BATCH_ROWS,
            limit_tokens=tokens,
            max_positions=source.max_positions,
            vocabulary=source.vocabulary,
        )
    )


def _amount(name: str, text: str | None) -> Amount | None:
    """``"0.8"`` is a share, ``"120000000"`` and ``"1e9"`` are counts; anything with a unit stays as it is.

    Raises:
        ConfigError: a number that is neither a share nor a count.
    """
    try:
        number = None if text is None else float(text)
    except ValueError:
        return text
    if text is None or number is None:
        return None
    if 0.0 < number <= 1.0 and re.search(r"[.e]", text.lower()):
        return number
    if number > 1.0 and math.isfinite(number) and number.is_integer():
        return int(text) if text.isdecimal() else int(number)
    if number == 1.0:
        what, fix = f"--{name} {text} may be all of it or one", "give 1.0 for all of it, or a count above 1"
    else:
        what = f"--{name} {text} is neither a share nor a count"
        fix = "give a share above 0 and up to 1.0, such as 0.8, or a whole number above 1"
    raise ConfigError(what, fix=fix)
