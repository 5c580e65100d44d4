"""Inputs of a chosen batch and length, from the example that a program was traced with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from geofx.errors import ConfigError, first_line
from geofx.program import Program

BENCH_SIZES = {"batch": 1, "sequence": 128}


def bench_inputs(program: Program, batch: int | None, length: int | None) -> dict[str, Tensor]:
    """The program's example, repeated or cut to ``batch`` rows of ``length`` tokens; masks are all ones.

    A model that cannot take the default length, such as one of 64 positions, gets that of its example.

    Raises:
        ConfigError: a size is given that no input of the program has, or that the program cannot run.
    """
    sizes = {"batch": batch, "sequence": length}
    known = {label for dims in program.dynamic_shapes.values() for label in dims.values()}
    for label, option in (("batch", "--batch"), ("sequence", "--length")):
        if sizes[label] is not None and label not in known:
            what = f"{option} has no effect: no input of the model varies so"
            raise ConfigError(what, where=", ".join(program.input_names), fix=f"leave out {option}")
    wanted = {label: sizes[label] or default for label, default in BENCH_SIZES.items()}
    made = _of_sizes(program, wanted)
    refusal = _refusal(program, made)
    if refusal is not None and length is None:
        made = _of_sizes(program, {"batch": wanted["batch"]})
        refusal = _refusal(program, made)
    if refusal is not None:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in made.items())
        what = f"the model cannot run inputs of these sizes: {first_line(refusal)}"
        raise ConfigError(what, where=shapes, fix="give a smaller --length or --batch") from refusal
    return made


def _of_sizes(program: Program, wanted: Mapping[str, int]) -> dict[str, Tensor]:
    return {
        name: _resized(name, value, program.dynamic_shapes.get(name, {}), wanted)
        for name, value in program.example.items()
    }


def _refusal(program: Program, inputs: Mapping[str, Tensor]) -> Exception | None:
    """What the program raises on these inputs."""
    try:
        with torch.no_grad(), program.buffers_kept():
            program(**inputs)
    except (IndexError, RuntimeError) as error:
        return error
    return None


def _resized(name: str, value: Tensor, labels: Mapping[int, str], wanted: Mapping[str, int]) -> Tensor:
    for dim, label in labels.items():
        if label in wanted:
            value = value.index_select(dim, torch.arange(wanted[label]) % value.shape[dim])
    return torch.ones_like(value) if name.endswith("mask") and not value.is_floating_point() else value
