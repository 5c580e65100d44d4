"""W as (heads, head_dim, n) ≈ Σ_t C_t ×₁ U_t ×₂ V_t ×₃ R_t: a sum of Tucker blocks over attention heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from geofx.errors import PlanError
from geofx.factorizations.blocks import whole as full
from geofx.factorizations.contract import Factors, measured_loss, stored
from geofx.factorizations.folded import balanced
from geofx.factorizations.refine import refine
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import leading_axes, root_and_inverse, working_dtype
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

TERMS, SIZES = 2, 32
"""Blocks and number of sizes that are proposed; more blocks share less of what heads have in common."""

SWEEPS, STEPS = 4, 3
"""Of `refine`: one side of the metric is gone by then, so that a step costs half a product."""


@dataclass(frozen=True)
class BlockTerm:
    """argmin over sums of T Tucker blocks of ranks (a, b, c) of tr(G ΔW A ΔWᵀ).

    ``heads`` > 0 folds the outputs to (heads, head_dim), as of a query; < 0 the inputs, as of the projection
    after attention; n is the side that stays whole. A block costs h a + b d + a b c + c n numbers.

    Tensorized Transformer (Ma et al., 2019), Tuformer (Liu et al., 2022).
    """

    heads: int
    terms: int
    ranks: tuple[int, int, int]

    name: ClassVar[str] = "block_term"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Two blocks of half the heads each, as head dims carry too much to be cut, in order of c."""
        heads = abs(region.site.heads)
        rows, columns = region.shape
        if heads < 2:
            return
        folded, whole = (rows, columns) if region.site.heads > 0 else (columns, rows)
        first, dim = -(-heads // 2), folded // heads
        fixed, each = heads * first + dim * dim, first * dim + whole
        limit = min(whole, first * dim, ((rows * columns - 1) // TERMS - fixed) // each)
        step = max(1, limit // SIZES)
        yield from (
            cls(region.site.heads, TERMS, (first, dim, third)) for third in range(step, limit + 1, step)
        )

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``heads`` (h, T, a), ``dims`` (T, b, d), ``core`` (T, c, a, b) and ``whole`` (T, c, n)."""
        heads, dim, whole = self._fold(region)
        first, second, third = self.ranks
        return {
            "heads": (heads, self.terms, first),
            "dims": (self.terms, second, dim),
            "core": (self.terms, third, first, second),
            "whole": (self.terms, third, whole),
        }

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """What `fit` measures."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The better of two deflations, of W and of W whitened mode by mode, refined where it is whitened."""
        (weight,), frame = weights.values(), self._frame(analysis)
        plain = _moved(_deflated(frame.plain, self.ranks, self.terms, None), frame.roots)
        white = _deflated(frame.target, self.ranks, self.terms, frame.form)
        best = min((white, plain), key=frame.loss)
        dtype = working_dtype(weight)
        form = frame.form.to(dtype)
        refined = refine(
            _sum,
            {name: part.to(dtype) for name, part in best.items()},
            frame.target.flatten(0, 1).to(dtype),
            lambda change: form @ change,
            sweeps=SWEEPS,
            steps=STEPS,
        )
        factors = balanced(_moved({name: part.double() for name, part in refined.items()}, frame.inverses))
        return self, stored(factors, weight)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """Tokens through R, C, V and U, or the other way round."""
        heads, dims, core, whole = (factors[name] for name in ("heads", "dims", "core", "whole"))
        mix, (terms, third, first, second) = heads.flatten(1), core.shape
        rows = x.reshape(-1, x.shape[-1])
        if self.heads > 0:
            latent = functional.linear(rows, whole.flatten(0, 1)).reshape(-1, terms, third)
            blocks = torch.bmm(latent.transpose(0, 1), core.flatten(2)).reshape(terms, -1, second)
            spread = torch.bmm(blocks, dims).reshape(terms, -1, first, dims.shape[2])
            y = functional.linear(spread.permute(1, 3, 0, 2).flatten(2), mix).transpose(1, 2).flatten(1)
        else:
            cut = rows.reshape(-1, heads.shape[0], dims.shape[2]).transpose(1, 2)
            mixed = (cut @ mix).reshape(-1, dims.shape[2], terms, first).permute(2, 0, 3, 1)
            blocks = torch.bmm(mixed.flatten(1, 2), dims.mT).reshape(terms, -1, first * second)
            latent = torch.bmm(blocks, core.flatten(2).mT).transpose(0, 1).flatten(1)
            y = latent @ whole.flatten(0, 1)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """Σ_t C_t ×₁ U_t ×₂ V_t ×₃ R_t, unfolded."""
        folded = _sum(factors)
        return folded if self.heads > 0 else folded.T

    def geometry(self, region: Region) -> GeometricForm:
        """Per block three subspaces and the core, resized along each of them; blocks add up."""
        heads, dim, whole = self._fold(region)
        ambients = {"heads": heads, "dims": dim, "whole": whole}
        spaces, steps = [], []
        for block in range(self.terms):
            names = [f"{name}{block}" for name in ambients]
            spaces += [
                Subspace(name, rank, ambient)
                for name, rank, ambient in zip(names, self.ranks, ambients.values(), strict=True)
            ]
            core = Subspace(f"core{block}", math.prod(self.ranks), math.prod(self.ranks))
            spaces.append(core)
            steps += [Transformation("contract", (core.name, name), core.name) for name in names]
        cores = tuple(f"core{block}" for block in range(self.terms))
        return GeometricForm(tuple(spaces), (*steps, Transformation("add", cores, "weight")))

    def _fold(self, region: Region) -> tuple[int, int, int]:
        """(heads, head_dim, n) of the region's weight.

        Raises:
            PlanError: the heads do not divide their side, or a rank is larger than what it is a rank of.
        """
        folded, whole = region.shape if self.heads > 0 else region.shape[::-1]
        heads = abs(self.heads)
        if not heads or folded % heads or self.terms < 1:
            raise PlanError(
                f"{self.terms} terms over {self.heads} heads do not fit",
                where=f"{region.name}, shape {region.shape}",
                fix="mend heads and terms",
            )
        shape = heads, folded // heads, whole
        if not all(1 <= rank <= size for rank, size in zip(self.ranks, shape, strict=True)):
            raise PlanError(
                f"ranks {self.ranks} are outside 1..{shape}",
                where=f"{region.name}, shape {region.shape}",
                fix="mend the ranks",
            )
        return shape

    def _frame(self, analysis: RegionAnalysis) -> _Frame:
        shape, weight = self._fold(analysis.region), analysis.weight.double()
        metric = analysis.metric
        if self.heads > 0:
            return _Frame.of(weight.reshape(shape), metric.output, metric.input)
        return _Frame.of(weight.T.reshape(shape), metric.input, metric.output)


@dataclass(frozen=True, eq=False)
class _Frame:
    """Coordinates in which the metric is near the identity: each mode whitened by its own moment.

    ``plain`` (h, d, n) is the weight, ``target`` the same in the new coordinates, ``form`` (h d, h d) what is
    left of the metric there: that of the whole side is gone.
    """

    plain: Tensor
    target: Tensor
    form: Tensor
    roots: tuple[Tensor, ...]
    inverses: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensor: Tensor, folded: Tensor | None, whole: Tensor | None) -> _Frame:
        heads, dim, size = tensor.shape
        moment, other = _of_unit_mean(full(folded, heads * dim)), _of_unit_mean(full(whole, size))
        parts = moment.reshape(heads, dim, heads, dim)
        moments = torch.einsum("idjd->ij", parts), torch.einsum("hihj->ij", parts), other
        roots, inverses = zip(*(root_and_inverse(part) for part in moments), strict=True)
        unmixed = torch.kron(inverses[0], inverses[1])
        return cls(tensor, _multiplied(tensor, roots), unmixed @ moment @ unmixed, roots, inverses)

    def loss(self, factors: Factors) -> float:
        """The quadratic form of what ``factors`` miss."""
        change = self.target.flatten(0, 1) - _sum(factors)
        return float((change * (self.form @ change)).sum())


def _of_unit_mean(moment: Tensor) -> Tensor:
    """A moment over the mean of its diagonal, so that its unit does not reach the factors' entries."""
    return moment / (float(moment.diagonal().mean()) or 1.0)


def _sum(factors: Factors) -> Tensor:
    """Σ_t C_t ×₁ U_t ×₂ V_t ×₃ R_t as (h d, n)."""
    inner = torch.einsum("tcab,tbd->tcad", factors["core"], factors["dims"])
    outer = torch.einsum("hta,tcad->hdtc", factors["heads"], inner)
    return outer.flatten(2).flatten(0, 1) @ factors["whole"].flatten(0, 1)


def _moved(factors: Factors, maps: tuple[Tensor, ...]) -> Factors:
    """Factors with each mode multiplied by its symmetric matrix."""
    heads, dims, whole = maps
    return {
        "heads": torch.einsum("ij,jta->ita", heads, factors["heads"]),
        "dims": factors["dims"] @ dims,
        "core": factors["core"],
        "whole": factors["whole"] @ whole,
    }


def _deflated(tensor: Tensor, ranks: tuple[int, int, int], terms: int, form: Tensor | None) -> Factors:
    """One truncated HOSVD after another, each of what those before left; ``form`` weighs the last mode."""
    blocks = []
    for _ in range(terms):
        flat = tensor.flatten(0, 1)
        unfolded = tensor.flatten(1), tensor.movedim(1, 0).flatten(1), flat.T
        grams = [part @ part.T for part in unfolded[:2]]
        grams.append(flat.T @ (flat if form is None else form @ flat))
        bases = [leading_axes(gram, rank) for gram, rank in zip(grams, ranks, strict=True)]
        core = _multiplied(tensor, [basis.T for basis in bases])
        tensor = tensor - _multiplied(core, bases)
        blocks.append((*bases, core))
    heads, dims, whole, core = (torch.stack(parts) for parts in zip(*blocks, strict=True))
    return {
        "heads": heads.transpose(0, 1),
        "dims": dims.mT,
        "core": core.permute(0, 3, 1, 2),
        "whole": whole.mT,
    }


def _multiplied(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """T ×₁ M₁ ×₂ M₂ ×₃ M₃."""
    first, second, third = matrices
    return torch.einsum("ijk,ai->ajk", torch.einsum("ijk,bj->ibk", tensor @ third.T, second), first)
