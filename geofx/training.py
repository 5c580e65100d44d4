"""How the factors of a rewritten model are trained: settings, and what of torch they make."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geofx.errors import ConfigError
from geofx.objective import NextToken, Objective
from geofx.patterns import nearest

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

logger = logging.getLogger(__name__)

RATE_RATIO = 1e-3
"""Learning rate over the square root of the loss that training starts from."""
BETAS = (0.9, 0.95)
WARMUP_RATIO = 0.05
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""What a CPU with matmuls in bfloat16 has."""


@dataclass(frozen=True)
class Training:
    """How long and how the factors are trained.

    Attributes:
        steps: of the optimizer.
        learning_rate: at its peak, of the default optimizer: the share of its root mean square by which a
            tensor's numbers change in a step. What is larger, as norms are beside factors, steps further.
            By default `RATE_RATIO` · sqrt(distance to the original at the start), of 1 at most.
        accumulate: batches per step.
        every: steps between two validations, at which the best state is kept and the checkpoint written.
        vectors: train the norms and biases too.
        labels: share of the text's own next tokens in the loss, beside the original's (Hinton, Vinyals and
            Dean, 2015), where the model predicts tokens. What it gains is mostly of the text: the result
            leaves the original for it.
        seed: of the order of the batches.
        autocast: dtype of the matmuls of a step, such as `native_autocast` gives; parameters keep their own,
            and validation is computed in that.
        optimizer: makes any torch optimizer of the parameters, but for those that need a closure; by default
            AdamW without decay.
        schedule: makes any schedule of it, one that goes by a metric is told each validation loss; by default
            a linear warm-up and a cosine to zero.
        checkpoint: folder that the run is kept in, and taken up from where it is there.
        device: such as ``"cuda"``; by default the model stays where it is. The teacher runs where it is.
        accelerator: an ``accelerate.Accelerator`` of one process that places and runs the training instead.
    """

    steps: int = 200
    learning_rate: float | None = None
    accumulate: int = 1
    every: int = 20
    vectors: bool = True
    labels: float = 0.0
    seed: int = 0
    autocast: torch.dtype | None = None
    optimizer: MakeOptimizer | None = None
    schedule: MakeSchedule | None = None
    checkpoint: str | Path | None = None
    device: str | None = None
    accelerator: Any = None

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}", where="recover", fix="give 1 or more")
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        if not isinstance(rate, int | float) or not math.isfinite(rate) or rate <= 0.0:
            raise ConfigError(f"learning_rate is {self.learning_rate!r}", where="recover", fix="give 3e-4")
        if not isinstance(self.labels, int | float) or not 0.0 <= self.labels <= 1.0:
            raise ConfigError(f"labels is {self.labels!r}", where="recover", fix="give a share from 0 to 1")
        if self.autocast not in (None, torch.bfloat16):
            fix = "give torch.bfloat16 or None: gradients vanish in less range"
            raise ConfigError(f"autocast is {self.autocast!r}", where="recover", fix=fix)
        if getattr(self.accelerator, "num_processes", 1) > 1:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes", where="recover", fix="use one process"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Training:
        """From settings by name.

        Raises:
            ConfigError: one is not known.
        """
        known = [item.name for item in fields(cls)]
        for name in settings:
            if name not in known:
                fix = f"the nearest are {nearest(name, known)}"
                raise ConfigError(f"no setting {name!r}", where="recover", fix=fix)
        return cls(**settings)

    def objective_of(self, objective: Objective) -> Objective:
        """What is trained for, where results are measured by ``objective``.

        Raises:
            ConfigError: there are ``labels`` for a model that predicts no tokens.
        """
        if not self.labels:
            return objective
        if not isinstance(objective, NextToken):
            raise ConfigError(
                "labels are of models that predict tokens", where="recover", fix="leave labels out"
            )
        return replace(objective, labels=self.labels)

    def made_optimizer(self, trained: list[nn.Parameter], loss: float) -> torch.optim.Optimizer:
        """The optimizer of the parameters, ``loss`` being what they are to lessen.

        Steps of a share δ of the numbers, in directions that are half noise, cost about δ²: to be small
        beside a loss L they are in proportion to sqrt(L).
        """
        if self.optimizer is not None:
            made = self.optimizer(trained)
            if isinstance(made, torch.optim.LBFGS):
                raise ConfigError("LBFGS needs a closure", where="recover", fix="use one that does not")
            return made
        rate = self.learning_rate or RATE_RATIO * math.sqrt(min(1.0, max(0.0, loss)))
        logger.info("learning rate %.3g", rate)
        groups = [{"params": [part], "lr": rate * _size(part)} for part in trained]
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)

    def made_schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Its schedule."""
        if self.schedule is not None:
            return self.schedule(optimizer)
        warm = max(1, round(WARMUP_RATIO * self.steps))

        def share(step: int) -> float:
            cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / self.steps)))
            return min(1.0, (step + 1) / warm) * cosine

        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def native_autocast(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, else None."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    told = getattr(torch.cpu, "get_capabilities", dict) if device.type == "cpu" else dict
    can: Mapping[str, Any] = told()
    return torch.bfloat16 if any(can.get(name) for name in BFLOAT16) else None


def _size(part: nn.Parameter) -> float:
    """Root mean square; 1 where all is zero, as of a bias that nothing has moved yet."""
    return float(part.detach().double().square().mean().sqrt()) or 1.0
