"""What the whole model may use, and the units in which people say so."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from pydantic import ConfigDict

from geofx.errors import ConfigError

Scope = Literal["model", "factorizable"]
Amount = int | float | str
Resource = Literal["size", "parameters", "flops", "latency", "loss"]

BYTE_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
TIME_UNITS = {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6"), "µs": Decimal("1e-6")}
_QUANTITY = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-zµ]{1,3}|%)\s*")
_SHARE_OR_COUNT = 'a share such as 0.8 or "80%" of the dense model, or a whole number above 1'
_FORMS = {
    "size": _SHARE_OR_COUNT + ' of bytes, or "120MB", "350 MiB", "1.5GB" (MB is 10^6 bytes, MiB 2^20)',
    "parameters": _SHARE_OR_COUNT,
    "flops": _SHARE_OR_COUNT + " per token",
    "latency": 'a share such as 0.8 or "80%" of the dense model, or a time such as "12ms", "1.5s"',
    "loss": "a finite number, 0 or above, in the unit of the analysis",
}


@dataclass(frozen=True)
class Budget:
    """Limits on a plan; what is None is not limited.

    Attributes:
        size: bytes of all weights: a share in (0, 1] of the scope's dense bytes, a whole number of
            bytes, or a string such as ``"120MB"``, ``"350 MiB"``, ``"80%"``.
        parameters: numbers stored, as a share or a count.
        flops: per token, a multiply-add being 2, as a share or a count.
        latency: seconds of the whole model on the targets (`geofx.Target`), predicted and then measured: a
            share of the dense model, or a time such as ``"12ms"``.
        loss: largest predicted increase, in the unit of the analysis.
        scope: what is counted: the whole ``model``, or only the ``factorizable`` weights.

    Raises:
        ConfigError: nothing is limited, or a value has none of the accepted forms.
    """

    size: Amount | None = None
    parameters: Amount | None = None
    flops: Amount | None = None
    latency: float | str | None = None
    loss: float | None = None
    scope: Scope = "model"

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        if self.scope not in ("model", "factorizable"):
            raise ConfigError(
                f"unknown scope {self.scope!r}", where="budget", fix="use 'model' or 'factorizable'"
            )
        if (self.size, self.parameters, self.flops, self.latency, self.loss) == (None,) * 5:
            fix = "give size, parameters, flops, latency or loss"
            raise ConfigError("the budget limits nothing", where="budget", fix=fix)
        self.limits(0, 0, 0.0)

    def limits(
        self, size: int, parameters: int, flops: float, latency_s: float = 0.0
    ) -> dict[Resource, float]:
        """The largest allowed value of each limited resource, shares taken of the dense values given.

        Bytes and parameters are whole numbers, rounded down.
        """
        found: dict[Resource, float] = {}
        if self.size is not None:
            found["size"] = _resolve("size", self.size, size)
        if self.parameters is not None:
            found["parameters"] = _resolve("parameters", self.parameters, parameters)
        if self.flops is not None:
            found["flops"] = _resolve("flops", self.flops, flops)
        if self.latency is not None:
            found["latency"] = _resolve("latency", self.latency, latency_s)
        if self.loss is not None:
            found["loss"] = _require_loss(self.loss)
        return found


def describe(resource: Resource, value: float, unit: str = "") -> str:
    """``value`` with its unit, for people: ``3.2 MB``, ``1.2 M parameters``, ``loss 0.0123``."""
    if resource == "loss":
        return f"loss {value:.4g} {unit}".rstrip()
    if resource == "latency":
        return f"{1e3 * value:.4g} ms"
    label = {"size": "B", "parameters": " parameters", "flops": " flops per token"}[resource]
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.4g} {prefix}{label}"
    return f"{value:.4g} {label.lstrip()}"


def _resolve(resource: Resource, amount: object, dense: float) -> float:
    if isinstance(amount, str):
        amount = _parse(resource, amount)
    if isinstance(amount, Decimal):
        return float(amount)
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 1 and resource != "latency":
        return amount
    if isinstance(amount, float) and 0.0 < amount <= 1.0:
        share = amount * dense
        return share if resource in ("flops", "latency") else math.floor(share)
    raise _rejected(resource, amount)


def _parse(resource: Resource, text: str) -> int | float | Decimal:
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise _rejected(resource, text)
    number, unit = Decimal(found[1]), found[2]
    if unit == "%":
        return float(number / 100)
    if resource == "latency" and unit in TIME_UNITS and number > 0:
        return number * TIME_UNITS[unit]
    if resource != "size" or unit not in BYTE_UNITS:
        raise _rejected(resource, text)
    return int(number * BYTE_UNITS[unit])


def _require_loss(loss: object) -> float:
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not (math.isfinite(loss) and loss >= 0):
        raise _rejected("loss", loss)
    return float(loss)


def _rejected(resource: Resource, value: object) -> ConfigError:
    return ConfigError(f"{resource} {value!r} is not a budget", fix=f"give {_FORMS[resource]}")
