"""W ≈ W₁ + W₂, each in a format of its own."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import PlainValidator, ValidationInfo
from torch import Tensor

from geofx.errors import PlanError
from geofx.factorizations.contract import Factorization, Factors, measured_loss, stored
from geofx.factorizations.low_rank import LowRank
from geofx.factorizations.refine import refine
from geofx.factorizations.tensor_train import TensorTrain
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import require_finite, working_dtype
from geofx.region import Region, RegionKind
from geofx.region_analysis import Metric, RegionAnalysis, Weights

SHARE = 0.25
"""Share of the bytes that candidates give to the first part."""

SWEEPS, STEPS = 1, 2
"""Of `refine` over the factors of both parts, which were refined one by one before."""


def _read(value: Any, info: ValidationInfo) -> Factorization:
    if info.context is None:
        raise ValueError("read it with geofx.factorizations.from_json")
    part: Factorization = info.context["read"](value)
    return part


Part = Annotated[Factorization, PlainValidator(_read)]
"""A format as a setting of another; `from_json` says how it is read."""


@dataclass(frozen=True)
class Hybrid:
    """The sum of ``first`` and ``second``: a tensor train and low rank, as in Hypoformer (Li et al. 2022).

    That pair is what `candidates` proposes; a part may be any format of single weights but a sum. ``second``
    is fitted to the weight, ``first`` to what is left, ``second`` again to what ``first`` leaves: let it be
    the part that carries more. Factors are named by their part, ``right_second``.
    """

    first: Part
    second: Part

    name: ClassVar[str] = "hybrid"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Low rank of each rank, and the tensor train nearest to a third of its size."""
        dense, previous = math.prod(region.shape), 0
        trains = [(_numbers(form, region), form) for form in TensorTrain.candidates(region, analysis)]
        for second in LowRank.candidates(region, analysis):
            aim = _numbers(second, region) * SHARE / (1.0 - SHARE)
            place = bisect_left(trains, aim, key=lambda train: train[0])
            near = trains[max(0, place - 1) : place + 1]
            if not near:
                return
            size, first = min(near, key=lambda train: abs(train[0] - aim))
            size += _numbers(second, region)
            if previous < size < dense:
                yield cls(first, second)
                previous = size

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """The shapes of both parts."""
        for part in self._parts.values():
            if "single" not in part.regions or isinstance(part, Hybrid):
                raise PlanError(f"{part.name} is no part of a sum", where=region.name, fix="take another")
        return {
            f"{name}_{place}": shape
            for place, part in self._parts.items()
            for name, shape in part.factor_shapes(region).items()
        }

    @property
    def _parts(self) -> dict[str, Factorization]:
        return {"first": self.first, "second": self.second}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """The loss of what `fit` gives."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """Both parts in turn, with and without the metric; then all factors of the better pair in it."""
        self.factor_shapes(analysis.region)
        weight, metric = weights[analysis.region.site.weight], analysis.metric
        work = require_finite(weight, analysis.region.name).to(working_dtype(weight))
        pairs = [self._in_turn(work, analysis, used) for used in (Metric(), metric)]
        best, start = min(pairs, key=lambda pair: metric.loss(work - pair[0].to_dense(pair[1])))
        parts = refine(best.to_dense, start, work, metric.gradient, SWEEPS, STEPS)
        return best, stored(parts, weight)

    def _in_turn(
        self, weight: Tensor, analysis: RegionAnalysis, metric: Metric
    ) -> tuple[Self, dict[str, Tensor]]:
        """Second, first, second, each fitted to what the other leaves."""
        name = analysis.region.site.weight
        fitted, left_over = self, weight
        factors: dict[str, Tensor] = {}
        for place in ("second", "first", "second"):
            part = replace(analysis, weights={name: left_over}, metrics={name: metric}, known_spectrum=None)
            form, found = self._parts[place].fit(part.weights, part)
            fitted = replace(fitted, **{place: form})
            factors |= {f"{factor}_{place}": value for factor, value in found.items()}
            left_over = weight - form.to_dense(found)
        return fitted, factors

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """Both parts of x, added."""
        return self.first.apply(x, _of("first", factors)) + self.second.apply(x, _of("second", factors))

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """W₁ + W₂."""
        return self.first.to_dense(_of("first", factors)) + self.second.to_dense(_of("second", factors))

    def geometry(self, region: Region) -> GeometricForm:
        """The subspaces of both parts, and a sum."""
        spaces: list[Subspace] = []
        steps: list[Transformation] = []
        ends: list[str] = []
        for place, part in self._parts.items():
            form = part.geometry(region)
            spaces += [replace(space, name=f"{place} {space.name}") for space in form.subspaces]
            for step in form.transformations:
                source = tuple(f"{place} {name}" for name in step.source)
                steps.append(replace(step, source=source, target=f"{place} {step.target}"))
            ends.append(steps[-1].target)
        return GeometricForm(tuple(spaces), (*steps, Transformation("add", tuple(ends), "sum")))


def _of(place: str, factors: Factors) -> Factors:
    """The factors of one part under their own names."""
    end = f"_{place}"
    return {name.removesuffix(end): part for name, part in factors.items() if name.endswith(end)}


def _numbers(form: Factorization, region: Region) -> int:
    return sum(map(math.prod, form.factor_shapes(region).values()))
