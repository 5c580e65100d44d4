"""Inputs of other sizes than the example's, and the distance between two outputs on valid positions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geofx.errors import VerificationError

logger = logging.getLogger(__name__)

Axes = Mapping[str, Mapping[int, str]]
Inputs = Mapping[str, Tensor]
Resize = Mapping[str, Callable[[int], int]]
Run = Callable[[Inputs], Sequence[Tensor]]

RELATIVE: Mapping[torch.dtype, float] = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2}
"""Largest difference allowed, as a share of the largest output; other orders of summation are well below."""


@dataclass(frozen=True)
class Case:
    """One set of inputs and what the original gives for it.

    Attributes:
        label: such as ``"batch=1, sequence=16"``.
    """

    label: str
    inputs: Inputs
    expected: tuple[Tensor, ...]


def make_cases(run: Run, example: Inputs, axes: Axes) -> list[Case]:
    """The example (with its padded row), each dynamic axis at 1, and all of them longer than ever seen.

    ``run`` gives the expected outputs. A size that the original itself refuses (past its last
    position, say) is left out.
    """
    labels = sorted({label for dims in axes.values() for label in dims.values()})
    cases = [_case(run, example, axes, {})]
    for label in labels:
        cases += _first_accepted(run, example, axes, [{label: lambda size: 1}])
    if labels:
        longer = (
            dict.fromkeys(labels, lambda size: 2 * size + 1),
            dict.fromkeys(labels, lambda size: size + 1),
        )
        cases += _first_accepted(run, example, axes, longer)
    return cases


def _first_accepted(run: Run, example: Inputs, axes: Axes, trials: Iterable[Resize]) -> Iterator[Case]:
    for resize in trials:
        try:
            yield _case(run, example, axes, resize)
            return
        except (RuntimeError, IndexError, ValueError, AssertionError) as error:
            logger.warning("the original does not run at another size: %s", str(error).split("\n")[0])


def _case(run: Run, example: Inputs, axes: Axes, resize: Resize) -> Case:
    sizes: dict[str, int] = {}
    inputs: dict[str, Tensor] = {}
    for name, value in example.items():
        for dim, label in axes.get(name, {}).items():
            size = resize.get(label, int)(value.shape[dim])
            value = value.index_select(
                dim, torch.arange(size) % value.shape[dim]
            )  # ids stay valid, masks keep holes
            sizes.setdefault(label, size)
        inputs[name] = value.contiguous()
    label = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "the example"
    with torch.no_grad():
        return Case(label, inputs, tuple(run(inputs)))


def require_equal(
    case: Case, actual: Sequence[Tensor], rtol: float | None, names: Sequence[str] = ()
) -> float:
    """max |actual - expected| over valid positions of the floating outputs.

    The bound is ``rtol`` times the largest expected value of that output.

    Raises:
        VerificationError: a shape differs, or the difference exceeds the bound or is not a number.
    """
    if len(actual) != len(case.expected):
        raise VerificationError(f"{len(actual)} outputs instead of {len(case.expected)}", where=case.label)
    worst = 0.0
    for index, (result, expected) in enumerate(zip(actual, case.expected, strict=True)):
        where = f"output {names[index] if names else index!r} at {case.label}"
        if result.shape != expected.shape:
            what = f"shape {tuple(result.shape)} instead of {tuple(expected.shape)}"
            raise VerificationError(what, where=where, fix="nothing was published; report this as a bug")
        if expected.is_floating_point():
            worst = max(worst, _require_close(case, result, expected, rtol, where))
    return worst


def _require_close(case: Case, result: Tensor, expected: Tensor, rtol: float | None, where: str) -> float:
    seen, wanted = (_valid(value.double(), case.inputs.get("attention_mask")) for value in (result, expected))
    if not wanted.numel():
        return 0.0
    same = (seen == wanted) | (seen.isnan() & wanted.isnan())
    difference = float(torch.where(same, 0.0, (seen - wanted).abs()).max())
    finite = wanted[wanted.isfinite()].abs()
    bound = (RELATIVE.get(expected.dtype, 2e-2) if rtol is None else rtol) * float(
        finite.max() if finite.numel() else 0
    )
    if math.isnan(difference) or difference > bound:
        what = f"the export differs from the original by {difference:.3g}, allowed is {bound:.3g}"
        raise VerificationError(
            what, where=where, fix="nothing was published; raise rtol if this is acceptable"
        )
    return difference


def _valid(value: Tensor, mask: Tensor | None) -> Tensor:
    """``value`` where the mask (batch, sequence) is on; rows hidden whole hold what each runtime likes."""
    if mask is None or mask.dim() != 2 or not value.dim() or value.shape[0] != mask.shape[0]:
        return value
    length = next((dim for dim in range(1, value.dim()) if value.shape[dim] == mask.shape[1]), None)
    if length is None:
        return value[mask.bool().any(1)]
    return value.movedim(length, 1)[mask.bool()]
