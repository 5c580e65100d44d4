"""Inputs that stand for a program's example: its shapes and types, none of the data that it came from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from geofx.program import Program

SEED = 0


def with_stand_in(program: Program) -> Program:
    """``program`` with an example of the same shapes and types; of the old one only its largest id shows.

    Masks and scalars are kept. Integers count down from the largest that the example had and begin anew
    below 0, which keeps ids inside every table and away from the special tokens at its start;
    floating-point numbers are noise of a fixed seed.
    """
    example = {
        name: pytree.tree_map(partial(_stand_in, name), given) for name, given in program.example.items()
    }
    return replace(program, example=example)


def _stand_in(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.bool or name.endswith("mask") or value.dim() == 0 or value.numel() == 0:
        return value
    if not value.is_floating_point() and not value.is_complex():
        period = max(int(value.max()), 0) + 1
        ramp = period - 1 - torch.arange(value.numel(), device=value.device) % period
        return ramp.reshape(value.shape).to(value.dtype)
    generator = torch.Generator().manual_seed(SEED)
    kind: Any = torch.complex64 if value.is_complex() else torch.float32
    return torch.randn(value.shape, generator=generator, dtype=kind).to(value.device, value.dtype)
