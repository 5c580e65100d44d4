"""W ≈ Σ_t (u₁ₜ ⊗ … ⊗ u_pt) (v₁ₜ ⊗ … ⊗ v_qt)ᵀ: r rank-one terms over the folds of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from geofx.factorizations.contract import Factors, measured_loss, require_rank
from geofx.factorizations.folded import fit_folded, rank_path, require_folds
from geofx.factorizations.folds import fold
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import leading_axes
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

SWEEPS, STEPS = 2, 3
"""Of `refine`: six metric products per factor."""

WORK = 2e9
"""Flops that alternating least squares may take per start, but for `LEAST_SWEEPS`."""

LEAST_SWEEPS, MOST_SWEEPS, MOST_RESTARTS = 1, 100, 2

PROXIMITY = 1e-12
"""Pull towards the last iterate, relative to the mean diagonal: steps stay finite where terms cancel."""


@dataclass(frozen=True)
class CP:
    """Factors U_k (m_k, r), V_k (n_k, r) over out = Π m_k = Π ``rows`` and in = Π n_k = Π ``columns``.

    Canonical polyadic form (Hitchcock 1927; Carroll and Chang 1970; of layers, Lebedev et al. 2015). Start:
    alternating least squares from the largest of the orthogonal rank-one terms that nested SVDs give
    (Batselier et al. 2015) and, where they cost little, from seeded random factors; the best is kept.
    """

    rank: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    name: ClassVar[str] = "cp"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Three orders: the longer side folded in two, which keeps the rank and so the flops low."""
        folds = _folds(region.site.shape)
        if folds is None:
            return
        total = sum(folds[0]) + sum(folds[1])
        dense = math.prod(region.site.shape)
        for (rank,) in rank_path((dense,), lambda ranks: ranks[0] * total, dense):
            yield cls(rank, *folds)

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``row1`` … (m_k, r) and ``column1`` … (n_k, r)."""
        require_folds(self.rows, self.columns, region)
        sizes = (*self.rows, *self.columns)
        require_rank(self.rank, math.prod(sizes) // max(sizes), region)
        return {name: (size, self.rank) for name, size in zip(self._names, sizes, strict=True)}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """That of the factors that `fit` finds."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """ALS on the weight or on the whitened weight, refined in the metric."""
        self.factor_shapes(analysis.region)
        axes = {name: {0: mode} for mode, name in enumerate(self._names)}
        folds = self.rows, self.columns
        return self, fit_folded(analysis, folds, self._start, self._dense, axes, SWEEPS, STEPS)

    def _start(self, tensor: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._names, best_of_starts(tensor.squeeze(0), self.rank), strict=True))

    def _dense(self, parts: Factors) -> Tensor:
        """(1, Π rows, Π columns): terms of the rows times terms of the columns."""
        factors = [parts[name] for name in self._names]
        left, right = khatri_rao(factors[: len(self.rows)]), khatri_rao(factors[len(self.rows) :])
        return (left @ right.T).unsqueeze(0)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """Each fold of x onto its r vectors, term by term; each fold of y out of its r vectors."""
        out, lead = x, x.shape[:-1]
        for k in reversed(range(len(self.columns))):
            vectors, before = factors[f"column{k + 1}"], math.prod(self.columns[:k])
            if k == len(self.columns) - 1:
                out = functional.linear(out.reshape(*lead, before, self.columns[k]), vectors.T)
            else:
                out = (out.reshape(*lead, before, self.columns[k], self.rank) * vectors).sum(-2)
        for k in range(len(self.rows) - 1):
            out = (out.unsqueeze(-2) * factors[f"row{k + 1}"]).flatten(-3, -2)
        return functional.linear(out, factors[f"row{len(self.rows)}"]).flatten(-2)

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """The sum of the terms."""
        return self._dense(factors)[0]

    def geometry(self, region: Region) -> GeometricForm:
        """One subspace per order, their directions in step: a sum of r direct products."""
        sizes = (*self.rows, *self.columns)
        spaces = tuple(
            Subspace(name, min(self.rank, size), size) for name, size in zip(self._names, sizes, strict=True)
        )
        names = tuple(space.name for space in spaces)
        steps = (
            Transformation("direct_product", names, "terms"),
            Transformation("add", ("terms",), "weight"),
        )
        return GeometricForm(spaces, steps)

    @property
    def _names(self) -> tuple[str, ...]:
        rows = (f"row{k}" for k in range(1, len(self.rows) + 1))
        return (*rows, *(f"column{k}" for k in range(1, len(self.columns) + 1)))


def _folds(shape: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The longer side folded in two, else the other."""
    rows, columns = (fold(size, 2) for size in shape)
    if rows and (shape[0] >= shape[1] or not columns):
        return rows, (shape[1],)
    return ((shape[0],), columns) if columns else None


def best_of_starts(tensor: Tensor, rank: int) -> list[Tensor]:
    """Factors (s_k, r) of the least squared error that alternating least squares comes to from any start."""
    per_sweep = 2.0 * tensor.dim() * (tensor.numel() * rank + rank**3 / 6 + rank**2 * sum(tensor.shape))
    sweeps = int(min(MOST_SWEEPS, max(LEAST_SWEEPS, WORK / per_sweep)))
    starts = [orthogonal_terms(tensor, rank)]
    for seed in range(min(MOST_RESTARTS, int(WORK / per_sweep / MOST_SWEEPS))):
        generator = torch.Generator().manual_seed(seed)
        draws = (torch.randn(size, rank, generator=generator, dtype=tensor.dtype) for size in tensor.shape)
        starts.append([draw.to(tensor.device) for draw in draws])
    runs = [alternate(tensor, start, sweeps) for start in starts]
    return _level(min(runs, key=lambda run: run[1])[0])


def alternate(tensor: Tensor, start: list[Tensor], sweeps: int) -> tuple[list[Tensor], float]:
    """Alternating least squares, factor by factor; the best iterate and its squared error."""
    factors, total = [part.clone() for part in start], float(tensor.square().sum())
    best, least = list(factors), math.inf
    for _ in range(sweeps):
        for mode in range(tensor.dim()):
            others = [part / part.norm(dim=0).clamp_min(1e-300) for part in factors]
            scale = math.prod(part.norm(dim=0) for k, part in enumerate(factors) if k != mode)
            old = factors[mode] * scale
            others.pop(mode)
            gram = math.prod(part.T @ part for part in others)
            pull = PROXIMITY * float(gram.diagonal().mean())
            correlated = _correlate(tensor, others, mode)
            chol, info = torch.linalg.cholesky_ex(gram + pull * torch.eye(len(gram), dtype=gram.dtype))
            if info:
                return best, least
            new = torch.cholesky_solve((correlated + pull * old).T, chol).T
            factors = [*others[:mode], new, *others[mode:]]
        error = total - 2 * float((correlated * new).sum()) + float(((new.T @ new) * gram).sum())
        gain, best, least = least - error, *((factors, error) if error < least else (best, least))
        if gain <= 1e-15 * total:
            break
    return best, least


def orthogonal_terms(tensor: Tensor, rank: int) -> list[Tensor]:
    """The ``rank`` largest of the mutually orthogonal rank-one terms of nested SVDs, longest order first."""
    order = sorted(range(tensor.dim()), key=lambda mode: -tensor.shape[mode])
    found: list[Tensor] = []
    rest = tensor.permute(order).reshape(1, -1)
    for mode in order[:-1]:
        left, right = _split(rest.reshape(len(rest), tensor.shape[mode], -1))
        found = [part.repeat_interleave(left.shape[2], dim=1) for part in found]
        found.append(left.movedim(1, 0).flatten(1))
        rest = right.flatten(0, 1)
    found.append(rest.T)
    sizes = math.prod(part.norm(dim=0) for part in found)
    kept = sizes.argsort(descending=True, stable=True)[:rank]
    return [found[order.index(mode)][:, kept] for mode in range(tensor.dim())]


def khatri_rao(factors: list[Tensor]) -> Tensor:
    """(Π s_k, r): the Kronecker product of the factors' columns, term by term."""
    result = factors[0]
    for part in factors[1:]:
        result = (result.unsqueeze(1) * part).flatten(0, 1)
    return result


def _split(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(b, m, q) and (b, q, n): the q = min(m, n) orthogonal rank-one terms of each matrix (b, m, n)."""
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    grams = wide @ wide.mT
    basis = leading_axes(grams, grams.shape[-1], "fold")
    scaled = basis.mT @ wide
    return (scaled.mT, basis.mT) if tall else (basis, scaled)


def _correlate(tensor: Tensor, others: list[Tensor], mode: int) -> Tensor:
    """(s, r): the tensor's unfolding along ``mode`` times the terms of the other orders."""
    moved = tensor.movedim(mode, 0)
    longest = max(range(len(others)), key=lambda k: len(others[k]))
    if len(moved) >= len(others[longest]):
        return moved.flatten(1) @ khatri_rao(others)
    partial = moved.movedim(longest + 1, -1) @ others[longest]
    for part in reversed([part for k, part in enumerate(others) if k != longest]):
        partial = (partial * part).sum(-2)
    return partial


def _level(factors: list[Tensor]) -> list[Tensor]:
    """Factors whose columns have equal norms term by term."""
    norms = [part.norm(dim=0).clamp_min(1e-300) for part in factors]
    level = math.prod(norms) ** (1.0 / len(norms))
    return [part * (level / norm) for part, norm in zip(factors, norms, strict=True)]
