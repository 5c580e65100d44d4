"""What a latency is of: the runtime, the device, and how much of the model a call runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import ConfigDict

from geofx.errors import ConfigError

Runtime = Literal["eager", "compile", "onnxruntime"]
DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Target:
    """One way in which the model is called; several together weigh by the seconds of each.

    A prompt of 512 tokens and 100 more are ``Target(tokens=512)`` and ``Target(tokens=1, weight=100)``.

    Attributes:
        runtime: ``"eager"`` and ``"compile"`` are torch's; ``"onnxruntime"`` runs the ONNX export.
        device: ``"cpu"`` or ``"cuda"``, which are measured; or one of `geofx.cost_models.DEVICES`, whose
            seconds are computed from its peaks.
        batch: rows of a call.
        tokens: of a row: all those of a prompt, or 1 where they come one by one. A model that takes no
            sequences has none.
        dtype: of weights and activations on a device that is computed; None is the model's own.
        weight: what the seconds of this target are multiplied by beside those of others.

    Raises:
        ConfigError: a value is not one of these.
    """

    runtime: Runtime = "eager"
    device: str = "cpu"
    batch: int = 1
    tokens: int = 128
    dtype: DType | None = None
    weight: float = 1.0

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        for name, known in (("runtime", get_args(Runtime)), ("dtype", (None, *get_args(DType)))):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} {getattr(self, name)!r}",
                    where="target",
                    fix=f"use one of {', '.join(map(str, known))}",
                )
        for name in ("batch", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} {value!r}", where="target", fix="give 1 or more")
        if not isinstance(self.weight, int | float) or not 0.0 < self.weight < float("inf"):
            raise ConfigError(f"weight {self.weight!r}", where="target", fix="give a number above 0")
        if self.is_measured and self.dtype is not None:
            fix = "leave it out and convert the model, as by model.to(torch.bfloat16)"
            raise ConfigError(f"{self.device} is measured in the model's own dtype", where="target", fix=fix)

    @property
    def is_measured(self) -> bool:
        """Whether calls are timed here, not computed."""
        return self.device in ("cpu", "cuda")

    def __str__(self) -> str:
        return f"{self.runtime} on {self.device}, {self.batch} x {self.tokens} tokens"


def targets_of(given: Target | Iterable[Target] | None) -> tuple[Target, ...]:
    """One target, several, or by default `Target()`.

    Raises:
        ConfigError: there is none among them.
    """
    found = (Target(),) if given is None else (given,) if isinstance(given, Target) else tuple(given)
    if not found or not all(isinstance(item, Target) for item in found):
        raise ConfigError(f"target {given!r}", fix="give a geofx.Target, or several")
    return found
