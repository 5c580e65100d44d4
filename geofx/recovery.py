"""Short training after the rewrite: the factors learn to give the original's outputs again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from geofx.batches import Batch
from geofx.cache import Cache
from geofx.checkpoint import Checkpoint, Progressed, Tensors, made_of, rates_of
from geofx.digest import digest
from geofx.errors import ConfigError, NumericsError
from geofx.factorizations import Factored, Factorization, Factors, Unfolding
from geofx.factorized_module import FactorizedLayer, FactorizedLinear
from geofx.objective import Objective
from geofx.program import Remembered
from geofx.progress import Progress, log_progress
from geofx.trace import evaluating
from geofx.training import Training

logger = logging.getLogger(__name__)

Model = Callable[..., Any]


@dataclass(eq=False)
class Recovery:
    """argmin over the factors of E[D(original(x), optimized(x))], by stochastic gradients.

    D is the KL divergence of the next token where the model predicts tokens, the relative squared error of
    the outputs elsewhere (Hinton, Vinyals and Dean, 2015); with `Training.labels` the text has a share in it.
    Ranks stay as they are. A format that is `Unfolding` is trained as another form of the same maps:
    gauge-fixed low rank as L R, a projection of the inputs with W whole (Sakr and Khailany, 2024).

    Attributes:
        student: the rewritten model; its factors are changed in place.
        teacher: the original; a module is run in evaluation mode, without dropout.
        inputs: the student or the teacher, and a batch -> its arguments.
        whole: the original's tensors by name; projections train their weights whole, checkpoints go by all.
    """

    student: nn.Module
    teacher: Model
    objective: Objective
    training: Training
    inputs: Callable[[Model, Batch], Batch]
    rewrites: Mapping[str, Factored]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    progress: Progress = log_progress

    def __post_init__(self) -> None:
        self._forward: Model = self.student
        self._goal = self.training.objective_of(self.objective)
        parts = self.teacher.parameters() if isinstance(self.teacher, nn.Module) else self.whole.values()
        self._teacher_device = next((part.device for part in parts), torch.device("cpu"))
        self._wanted = Remembered(self._taught)

    def run(self, batches: list[Batch], validation: list[Batch]) -> Progressed:
        """Train on ``batches`` and leave the student at the state with the least loss on ``validation``.

        Raises:
            NumericsError: the loss is no longer finite.
        """
        still = evaluating(self.teacher) if isinstance(self.teacher, nn.Module) else nullcontext()
        with _unfolded(self.student, self.whole), still:
            trained = self._trained()
            if not trained:
                raise ConfigError("there is nothing to train", where="recover", fix="rewrite something first")
            return self._run(trained, batches, validation)

    def _run(
        self, trained: dict[str, nn.Parameter], batches: list[Batch], validation: list[Batch]
    ) -> Progressed:
        training = self.training
        device = training.device if training.accelerator is None else training.accelerator.device
        self.student.to(device or next(self.student.parameters()).device)
        before = self._mean_loss(validation)
        if not math.isfinite(before):
            fix = "recover a result whose outputs are finite on the validation data"
            raise NumericsError("the loss is not finite before training", where="recover", fix=fix)
        away = before if self._goal is self.objective else self._mean_loss(validation, self.objective)
        optimizer = training.made_optimizer(list(trained.values()), away)
        schedule: Any = training.made_schedule(optimizer)
        checkpoint = self._checkpoint(trained, batches, validation, optimizer, schedule)
        if training.accelerator is not None:
            prepared = training.accelerator.prepare(self.student, optimizer, schedule)
            self._forward, optimizer, schedule = prepared
        with nullcontext() if checkpoint is None else checkpoint.claimed():
            return self._steps(trained, batches, validation, before, optimizer, schedule, checkpoint)

    def _steps(
        self,
        trained: dict[str, nn.Parameter],
        batches: list[Batch],
        validation: list[Batch],
        before: float,
        optimizer: Any,
        schedule: Any,
        checkpoint: Checkpoint | None,
    ) -> Progressed:
        training = self.training
        wrapped = getattr(schedule, "scheduler", schedule)
        goes_by_loss = isinstance(wrapped, torch.optim.lr_scheduler.ReduceLROnPlateau)
        found = checkpoint.read(trained, optimizer, schedule) if checkpoint else None
        if checkpoint is not None:
            what = "started anew" if found is None else f"taken up at step {found[0].step}"
            logger.info("recover: %s in %s", what, checkpoint.cache.folder.name)
        if found is None:
            run = Progressed()
            best = self._noted(run, trained, {}, before)
        else:
            run, best = found
        self.progress("recover", run.step, training.steps)
        order = self._order(len(batches))
        while run.step < training.steps:
            start = run.step * training.accumulate
            loss = self._step([batches[order(start + k)] for k in range(training.accumulate)])
            optimizer.step()
            if not goes_by_loss:
                schedule.step()
            optimizer.zero_grad(set_to_none=True)
            run.step += 1
            self.progress("recover", run.step, training.steps)
            if run.step % training.every == 0 or run.step == training.steps:
                after = self._mean_loss(validation)
                best = self._noted(run, trained, best, after, loss)
                if goes_by_loss:
                    schedule.step(after)
                if checkpoint is not None:
                    checkpoint.write(run, trained, best, optimizer, schedule)
        with torch.no_grad():
            for name, part in trained.items():
                part.copy_(best[name])
        return run

    def _step(self, batches: list[Batch]) -> float:
        total, dtype = 0.0, self.training.autocast
        device = next(self.student.parameters()).device.type
        for batch in batches:
            with nullcontext() if dtype is None else torch.autocast(device, dtype):
                loss = self._loss(batch, self._taught(batch)) / len(batches)
            if self.training.accelerator is None:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                self.training.accelerator.backward(loss)
            total += float(loss.detach())
        if not math.isfinite(total):
            raise NumericsError("the loss is not finite", where="recover", fix="lower the learning rate")
        return total

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Any:
        return self.teacher(**_on(self._teacher_device, self.inputs(self.teacher, batch)))

    def _loss(self, batch: Batch, taught: Any, goal: Objective | None = None) -> Tensor:
        device = next(self.student.parameters()).device
        wanted, batch, given = (
            _on(device, item) for item in (taught, batch, self.inputs(self.student, batch))
        )
        distance, terms = (goal or self._goal).distance(wanted, self._forward(**given), {**batch, **given})
        return distance / max(terms, 1e-30)

    @torch.no_grad()
    def _mean_loss(self, batches: list[Batch], goal: Objective | None = None) -> float:
        losses = [float(self._loss(batch, self._wanted(batch), goal)) for batch in batches]
        return sum(losses) / len(losses)

    def _noted(
        self,
        run: Progressed,
        trained: Mapping[str, nn.Parameter],
        best: Tensors,
        found: float,
        loss: float | None = None,
    ) -> Tensors:
        """The best parameters so far; what was ``found`` on the validation batches joins the history.

        Numbers that are not finite do not: neither a report nor a checkpoint can hold them.
        """
        if not math.isfinite(found):
            logger.warning("recover: step %d, the validation loss is not finite", run.step)
            return best
        run.history.append(
            {"step": run.step, "validation": found} | ({} if loss is None else {"training": loss})
        )
        logger.info("recover: step %d, validation %.5g", run.step, found)
        if found < run.best:
            run.best = found
            return {name: part.detach().clone() for name, part in trained.items()}
        return best

    def _trained(self) -> dict[str, nn.Parameter]:
        """The factors, and the vectors where they are asked for; all else is frozen."""
        held = {id(part) for layer in _layers(self.student) for part in layer.parameters(recurse=False)}
        held -= {id(layer.bias) for layer in _layers(self.student) if isinstance(layer, FactorizedLinear)}
        factors = {
            attribute
            for factored in self.rewrites.values()
            for name, attribute in factored.attributes.items()
            if name not in _static(factored.factorization)
        }
        found = {}
        for name, part in self.student.named_parameters():
            is_factor = name in factors or id(part) in held
            part.requires_grad_(is_factor or (self.training.vectors and part.dim() == 1))
            if part.requires_grad:
                found[name] = part
        return found

    def _order(self, count: int) -> Callable[[int], int]:
        """The k-th batch: every batch once per pass, each pass in an order of its own."""

        def place(k: int) -> int:
            generator = torch.Generator().manual_seed(self.training.seed + k // count)
            return int(torch.randperm(count, generator=generator)[k % count])

        return place

    def _checkpoint(
        self,
        trained: Mapping[str, nn.Parameter],
        batches: Iterable[Batch],
        validation: Iterable[Batch],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> Checkpoint | None:
        training = self.training
        if training.checkpoint is None:
            return None
        rates = training.learning_rate, training.accumulate, str(training.autocast), training.labels
        makers = (training.optimizer, optimizer), (training.schedule, schedule)
        rules = [made_of(made) for maker, made in makers if maker is not None]
        if training.schedule is not None:
            rules.append(rates_of(training.schedule, optimizer, training.steps))
        settings = training.steps, training.every, training.seed, *rates, rules
        goal = type(self.objective).__name__, *(part for _, part in sorted(self.whole.items()))
        data = [part for batch in (*batches, *validation) for _, part in sorted(batch.items())]
        start = [part.detach() for part in trained.values()]
        return Checkpoint(Cache(Path(training.checkpoint)), digest("recover", settings, *goal, *start, *data))


def _on(device: torch.device, values: Any) -> Any:
    return tree_map_only(Tensor, lambda value: value.to(device), values)


def _static(form: Factorization) -> frozenset[str]:
    return form.static if isinstance(form, Unfolding) else frozenset()


def _layers(student: nn.Module) -> Iterator[FactorizedLayer]:
    return (layer for layer in student.modules() if isinstance(layer, FactorizedLayer))


@contextmanager
def _unfolded(student: nn.Module, whole: Mapping[str, Tensor]) -> Iterator[None]:
    """Layers of formats that are trained as another one are of that as long as the context lasts."""
    found = []
    for path, layer in student.named_modules():
        if isinstance(layer, FactorizedLayer) and isinstance(layer.factorization, Unfolding):
            known = whole.get(f"{path}.{layer.leaf}")
            dense = (layer.weight if known is None else known).detach()
            found.append(_Unfolded(layer, dense.t() if layer.transposed else dense))
    try:
        yield
    finally:
        for part in found:
            part.fold()


class _Unfolded:
    """A layer that is of another form until it is folded."""

    def __init__(self, layer: FactorizedLayer, dense: Tensor) -> None:
        self.layer, self.form, self.factors = layer, layer.factorization, _detached(layer.factors)
        assert isinstance(self.form, Unfolding)
        other, self.start = self.form.unfold(self.factors, dense)
        layer.become(other, self.start, self.form.static)

    def fold(self) -> None:
        """Give the layer its own form back: as it was, to the bit, where nothing has moved."""
        assert isinstance(self.form, Unfolding)
        trained = _detached(self.layer.factors)
        moved = any(
            not torch.equal(trained[name], part.to(trained[name])) for name, part in self.start.items()
        )
        self.layer.become(self.form, self.form.fold(trained) if moved else self.factors)


def _detached(factors: Factors) -> dict[str, Tensor]:
    """The values of the factors."""
    return {name: part.detach() for name, part in factors.items()}
