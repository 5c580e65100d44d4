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

LONGEST_AXIS = 16
"""Size to which an example's dynamic axes are cut for the checks; they go to twice that and one more."""

RELATIVE: Mapping[torch.dtype, float] = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2}
"""Largest difference allowed, as a share of the largest output; other orders of summation are well below."""


class Compared:
    """A report of an export: its ``differences`` from the original, by what was compared."""

    differences: Mapping[str, float]

    @property
    def max_difference(self) -> float:
        """The largest difference over all shapes."""
        return max(self.differences.values())


@dataclass(frozen=True)
class Case:
    """One set of inputs and what the original gives for it.

    Attributes:
        label: such as ``"batch=1, sequence=16"``.
    """

    label: str
    inputs: Inputs
    expected: tuple[Tensor, ...]


def shortened(run: Run, example: Inputs, axes: Axes) -> Inputs:
    """``example`` with dynamic axes of at most ``LONGEST_AXIS``: evenly spaced indices, so padding stays.

    Returned as it is where ``run`` refuses such sizes. What a graph does at every size shows at small ones,
    and the outputs of a language model at 512 tokens are as large as the model.
    """
    if all(example[name].shape[dim] <= LONGEST_AXIS for name, dims in axes.items() for dim in dims):
        return example
    labels = {label for dims in axes.values() for label in dims.values()}
    shorten = dict.fromkeys(labels, lambda size: min(size, LONGEST_AXIS))
    return next((case.inputs for case in _first_accepted(run, example, axes, [shorten])), example)


def make_cases(run: Run, example: Inputs, axes: Axes) -> Iterator[Case]:
    """The example (with its padded row), each dynamic axis at 1, and all of them longer than ever seen.

    ``run`` gives the expected outputs, case by case, as one is as large as the outputs are. A size that the
    original itself refuses (past its last position, say) is left out.
    """
    labels = sorted({label for dims in axes.values() for label in dims.values()})
    yield _case(run, example, axes, {})
    for label in labels:
        yield from _first_accepted(run, example, axes, [{label: lambda size: 1}])
    if labels:
        longer = (
            dict.fromkeys(labels, lambda size: 2 * size + 1),
            dict.fromkeys(labels, lambda size: size + 1),
        )
        yield from _first_accepted(run, example, axes, longer)


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
            value = value.index_select(dim, _indices(value.shape[dim], size))
            sizes.setdefault(label, size)
        inputs[name] = value.contiguous()
    label = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "the example"
    with torch.no_grad():
        return Case(label, inputs, tuple(run(inputs)))


def _indices(length: int, size: int) -> Tensor:
    """Evenly spaced with both ends, or over again: ids stay valid, masks keep their holes."""
    if size >= length:
        return torch.arange(size) % length
    return torch.linspace(0, length - 1, size).round().long()


def require_equal(
    case: Case, actual: Sequence[Tensor], rtol: float | None, names: Sequence[str] = ()
) -> float:
    """max |actual - expected| over valid positions of the floating outputs.

    The bound is ``rtol`` times the largest expected value of that output.

    Raises:
        VerificationError: a shape differs, or the difference exceeds the bound or is not a number; names
            the output and the index of the largest difference.
    """
    if len(actual) != len(case.expected):
        raise VerificationError(f"{len(actual)} outputs instead of {len(case.expected)}", where=case.label)
    worst = 0.0
    for index, (result, expected) in enumerate(zip(actual, case.expected, strict=True)):
        where = f"output {names[index] if names else index!r} at {case.label}"
        if result.shape != expected.shape:
            what = f"shape {tuple(result.shape)} instead of {tuple(expected.shape)}"
            raise VerificationError(what, where=where, fix="nothing was published; report this as a bug")
        if expected.is_floating_point() and expected.numel():
            worst = max(worst, _require_close(case, result, expected, rtol, where))
    return worst


def _require_close(case: Case, result: Tensor, expected: Tensor, rtol: float | None, where: str) -> float:
    visible = _visible(expected, case.inputs.get("attention_mask"))
    shape = expected.shape or (1,)
    difference, index, largest = _largest_difference(result.reshape(shape), expected.reshape(shape), visible)
    bound = (RELATIVE.get(expected.dtype, 2e-2) if rtol is None else rtol) * largest
    if math.isnan(difference) or difference > bound:
        what = f"the export differs from the original by {difference:.3g}, allowed is {bound:.3g}"
        where += f", most at index {list(index)} of shape {list(expected.shape)}"
        raise VerificationError(
            what, where=where, fix="nothing was published; raise rtol if this is acceptable"
        )
    return difference


def _largest_difference(
    result: Tensor, expected: Tensor, visible: Tensor
) -> tuple[float, tuple[int, ...], float]:
    """max |result - expected|, its index, and max |expected|; row by row, as outputs are large."""
    exact = torch.promote_types(expected.dtype, torch.float32)
    shown = visible.expand(expected.shape)

    def difference(row: int) -> Tensor:
        seen, wanted = result[row].to(exact), expected[row].to(exact)
        same = (seen == wanted) | (seen.isnan() & wanted.isnan()) | ~shown[row]
        return torch.where(same, 0.0, (seen - wanted).abs())

    rows = torch.stack([difference(row).max() for row in range(len(expected))])
    row = int(rows.argmax())  # NaN counts as the largest
    place = torch.unravel_index(difference(row).argmax(), expected.shape[1:])
    sizes = [
        torch.where(wanted.isfinite() & seen, wanted.abs(), 0.0).max()
        for wanted, seen in zip(expected, shown, strict=True)
    ]
    return float(rows[row]), (row, *map(int, place)), float(max(sizes))


def _visible(value: Tensor, mask: Tensor | None) -> Tensor:
    """Where the mask (batch, sequence) is on, in a shape that expands to ``value``'s.

    Rows hidden whole hold what each runtime likes.
    """
    if mask is None or mask.dim() != 2 or not value.dim() or value.shape[0] != mask.shape[0]:
        return torch.tensor(True)
    length = next((dim for dim in range(1, value.dim()) if value.shape[dim] == mask.shape[1]), None)
    shape = [len(mask)] + [1] * (value.dim() - 1)
    if length is None:
        return mask.bool().any(1).reshape(shape)
    shape[length] = mask.shape[1]
    return mask.bool().reshape(shape)
