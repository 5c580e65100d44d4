"""Original against optimized on held-out data: what the rewrite really cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from geofx.batches import Batch, inputs_of, of_the_data
from geofx.errors import CalibrationError, NumericsError
from geofx.objective import (
    ROWS,
    NextToken,
    Objective,
    SquaredError,
    log_probabilities,
    logits_of,
    next_tokens,
    token_count,
    valid_outputs,
)
from geofx.program import OUTPUTS_LIMIT, Program, Remembered
from geofx.progress import Progress, log_progress

HELD_OUT, SEEN = "held-out batches", "the batches that it was calibrated on"
VALIDATION = "the batches that the best state was chosen on"
CHUNK = 2**18
"""Numbers that are compared at once: what is computed of them fits into a cache."""


@dataclass(frozen=True)
class Fidelity:
    """How far the optimized model is from the original.

    Attributes:
        loss_original: mean loss per term of the original; None where the loss is the difference itself.
        loss_optimized: likewise, optimized.
        loss_increase: their difference, or the relative squared error of the outputs.
        kl: mean KL(original ‖ optimized) of the next token, in nats; None without tokens.
        top1_agreement: share of tokens with the same most likely successor; None without tokens.
        relative_l2: ‖Δy‖ / ‖y‖ over all outputs.
        sqnr_db: -20 log10 of it.
        parameter_mae: mean |v - v̂| over all parameters (Definition 5 of the taxonomy).
        tokens: number of loss terms measured on; of tokens, or rows, where the loss is no sum of such terms.
        unit: of the losses.
        data: what was measured on.
    """

    loss_original: float | None
    loss_optimized: float | None
    loss_increase: float
    kl: float | None
    top1_agreement: float | None
    relative_l2: float
    sqnr_db: float
    parameter_mae: float
    tokens: int
    unit: str
    data: str = HELD_OUT

    @property
    def accuracy(self) -> float:
        """ACC(y, ŷ), Definition 4: the optimized model's mean loss, or distance to the original's outputs."""
        return self.loss_increase if self.loss_optimized is None else self.loss_optimized


@dataclass
class _Sums:
    original: float = 0.0
    optimized: float = 0.0
    terms: float = 0.0
    divergence: float = 0.0
    agreeing: float = 0.0
    predictions: int = 0
    tokens: float = 0.0
    error: float = 0.0
    power: float = 0.0


@dataclass
class Reference:
    """The original and its outputs on batches that were asked for before, up to ``limit`` bytes of them."""

    program: Program
    limit: int = OUTPUTS_LIMIT

    def __post_init__(self) -> None:
        self._outputs = Remembered(lambda batch: self.program(**inputs_of(self.program, batch)), self.limit)

    def __call__(self, batch: Batch) -> Any:
        """The outputs on a batch, which is told by identity."""
        return self._outputs(batch)


class Runnable(Protocol):
    """What is measured: a `geofx.program.Program`, or something that runs like one."""

    def __call__(self, **inputs: Tensor) -> Any:
        """The outputs."""
        ...

    def buffers_kept(self) -> AbstractContextManager[None]:
        """What runs within leaves no trace."""
        ...


def verify(
    original: Program | Reference,
    optimized: Runnable,
    batches: Iterable[Batch],
    objective: Objective,
    parameter_mae: float = 0.0,
    progress: Progress = log_progress,
) -> Fidelity:
    """Run both programs on ``batches`` and compare; a `Reference` is run once on each.

    Raises:
        NumericsError: the optimized program gives values, or has a loss, that are not finite.
        CalibrationError: the original cannot run on a batch, or has no finite loss there.
    """
    sums, held = _Sums(), list(batches)
    reference = original if isinstance(original, Reference) else Reference(original, limit=0)
    progress("verify", 0, len(held))
    with torch.no_grad(), reference.program.buffers_kept(), optimized.buffers_kept():
        for done, batch in enumerate(held):
            inputs = inputs_of(reference.program, batch)
            with of_the_data(f"held-out batch {done}"):
                before = reference(batch)
            _compare(sums, before, optimized(**inputs), batch | inputs, objective)
            progress("verify", done + 1, len(held))
    return _fidelity(sums, objective, parameter_mae)


def _compare(sums: _Sums, before: Any, after: Any, batch: Batch, objective: Objective) -> None:
    first, second = valid_outputs(before, batch), valid_outputs(after, batch)
    for one, other in zip(first, second, strict=True):
        pairs = zip(*(torch.split(value.flatten(), CHUNK) for value in (one, other)), strict=True)
        for wanted, given in pairs:
            error = float((wanted.float() - given.float()).square().sum())
            power = float(wanted.float().square().sum())
            if not math.isfinite(error + power):
                error, power = _finite_part(wanted, given)
            sums.error += error
            sums.power += power
    original, optimized, terms = objective.compare(before, after, batch)
    sums.original, sums.optimized, sums.terms = (
        sums.original + original,
        sums.optimized + optimized,
        sums.terms + terms,
    )
    sums.tokens += token_count(batch)
    if isinstance(objective, NextToken):
        _compare_tokens(sums, logits_of(before), logits_of(after), batch, objective.ids)


def _finite_part(wanted: Tensor, given: Tensor) -> tuple[float, float]:
    """(Σ ‖Δy‖², Σ ‖y‖²) over what the original gives finite, as infinities say never or always."""
    kept = wanted.isfinite()
    if not given[kept].isfinite().all():
        raise NumericsError("the optimized model gives values that are not finite", fix="raise the budget")
    one, other = wanted[kept].double(), given[kept].double()
    return float((one - other).square().sum()), float(one.square().sum())


def _compare_tokens(sums: _Sums, before: Tensor, after: Tensor, batch: Batch, ids: str) -> None:
    places, _ = next_tokens(batch, ids)
    for rows in torch.split(places, ROWS):
        p, q = (log_probabilities(logits.flatten(0, 1)[rows]) for logits in (before, after))
        sums.divergence += float(functional.kl_div(q, p, log_target=True, reduction="sum"))
        sums.agreeing += float((p.argmax(-1) == q.argmax(-1)).sum())
    sums.predictions += len(places)


def _fidelity(sums: _Sums, objective: Objective, parameter_mae: float) -> Fidelity:
    terms, tokens = max(sums.terms, 1e-30), sums.predictions
    difference_only = isinstance(objective, SquaredError)
    if sums.terms <= 0.0 and not difference_only:
        raise CalibrationError("the held-out data has no loss term", fix="pass longer texts")
    if not math.isfinite(sums.original):
        raise CalibrationError("the original's own loss is not finite", where="held-out data")
    if not math.isfinite(sums.optimized):
        raise NumericsError("the optimized model's loss is not finite", fix="raise the budget")
    relative = math.sqrt(sums.error / sums.power) if sums.power > 0.0 else 0.0
    return Fidelity(
        loss_original=None if difference_only else sums.original / terms,
        loss_optimized=None if difference_only else sums.optimized / terms,
        loss_increase=(sums.optimized - sums.original) / terms,
        kl=sums.divergence / tokens if tokens else None,
        top1_agreement=sums.agreeing / tokens if tokens else None,
        relative_l2=relative,
        sqnr_db=-20.0 * math.log10(relative) if relative > 0.0 else math.inf,
        parameter_mae=parameter_mae,
        tokens=round(sums.tokens if difference_only else tokens or sums.terms),
        unit=objective.unit,
    )
