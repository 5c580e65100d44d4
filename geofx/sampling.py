"""The next token out of logits: the likeliest, or drawn by temperature, top-k and nucleus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from geofx.errors import ConfigError, NumericsError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in this order, as `transformers` does.

    Attributes:
        temperature: logits are divided by it and the token is drawn; 0 takes the likeliest.
        top_k: draw among so many of the likeliest; 0: among all.
        top_p: draw among the likeliest whose probabilities add up to it (Holtzman et al. 2020).
        repetition_penalty: logits of tokens that are there are divided by it, or multiplied where below 0
            (Keskar et al. 2019).
        seed: of what is drawn.

    Raises:
        ConfigError: a value is out of range, or not of its type.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "repetition_penalty"):
            self._require(name, isinstance(getattr(self, name), Real), "a number")
        for name in ("top_k", "seed"):
            self._require(name, isinstance(getattr(self, name), Integral), "a whole number")
        self._require("temperature", 0.0 <= self.temperature < float("inf"), "0 or more")
        self._require("top_k", self.top_k >= 0, "0 or more")
        self._require("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1")
        self._require("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "above 0")
        self._require("seed", self.seed >= 0, "0 or more")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ConfigError(f"{name} {getattr(self, name)!r}", where="sampling", fix=f"give {wanted}")

    def pick(
        self, logits: NDArray[np.float32], seen: Sequence[Sequence[int]], random: np.random.Generator
    ) -> NDArray[np.int64]:
        """One token per row of ``logits`` (rows, vocabulary); ``seen`` are those that the row holds.

        Raises:
            NumericsError: a row holds NaN or +inf, or no finite logit.
        """
        scores = logits.astype(np.float64)
        if self.repetition_penalty != 1.0:
            for row, tokens in zip(scores, seen, strict=True):
                known = np.unique(np.asarray(tokens, np.int64))
                penalty = self.repetition_penalty
                row[known] = np.where(row[known] < 0, row[known] * penalty, row[known] / penalty)
        _require_likeliest(scores)
        if self.temperature == 0.0:
            return np.asarray(scores.argmax(1), np.int64)
        return np.array([random.choice(row.size, p=row) for row in self.probabilities(scores)], np.int64)

    def probabilities(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """What tokens are drawn by, (rows, vocabulary): softmax((s - max s) / T), cut."""
        with np.errstate(over="ignore"):  # far below the likeliest is -inf
            scaled = (scores - scores.max(1, keepdims=True)) / self.temperature
        if 0 < self.top_k < scaled.shape[1]:
            least = np.partition(scaled, -self.top_k, axis=1)[:, -self.top_k, None]
            scaled = np.where(scaled < least, -np.inf, scaled)
        shares = _softmax(scaled)
        if self.top_p < 1.0:
            order = np.argsort(-shares, axis=1)
            ranked = np.take_along_axis(shares, order, 1)
            before = ranked.cumsum(1) - ranked
            np.put_along_axis(shares, order, np.where(before < self.top_p, ranked, 0.0), 1)
        result: NDArray[np.float64] = shares / shares.sum(1, keepdims=True)
        return result


def _require_likeliest(scores: NDArray[np.float64]) -> None:
    """Raises NumericsError unless the largest of each row is finite; -inf stands for what cannot come."""
    wrong = np.flatnonzero(~np.isfinite(scores.max(1)))
    if wrong.size:
        what = "logits hold NaN or +inf, or nothing but -inf"
        raise NumericsError(what, where=f"row {wrong[0]}", fix="export the decoder again, in float32")


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return result
