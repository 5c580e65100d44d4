"""What a compression is worth: one definition of each figure, and the certificate over them.

Source: Geometry is All You Need (arXiv 2410.03040), Definitions 1, 2, 4, 5 and 6. ACC of Definition 4 is
`geofx.verify.Fidelity.accuracy`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from geofx.errors import ConfigError, VerificationError
from geofx.factorizations.contract import Factored
from geofx.parameter_space import CHUNK, ParameterSpace
from geofx.program import Program
from geofx.trace import storage_identity
from geofx.verify import Fidelity


def parameter_count(space: ParameterSpace) -> int:
    """s(v) = Σ sgn(v_i)²: the coordinates that are not zero (Definition 1)."""
    return sum(int(torch.count_nonzero(piece)) for piece in space.chunks())


def compression_ratio(before: int, after: int) -> float:
    """CR = (s(v) - s(ṽ)) / s(ṽ) (Definition 2): 0 where nothing was gained, 1 at half the numbers."""
    return (before - after) / after if after else math.inf


def parameter_mae(original: ParameterSpace, reconstructed: ParameterSpace) -> float:
    """FDL(v, v̂) = mean |v_i - v̂_i| (Definition 5), in float64, layer by layer."""
    total = 0.0
    for name in original.shapes:
        before, after = original.slice(name), reconstructed.slice(name)
        if storage_identity(before) == storage_identity(after):
            continue
        pairs = zip(torch.split(before, CHUNK), torch.split(after, CHUNK), strict=True)
        total += sum(float((one.double() - other.double()).abs().sum()) for one, other in pairs)
    return total / max(1, original.dim)


@dataclass(frozen=True)
class Condition:
    """One of the three: what was asked of a metric, and what it reached."""

    metric: Literal["FDL", "ACC", "CR"]
    relation: Literal["<", ">"]
    asked: float
    reached: float

    @property
    def holds(self) -> bool:
        """Strictly, as Definition 6 has it; a figure that is not a number never does."""
        return self.reached < self.asked if self.relation == "<" else self.reached > self.asked


@dataclass(frozen=True)
class Certificate:
    """(δ₁, δ₂, η)-compression: FDL < δ₁ and ACC < δ₂ on the data, and CR > η (Definition 6).

    Attributes:
        conditions: FDL, ACC and CR, asked and reached.
        parameters_before: s(v).
        parameters_after: s(ṽ) of the factors and all that was left.
        data: what ACC was measured on.
        tokens: number of loss terms; 0 where the loss compares whole outputs.
        unit: of ACC and δ₂.
    """

    conditions: tuple[Condition, Condition, Condition]
    parameters_before: int
    parameters_after: int
    data: str
    tokens: int
    unit: str

    @property
    def holds(self) -> bool:
        """Whether all three conditions do."""
        return all(condition.holds for condition in self.conditions)

    def to_json(self) -> dict[str, Any]:
        """As JSON types; an infinite bound, which asks nothing, becomes null."""
        conditions = [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in {**asdict(condition), "holds": condition.holds}.items()
            }
            for condition in self.conditions
        ]
        return {**asdict(self), "conditions": conditions, "holds": self.holds}

    def __str__(self) -> str:
        asked = ", ".join(f"{condition.asked:g}" for condition in self.conditions)
        lines = [f"({asked})-compression {'holds' if self.holds else 'does not hold'}"]
        fdl, acc, ratio = (
            f"{item.metric:3} {item.reached:.6g} {'' if item.holds else 'not '}{item.relation} {item.asked:g}"
            for item in self.conditions
        )
        tokens = f"{self.tokens} loss terms of " if self.tokens else ""
        lines += [
            f"  {fdl}: mean |v - v̂|",
            f"  {acc}: {self.unit}, {tokens}{self.data}",
            f"  {ratio}: {self.parameters_before} numbers that are not zero, {self.parameters_after} after",
        ]
        return "\n".join(lines)


def certify(
    original: Program,
    program: Program,
    rewrites: Mapping[str, Factored],
    measured: Fidelity | None,
    asked: tuple[float, float, float],
) -> Certificate:
    """The certificate for ``asked`` = (δ₁, δ₂, η); FDL and CR are taken from the tensors, now.

    Raises:
        ConfigError: a bound is not a number, or ``program`` was not made from the original.
        VerificationError: nothing was measured, so there is no ACC.
    """
    if any(not isinstance(bound, int | float) or math.isnan(bound) for bound in asked):
        raise ConfigError(
            f"bounds {asked} are not all numbers", fix="pass math.inf to ask nothing of a metric"
        )
    if measured is None:
        raise VerificationError(
            "the loss was not measured, so there is no accuracy to certify",
            fix="optimize with holdout=..., or pass batches to Analysis.apply",
        )
    space = ParameterSpace.of(original)
    before, after = parameter_count(space), parameter_count(ParameterSpace.of(program))
    mae = parameter_mae(space, space.reconstructed(program, rewrites))
    delta1, delta2, eta = asked
    return Certificate(
        (
            Condition("FDL", "<", delta1, mae),
            Condition("ACC", "<", delta2, measured.accuracy),
            Condition("CR", ">", eta, compression_ratio(before, after)),
        ),
        before,
        after,
        measured.data,
        measured.tokens,
        measured.unit,
    )
