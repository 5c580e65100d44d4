"""geofx generate: what an exported decoder writes."""

from __future__ import annotations

import dataclasses
import sys
import unicodedata
from pathlib import Path
from typing import Annotated

import typer

from geofx import cli_options as options
from geofx.cli_console import show_json, stderr_console, working
from geofx.errors import ConfigError
from geofx.runtime import Generator, Speed
from geofx.sampling import Sampling

BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Embeddings, overrides and isolates of direction, which can make text read as something else."""


def generate(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Of `geofx export OUT --onnx FOLDER/model.onnx --with-past`."),
    ],
    prompt: Annotated[str, typer.Argument(help="What to go on from; - reads it from stdin.")],
    tokens: Annotated[int, typer.Option(min=1, help="Write so many at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, 1 draws by probability.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many of the likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that have this share.")] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that are there come less.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    chat: Annotated[bool, typer.Option(help="Set the prompt into the tokenizer's chat template.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="Per operator; 0: as many as ONNX Runtime likes.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Write on from a prompt in ONNX Runtime; the text goes to stdout as it comes."""
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    given = _from_stdin() if prompt == "-" else prompt
    with working():
        generator = Generator(folder, threads=threads)
    written = ""
    for piece in generator.stream(given, max_new_tokens=tokens, sampling=sampling, chat=chat):
        written += piece
        if not as_json:
            typer.echo(_harmless(piece), nl=False)
    speed = generator.speed
    assert speed is not None
    if as_json:
        show_json({"text": written, **dataclasses.asdict(speed)})
    else:
        typer.echo()
        stderr_console().print(_said(speed))


def _from_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not {error.encoding}"
        raise ConfigError(what, where="stdin", fix="give text in this encoding") from error


def _harmless(text: str) -> str:
    """All letters, spaces and marks stay, and lines and tabs."""
    return "".join("\ufffd" if _is_control(part) else part for part in text)


def _is_control(character: str) -> bool:
    """Whether it would drive a terminal, or turn what stands around it."""
    if character in BIDI_CONTROLS:
        return True
    return unicodedata.category(character) == "Cc" and character not in "\n\t"


def _said(speed: Speed) -> str:
    rest = "" if speed.decode_per_s is None else f", then {speed.decode_per_s:.1f} tokens/s"
    return f"{speed.prompt_tokens} prompt tokens read in {speed.first_s:.2f} s{rest}"
