"""t(option) = t(dense) · ρ(bytes): what a form takes beside the dense maps it replaces, as timed in turns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
from scipy.optimize import isotonic_regression

from geofx.cost_models.contract import Priced
from geofx.errors import ExportError, NumericsError, first_line
from geofx.factorizations import Dense, Factorization
from geofx.piece import Piece
from geofx.workload import measure

ANCHORS = 6
"""Settings of a format that are timed for each shape; others lie between."""
ALIGNED = 64
"""Ranks that are multiples of it are taken for as fast as ranks get."""

Family = tuple[Piece, type[Factorization], int]


class Timer(Protocol):
    """Median seconds of one use of each piece by a call of so many rows, timed in turns."""

    def __call__(self, pieces: Sequence[Piece], rows: int) -> list[float]: ...  # noqa: D102


@dataclass(frozen=True)
class Curve:
    """Seconds over those of the dense maps, non-decreasing in bytes; straight between what was timed.

    Attributes:
        bytes: of the settings that were timed, ascending.
        ratios: theirs, after isotonic regression (Barlow et al. 1972).
        penalties: what a rank takes whose largest divisor that is a power of two is this one, over one
            that `ALIGNED` divides.
    """

    bytes: tuple[float, ...]
    ratios: tuple[float, ...]
    penalties: Mapping[int, float]

    @classmethod
    def through(cls, found: Mapping[Factorization, tuple[float, float]]) -> Curve:
        """The curve through (bytes, ratio) of each setting, best aligned ranks first."""
        smooth = sorted(found[form] for form in _smoothest(found))
        sizes, levels = [size for size, _ in smooth], [ratio for _, ratio in smooth]
        worse: dict[int, list[float]] = defaultdict(list)
        for form, (size, ratio) in found.items():
            if sizes[0] <= size <= sizes[-1]:
                worse[alignment(form)].append(ratio / float(np.interp(size, sizes, levels)))
        penalties = {step: max(1.0, float(np.median(ratios))) for step, ratios in worse.items()}
        points = sorted(
            (size, ratio / penalties.get(alignment(form), 1.0)) for form, (size, ratio) in found.items()
        )
        fitted = isotonic_regression([ratio for _, ratio in points]).x
        return cls(tuple(size for size, _ in points), tuple(map(float, fitted)), penalties)

    def at(self, size: float, form: Factorization | None = None) -> float:
        """The ratio at so many bytes."""
        penalty = 1.0 if form is None else self.penalties.get(alignment(form), 1.0)
        return penalty * float(np.interp(size, self.bytes, self.ratios))


@dataclass(eq=False)
class Measured:
    """Seconds of the very subgraphs in the runtime that will run them.

    Attributes:
        timer: times pieces; `geofx.piece_latency` has those of torch and ONNX Runtime.
        tokens: of a call.
    """

    timer: Timer
    tokens: int
    dense_s: dict[tuple[Piece, int], float] = field(default_factory=dict)
    curves: dict[Family, Curve] = field(default_factory=dict)
    failures: dict[Family, str] = field(default_factory=dict)

    name: ClassVar[str] = "measured"
    unit: ClassVar[str] = "seconds"

    def learn(self, items: Iterable[Priced]) -> dict[tuple[str, str], str]:
        """Time what the prices of ``items`` need; (region, format) -> why it cannot be timed."""
        families: dict[Family, dict[Factorization, float]] = defaultdict(dict)
        named: dict[Family, set[tuple[str, str]]] = defaultdict(set)
        for item in items:
            piece, rows = Piece.of(Dense(), item.region), self._rows(item)
            for part in _parts(piece):
                self._require_dense(part, rows)
            if not isinstance(item.factorization, Dense):
                family = piece, type(item.factorization), rows
                families[family][item.factorization] = measure(item.factorization, item.region).weight_bytes
                named[family].add((item.region.name, item.factorization.name))
        for family, sizes in families.items():
            if family not in self.curves and family not in self.failures:
                try:
                    self.curves[family] = self._curve(family, sizes)
                except (RuntimeError, IndexError, ExportError) as error:
                    self.failures[family] = first_line(error)
        return {
            name: self.failures[family]
            for family in families
            if family in self.failures
            for name in named[family]
        }

    def cost(self, item: Priced) -> float:
        """Seconds of all its uses by one call.

        Raises:
            NumericsError: it was not learnt.
        """
        piece, rows = Piece.of(Dense(), item.region), self._rows(item)
        try:
            whole = math.fsum(self.dense_s[part, rows] for part in _parts(piece))
            if isinstance(item.factorization, Dense):
                return self._uses(item) * whole
            curve = self.curves[piece, type(item.factorization), rows]
        except KeyError:
            raise NumericsError("its latency is not known", where=item.region.name, fix="learn it") from None
        size = measure(item.factorization, item.region).weight_bytes
        return self._uses(item) * whole * curve.at(size, item.factorization)

    def gain_s(self, item: Priced) -> float:
        """Seconds that it takes less than the dense maps, both timed as they are."""
        piece, rows = Piece.of(Dense(), item.region), self._rows(item)
        form_s, *dense_s = self.timer([piece.with_form(item.factorization), *_parts(piece)], rows)
        return self._uses(item) * (math.fsum(dense_s) - form_s)

    def _uses(self, item: Priced) -> int:
        """How often a call runs the region."""
        return max(1, round(item.rows_per_token))

    def _rows(self, item: Priced) -> int:
        """Of each use."""
        return max(1, round(self.tokens * item.rows_per_token / self._uses(item)))

    def _require_dense(self, part: Piece, rows: int) -> None:
        if (part, rows) not in self.dense_s:
            (self.dense_s[part, rows],) = self.timer([part], rows)

    def _curve(self, family: Family, sizes: Mapping[Factorization, float]) -> Curve:
        piece, _, rows = family
        forms = _anchors(sizes)
        parts = _parts(piece)
        seconds = self.timer([*(piece.with_form(form) for form in forms), *parts], rows)
        whole = math.fsum(seconds[len(forms) :])
        return Curve.through(
            {form: (sizes[form], taken / whole) for form, taken in zip(forms, seconds, strict=False)}
        )


def alignment(form: Factorization) -> int:
    """The largest power of two, up to `ALIGNED`, that divides its rank; `ALIGNED` where it has none."""
    rank = getattr(form, "rank", None) or getattr(form, "units", None)
    return min(ALIGNED, rank & -rank) if isinstance(rank, int) else ALIGNED


def _smoothest(forms: Iterable[Factorization]) -> set[Factorization]:
    """The settings of which at least two share the best alignment."""
    by_step: dict[int, set[Factorization]] = defaultdict(set)
    for form in forms:
        by_step[alignment(form)].add(form)
    found: set[Factorization] = set()
    for step in sorted(by_step, reverse=True):
        found |= by_step[step]
        if len(found) > 1:
            break
    return found


def _anchors(sizes: Mapping[Factorization, float]) -> list[Factorization]:
    """The ends, settings spread between, the best aligned near each, and one of each worse alignment."""
    ordered = sorted(sizes, key=lambda form: sizes[form])
    low, high = sizes[ordered[0]], sizes[ordered[-1]]
    reach = (high - low) / (2 * ANCHORS)
    found: dict[Factorization, None] = {ordered[0]: None, ordered[-1]: None}
    for step in range(1, ANCHORS - 1):
        wanted = low + (high - low) * step / (ANCHORS - 1)
        near = [form for form in ordered if abs(sizes[form] - wanted) <= reach] or ordered
        found[min(near, key=lambda form: (-alignment(form), abs(sizes[form] - wanted)))] = None
    middle = (low + high) / 2
    for step in sorted({alignment(form) for form in ordered}):
        alike = [form for form in ordered if alignment(form) == step]
        found[min(alike, key=lambda form: abs(sizes[form] - middle))] = None
    return list(found)


def _parts(piece: Piece) -> list[Piece]:
    """The dense maps of a region, each by itself."""
    if len(piece.maps) == 1:
        return [piece]
    return [Piece(Dense(), "single", (shape,), piece.dtype) for shape in piece.maps]
