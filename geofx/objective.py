"""What "loss" means: next-token cross-entropy, squared error of the outputs, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from geofx.batches import Batch, inputs_of, token_mask, vocabularies
from geofx.errors import ConfigError
from geofx.program import Program, flat_tensors

UserLoss = Callable[[Any, Mapping[str, Any]], Tensor]
RowTerm = Callable[[Tensor, slice], Tensor]

NEVER = torch.finfo(torch.float32).min / 2
"""Logits below it, such as infinite ones, are taken for it: probabilities of 0 with finite differences."""
ROWS = 32
"""Rows of logits that a loss is taken of at once: what is computed of them fits into a cache."""


class Objective(Protocol):
    """A loss whose gradients the calibration takes and whose increase the verification measures."""

    @property
    def unit(self) -> str:
        """What the loss is measured in."""
        ...

    def gradient_seed(self, output: Any, batch: Batch) -> tuple[Tensor, float]:
        """(scalar to call backward on, number of loss terms): Σ over terms of what is squared into G."""
        ...

    def compare(self, original: Any, optimized: Any, batch: Batch) -> tuple[float, float, float]:
        """(Σ loss of the original, Σ loss of the optimized, number of terms)."""
        ...

    def distance(self, original: Any, optimized: Any, batch: Batch) -> tuple[Tensor, float]:
        """(Σ of how far the optimized's outputs are from the original's, differentiable, number of terms)."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of token t+1 given tokens up to t, summed over the tokens that are not padding.

    Attributes:
        ids: the name of the input that holds the tokens.
        labels: share of the cross-entropy in `distance`.
    """

    ids: str = "input_ids"
    unit: str = "nats per token"
    labels: float = 0.0

    def gradient_seed(self, output: Any, batch: Batch) -> tuple[Tensor, float]:
        """Σ cross-entropy; its per-token gradients give the empirical Fisher."""
        return self._sum(output, batch)

    def compare(self, original: Any, optimized: Any, batch: Batch) -> tuple[float, float, float]:
        """Both sums over the same tokens."""
        before, terms = self._sum(original, batch)
        return float(before), float(self._sum(optimized, batch)[0]), terms

    def distance(self, original: Any, optimized: Any, batch: Batch) -> tuple[Tensor, float]:
        """Σ KL(original ‖ optimized) over the tokens that have a successor, and their share of ``labels``."""
        places, targets = next_tokens(batch, self.ids)
        wanted = logits_of(original).flatten(0, 1)

        def divergence(given: Tensor, part: slice) -> Tensor:
            p, q = (log_probabilities(rows) for rows in (wanted[places[part]], given))
            away = functional.kl_div(q, p, log_target=True, reduction="sum")
            if not self.labels:
                return away
            text = functional.nll_loss(q, targets[part], reduction="sum")
            return (1.0 - self.labels) * away + self.labels * text

        return sum_over_rows(logits_of(optimized).flatten(0, 1), places, divergence), float(len(places))

    def _sum(self, output: Any, batch: Batch) -> tuple[Tensor, float]:
        places, targets = next_tokens(batch, self.ids)

        def cross_entropy(given: Tensor, part: slice) -> Tensor:
            return functional.cross_entropy(given.float(), targets[part], reduction="sum")

        return sum_over_rows(logits_of(output).flatten(0, 1), places, cross_entropy), float(len(places))


@dataclass(frozen=True)
class SquaredError:
    """Relative squared error of the outputs, ‖Δy‖² / ‖y‖².

    At the original its gradient vanishes, so G is the Gauss-Newton matrix, sampled: for v ~ N(0, I) the
    gradients of v · y have E[g gᵀ] = Jᵀ J (Hutchinson's estimator of ‖J Δ‖²).
    """

    seed: int = 0
    unit: str = "relative squared error of outputs"
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    def gradient_seed(self, output: Any, batch: Batch) -> tuple[Tensor, float]:
        """v · y / sqrt(mean ‖y‖² per term), one term per row of the batch."""
        values = valid_outputs(output, batch)
        rows = float(_rows(output))
        power = sum(float(value.detach().double().square().sum()) for value in values) / rows
        total = values[0].new_zeros(())
        for value in values:
            noise = torch.randn(value.shape, generator=self.generator).to(value)
            total = total + (noise * value).sum()
        return total / max(power, 1e-30) ** 0.5, rows

    def compare(self, original: Any, optimized: Any, batch: Batch) -> tuple[float, float, float]:
        """(0, Σ ‖Δy‖², Σ ‖y‖²): the loss is their ratio."""
        before, after = valid_outputs(original, batch), valid_outputs(optimized, batch)
        error = sum(
            float((a.double() - b.double()).square().sum()) for a, b in zip(before, after, strict=True)
        )
        return 0.0, error, sum(float(value.double().square().sum()) for value in before)

    def distance(self, original: Any, optimized: Any, batch: Batch) -> tuple[Tensor, float]:
        """(Σ ‖Δy‖², Σ ‖y‖²)."""
        return squared_distance(original, optimized, batch)


@dataclass(frozen=True)
class Custom:
    """The user's ``loss(output, batch)``: a tensor of terms, or a scalar: the mean per token.

    Predictions take its terms for negative log-likelihoods: there the mean square of the gradients is the
    curvature. For other losses they rank sites and formats, and are not in the unit of the loss.
    """

    function: UserLoss
    unit: str = "loss per term"

    def gradient_seed(self, output: Any, batch: Batch) -> tuple[Tensor, float]:
        """The sum of the terms."""
        value = self._terms(output, batch)
        if not value.requires_grad:
            raise ConfigError("what loss(output, batch) returns does not depend on the output", where="loss")
        if value.dim() > 0:
            return value.sum(), float(value.numel())
        terms = token_count(batch)
        return value * terms, terms

    def compare(self, original: Any, optimized: Any, batch: Batch) -> tuple[float, float, float]:
        """Both sums."""
        before, after = self._terms(original, batch), self._terms(optimized, batch)
        terms = float(before.numel()) if before.dim() else token_count(batch)
        scale = terms if before.dim() == 0 else 1.0
        return float(before.sum()) * scale, float(after.sum()) * scale, terms

    def distance(self, original: Any, optimized: Any, batch: Batch) -> tuple[Tensor, float]:
        """(Σ ‖Δy‖², Σ ‖y‖²): of the outputs, as the loss itself may need targets."""
        return squared_distance(original, optimized, batch)

    def _terms(self, output: Any, batch: Batch) -> Tensor:
        value = self.function(output, batch)
        if not isinstance(value, Tensor):
            raise ConfigError(f"loss(output, batch) returns a {type(value).__name__}", fix="return a tensor")
        return value


def squared_distance(original: Any, optimized: Any, batch: Batch) -> tuple[Tensor, float]:
    """(Σ ‖Δy‖², Σ ‖y‖²) over all outputs, padding left out."""
    before, after = valid_outputs(original, batch), valid_outputs(optimized, batch)
    errors = [(a.float() - b.float()).square().sum() for a, b in zip(before, after, strict=True)]
    power = sum(float(value.detach().double().square().sum()) for value in before)
    return torch.stack(errors).sum(), power


def choose_objective(program: Program, batch: Batch, loss: UserLoss | None, seed: int = 0) -> Objective:
    """The user's loss; next-token cross-entropy where logits are causal; else squared error of outputs."""
    if loss is not None:
        return Custom(loss)
    ids = token_input(program)
    causal = ids is not None and is_causal_language_model(program, batch, ids)
    return NextToken(ids or "") if causal else SquaredError(seed)


def token_input(program: Program) -> str | None:
    """The input whose entries are looked up in the largest table: the token ids."""
    tables = vocabularies(program)
    return max(tables, key=lambda name: tables[name]) if tables else None


def is_causal_language_model(program: Program, batch: Batch, name: str = "input_ids") -> bool:
    """Whether there are logits over the ids' vocabulary that a later token cannot change."""
    ids = batch.get(name)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    probe = {key: value[:2] if isinstance(value, Tensor) else value for key, value in batch.items()}
    probe["attention_mask"] = torch.ones_like(probe[name])
    changed = {**probe, name: probe[name].clone()}
    changed[name][:, -1] = (changed[name][:, -1] + 1) % max(2, int(ids.max()) + 1)
    with torch.no_grad(), program.buffers_kept():
        before, after = (logits_of(program(**inputs_of(program, item))) for item in (probe, changed))
    if before is None or after is None or before.dim() != 3 or before.shape[:2] != probe[name].shape:
        return False
    if before.shape[2] != vocabularies(program).get(name):
        return False
    return bool(torch.allclose(before[:, :-1], after[:, :-1], rtol=1e-3, atol=1e-4))


def logits_of(output: Any) -> Any:
    """``output.logits`` or ``output["logits"]``, the only tensor of a plain output, or None."""
    if isinstance(output, Mapping):
        return output.get("logits")
    if hasattr(output, "logits"):
        return output.logits
    return output if isinstance(output, Tensor) else None


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax in float32, finite also where a token is ruled out."""
    return functional.log_softmax(logits.float().clamp_min(NEVER), -1)


def next_tokens(batch: Batch, ids: str = "input_ids") -> tuple[Tensor, Tensor]:
    """Where a token that is not padding has a successor that is none, and the successors.

    Both (n,) int64, the places counted through (batch · length).
    """
    known, mask = batch[ids], token_mask(batch)
    held = torch.ones_like(known, dtype=torch.bool) if mask is None else mask
    both = functional.pad(held[:, 1:] & held[:, :-1], (0, 1))
    return both.flatten().nonzero().flatten(), known[:, 1:][both[:, :-1]]


def sum_over_rows(values: Tensor, places: Tensor, term: RowTerm) -> Tensor:
    """Σ term(values[places[part]], part) over parts of `ROWS` places: a differentiable scalar.

    The gradient is taken along the way, so nothing as large as ``values`` (n, m) is held but that. It can be
    taken once only; ``term`` is of nothing else that takes one.
    """
    total: Tensor = _SumOverRows.apply(values, places, term)  # type: ignore[no-untyped-call]
    return total


class _SumOverRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, term: RowTerm) -> Tensor:
        is_wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(values) if is_wanted else None
        total = torch.zeros((), dtype=torch.float64, device=values.device)
        for start in range(0, len(places), ROWS):
            part = slice(start, start + ROWS)
            with torch.set_grad_enabled(is_wanted):
                rows = values.detach()[places[part]].requires_grad_(is_wanted)
                found = term(rows, part)
            total += found.detach()
            if gradient is not None:
                gradient[places[part]] = torch.autograd.grad(found, rows)[0]
        ctx.gradient = gradient
        return total.to(torch.promote_types(values.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of a sum over rows can be taken once only")
        return gradient.mul_(scale.to(gradient)), None, None


def valid_outputs(output: Any, batch: Batch) -> list[Tensor]:
    """The floating-point tensors of an output, padding positions left out."""
    mask = token_mask(batch)
    values = [value for value in flat_tensors(output) if value.is_floating_point()]
    if mask is None:
        return values
    return [value[mask] if value.shape[:2] == mask.shape else value for value in values]


def _rows(output: Any) -> int:
    return max((value.shape[0] for value in flat_tensors(output) if value.dim()), default=1)


def token_count(batch: Batch) -> float:
    """Tokens that are not padding, or rows where there are none."""
    mask = token_mask(batch)
    if mask is not None:
        return float(mask.sum())
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor):
        return float(ids.numel())
    return float(next(value.shape[0] for value in batch.values() if isinstance(value, Tensor)))
