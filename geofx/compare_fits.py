"""Fits of single regions, each done once and kept on disk: the loss for good, the factors while needed."""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

from geofx import linalg, region_analysis
from geofx.cache import Cache
from geofx.digest import digest
from geofx.errors import GeofxError, NumericsError, lasting, out_of_memory
from geofx.factorizations import (
    FACTORIZATIONS,
    Factored,
    Factorization,
    Factors,
    blocks,
    contract,
    folded,
    folds,
    from_json,
    refine,
    to_json,
)
from geofx.factorizations.contract import factored_loss
from geofx.region_analysis import RegionAnalysis

logger = logging.getLogger(__name__)

SHARED = (contract, refine, blocks, folded, folds, region_analysis, linalg)
"""Modules that the fits of several formats run through."""


@dataclass(frozen=True)
class Fit:
    """One format on one region; with an ``error`` there are no factors.

    Attributes:
        asked: the format as proposed.
        form: the format as fitted.
        loss: what the factors lose.
    """

    key: str
    region: str
    asked: Factorization
    form: Factorization
    loss: float = 0.0
    seconds: float = 0.0
    error: str = ""


@dataclass
class Fits:
    """Fits of one model under one calibration, which ``base`` is the hash of.

    Attributes:
        passing: failures since the last `drop` that another time may not be: they are not in the cache.
    """

    cache: Cache
    base: str
    passing: dict[str, Fit] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    def get(self, form: Factorization, analysis: RegionAnalysis) -> Fit:
        """The fit of ``form``, from the cache or done now; a failure that would recur is an entry too."""
        key = digest(self.base, analysis.region.name, to_json(form), code_of(type(form)))
        self._used.add(key)
        found = self.cache.read(key)
        if found is None and key not in self.passing:
            self._fit(key, form, analysis)
            found = self.cache.read(key)
        if key in self.passing:
            return self.passing[key]
        found = found or {}
        fitted = from_json(found["form"])
        return Fit(key, analysis.region.name, form, fitted, found["loss"], found["seconds"], found["error"])

    def factored(self, fit: Fit, analysis: RegionAnalysis) -> Factored:
        """The factors of ``fit``, fitted again where they were dropped or damaged.

        Raises:
            NumericsError: the fit fails this time.
        """
        known = self.cache.read_tensors(fit.key)
        form, factors = self._fit(fit.key, fit.asked, analysis) if known is None else (fit.form, known)
        if not factors:
            raise NumericsError(f"{fit.asked} could not be fitted again", where=fit.region)
        device = next(iter(analysis.weights.values())).device
        here = {name: part.to(device).contiguous() for name, part in factors.items()}
        return Factored(form, here, analysis.region.weights)

    def drop(self) -> None:
        """Forget the factors of all fits since the last call; their losses stay."""
        self.cache.drop_tensors(self._used)
        self._used.clear()
        self.passing.clear()

    def _fit(self, key: str, form: Factorization, analysis: RegionAnalysis) -> tuple[Factorization, Factors]:
        """The form as fitted, and its factors; none where it cannot be. Lack of memory is raised."""
        start = time.perf_counter()
        try:
            fitted, factors = form.fit(analysis.weights, analysis)
            seconds = time.perf_counter() - start
            loss = factored_loss(fitted, factors, analysis)
        except Exception as error:
            if out_of_memory(error):
                raise
            logger.info("%s at %s: %s", form, analysis.region.name, error)
            seconds, why = time.perf_counter() - start, reason(error)
            if lasting(error):
                self.cache.write(key, _entry(form, 0.0, seconds, why))
            else:
                self.passing[key] = Fit(key, analysis.region.name, form, form, 0.0, seconds, why)
            return form, {}
        self.cache.write(key, _entry(fitted, loss, seconds, ""), factors)
        return fitted, factors


def reason(error: Exception) -> str:
    """What happened, on one line; the class too where the error is not one of geofx's."""
    what = error.what if isinstance(error, GeofxError) else f"{type(error).__name__}: {error}"
    return " ".join(what.split())[:160]


@cache
def code_of(*formats: type[Factorization]) -> str:
    """Hash of the code that fits ``formats`` and their parts: an entry of other code is not used."""
    own = [sys.modules[member.__module__] for member in formats]
    parts = [value for module in own for value in vars(module).values() if value in FACTORIZATIONS]
    names = sorted({member.__module__ for member in (*formats, *parts)})
    modules = (*(sys.modules[name] for name in names), *SHARED)
    return digest([inspect.getsource(module) for module in modules])


def _entry(form: Factorization, loss: float, seconds: float, error: str) -> dict[str, object]:
    return {"form": to_json(form), "loss": loss, "seconds": seconds, "error": error}


def seconds_of(fits: Iterable[Fit]) -> float:
    """What these fits took when they were done."""
    return sum(fit.seconds for fit in fits)
