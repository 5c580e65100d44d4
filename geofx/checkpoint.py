"""The state of a training run as tensors and JSON: parameters, optimizer, schedule and where it stands."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from geofx.cache import Cache
from geofx.errors import ArtifactMismatchError, ConfigError

Tensors = dict[str, Tensor]


@dataclass
class Progressed:
    """Where a run stands: the next step, the best validation loss so far, and what was seen on the way."""

    step: int = 0
    best: float = float("inf")
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """One entry of a cache that a run is written to again and again; no pickle.

    Optimizers and schedules are those of torch: their ``state_dict`` holds tensors, numbers and lists.
    """

    cache: Cache
    key: str

    def claimed(self) -> AbstractContextManager[None]:
        """One process at a time trains by it; a second waits and then finds the run at its end."""
        return self.cache.claimed(self.key)

    def write(
        self,
        run: Progressed,
        trained: Mapping[str, nn.Parameter],
        best: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        """Replace what was written before, all or nothing.

        Raises:
            ArtifactError: the folder cannot be written.
            ConfigError: the optimizer keeps what is neither a tensor nor JSON.
        """
        tensors = {f"parameter/{name}": part.detach() for name, part in trained.items()}
        tensors |= {f"best/{name}": part for name, part in best.items()}
        state = optimizer.state_dict()
        values = dict(_scalars(state["state"], "optimizer"))
        tensors |= dict(_tensors(state["state"], "optimizer"))
        self.cache.write(
            self.key,
            {
                "run": _plain(asdict(run), "run"),
                "optimizer": values,
                "groups": _plain(state["param_groups"], "optimizer"),
                "schedule": _plain(schedule.state_dict(), "schedule"),
            },
            tensors,
        )

    def read(
        self,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> tuple[Progressed, Tensors] | None:
        """Put the run's state back and say where it stands; None where there is no intact checkpoint.

        Raises:
            ArtifactMismatchError: it is of another optimizer or schedule.
        """
        value, tensors = self.cache.read(self.key), self.cache.read_tensors(self.key)
        if value is None or tensors is None:
            return None
        try:
            with torch.no_grad():
                for name, part in trained.items():
                    part.copy_(tensors[f"parameter/{name}"])
            state: dict[int, dict[str, Any]] = {}
            for path, item in (*value["optimizer"].items(), *tensors.items()):
                kind, _, rest = path.partition("/")
                if kind == "optimizer":
                    index, _, name = rest.partition("/")
                    state.setdefault(int(index), {})[name] = item
            optimizer.load_state_dict({"state": state, "param_groups": value["groups"]})
            schedule.load_state_dict(_like(schedule.state_dict(), value["schedule"]))
            kept = {name: tensors[f"best/{name}"] for name in trained}
            return Progressed(**_like(asdict(Progressed()), value["run"])), kept
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ArtifactMismatchError(
                f"the checkpoint is of another run: {error}",
                where=str(self.cache.folder),
                fix="use another folder, or the settings it was made with",
            ) from error


def made_of(maker: torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler) -> list[Any]:
    """What tells an optimizer or a schedule, as it was made, from others of other settings."""
    if isinstance(maker, torch.optim.Optimizer):
        groups = [
            {key: item for key, item in group.items() if key != "params"} for group in maker.param_groups
        ]
        return [type(maker).__name__, _plain(groups, "optimizer")]
    return [type(maker).__name__, _plain(maker.state_dict(), "schedule")]


def rates_of(
    make: Callable[[torch.optim.Optimizer], Any], optimizer: torch.optim.Optimizer, steps: int
) -> Any:
    """The learning rates of the first ``steps`` of a schedule of its own; none where they go by a metric.

    A schedule keeps its functions to itself, so that only what it does tells it from another.
    """
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": group.get("initial_lr", group["lr"])}
        for group in optimizer.param_groups
    ]
    with_betas = "betas" in optimizer.defaults
    stand_in = torch.optim.AdamW(groups) if with_betas else torch.optim.SGD(groups, momentum=0.9)
    schedule, found = make(stand_in), list[Any]()
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return found
    for _ in range(steps):
        found.append(schedule.get_last_lr())
        stand_in.step()
        schedule.step()
    return _plain(found, "schedule")


def _like(known: Any, value: Any) -> Any:
    """``value``, read from JSON, with the keys of ``known``, and infinity: there both are strings."""
    if isinstance(known, float) and isinstance(value, str):
        return float(value)
    if isinstance(known, Mapping) and isinstance(value, Mapping):
        keys = {str(key): key for key in known}
        found = {keys.get(name, name): _like(known.get(keys.get(name)), item) for name, item in value.items()}
        return Counter(found) if isinstance(known, Counter) else found
    if isinstance(known, list | tuple) and isinstance(value, list) and len(known) == len(value):
        return [_like(*pair) for pair in zip(known, value, strict=True)]
    return value


def _tensors(state: Mapping[int, Mapping[str, Any]], kind: str) -> Iterator[tuple[str, Tensor]]:
    for index, entries in state.items():
        for name, item in entries.items():
            if isinstance(item, Tensor):
                yield f"{kind}/{index}/{name}", item.detach()


def _scalars(state: Mapping[int, Mapping[str, Any]], kind: str) -> Iterator[tuple[str, Any]]:
    for index, entries in state.items():
        for name, item in entries.items():
            if not isinstance(item, Tensor):
                yield f"{kind}/{index}/{name}", _plain(item, kind)


def _plain(value: Any, what: str) -> Any:
    """``value`` as JSON types, functions left out.

    Raises:
        ConfigError: it holds anything else.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(item, what) for item in value if not callable(item)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, what) for key, item in value.items() if not callable(item)}
    raise ConfigError(
        f"the {what} keeps a {type(value).__name__}, which a checkpoint cannot hold",
        fix="use another, or no checkpoint",
    )
