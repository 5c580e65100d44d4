"""The contract of a factorization; the formats live one per file beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from geofx.errors import PlanError
from geofx.geometry import GeometricForm
from geofx.linalg import require_finite
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

Factors = Mapping[str, Tensor]

SIZES = 64
"""How many sizes a format proposes for a weight, about evenly spaced below its own."""


@runtime_checkable
class Factorization(Protocol):
    """A named way to write the weights of a region as smaller factors: a frozen dataclass of settings.

    Laws, tested for every format: ``apply(x, F, i) == x @ to_dense(F, i)ᵀ`` for each site i of the region; a
    weight that has the structure is recovered exactly; ``fit`` gives the shapes that ``factor_shapes``
    declares. Factors that all sites share have plain names, those of site i are named by `of_site`.
    """

    name: ClassVar[str]
    regions: ClassVar[frozenset[RegionKind]]
    closed_form: ClassVar[bool]
    """Whether `predicted_loss` is had from the spectrum; else it takes a fit."""

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Settings worth pricing for ``region``, in order of size; none where the shape does not fit."""
        ...

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """Shape of each factor: of the weight's dtype, or int32 where its name begins with ``index``."""
        ...

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Increase of the model's loss, tr(G ΔW A ΔWᵀ), in the analysis' unit."""
        ...

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The factors, and this format with the settings that depend on the data filled in.

        Raises:
            NumericsError: the factors would not be finite or not accurate in the weight's dtype.
        """
        ...

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """y of one site from x (..., in) in aten operations; what graph, flops and exports derive from."""
        ...

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """The (out, in) weight of one site, written independently of `apply`."""
        ...

    def geometry(self, region: Region) -> GeometricForm:
        """The subspaces of this format and the transformations among them."""
        ...


@runtime_checkable
class Lookup(Protocol):
    """What a format of ``embedding`` and ``tied_embedding`` regions has besides."""

    def lookup(self, ids: Tensor, factors: Factors) -> Tensor:
        """Rows W[ids] (..., in) of the weight, built for the asked ids only; W[ids] == to_dense(F)[ids]."""
        ...


@runtime_checkable
class Growing(Protocol):
    """What a format of tables has besides whose rows are stored each on its own."""

    def add_tokens(self, factors: Factors, rows: Tensor) -> tuple[Factorization, Factors]:
        """The format and factors with ``rows`` (n, dim) after the last; the stored ones are left alone."""
        ...


@runtime_checkable
class Narrowing(Protocol):
    """What a format has besides that drops outputs of some of its sites, which are inputs of others.

    Its `to_dense` gives the matrices of the narrowed model. A site with fewer outputs loses nothing by
    itself: what is lost shows at the sites that read them.
    """

    def kept_outputs(self, site: int, sites: int) -> Tensor | None:
        """The outputs that the ``site``-th of ``sites`` keeps, ascending; None where it keeps all."""
        ...

    def kept_inputs(self, site: int, sites: int) -> Tensor | None:
        """The inputs that it still gets, likewise."""
        ...

    def narrow_bias(self, bias: Tensor, factors: Factors) -> Tensor:
        """The bias of a site with fewer outputs."""
        ...


@runtime_checkable
class Unfolding(Protocol):
    """What a format has besides that is trained as another one of the same maps, and folded at the end."""

    static: ClassVar[frozenset[str]]
    """Factors of that other form which training leaves alone."""

    def unfold(self, factors: Factors, dense: Tensor) -> tuple[Factorization, dict[str, Tensor]]:
        """A form to train in the place of this one, and its factors; ``dense`` is the (out, in) weight."""
        ...

    def fold(self, trained: Factors) -> dict[str, Tensor]:
        """The factors of this format, of those of the other form.

        Raises:
            NumericsError: they cannot be had from them.
        """
        ...


@dataclass(frozen=True, eq=False)
class Factored:
    """A format as fitted, the factors of one region and the names of the weights that they stand for."""

    factorization: Factorization
    factors: Factors
    weights: tuple[str, ...]

    @property
    def attributes(self) -> dict[str, str]:
        """Factor -> the attribute that it is stored under: the weight's name and the factor's."""
        return {name: factor_name(self.weights, name) for name in self.factors}


def of_site(name: str, site: int) -> str:
    """Name of the factor ``name`` that belongs to one site: itself at the first, ``name@2`` at the third."""
    return f"{name}@{site}" if site else name


def factor_name(weights: tuple[str, ...], factor: str) -> str:
    """Attribute under which a factor is stored: shared ones beside the region's first weight."""
    name, _, site = factor.partition("@")
    return f"{weights[int(site or 0)]}_{name}"


def measured_loss(form: Factorization, analysis: RegionAnalysis) -> float:
    """The loss of ``form`` at the factors that it fits: the prediction of a format without closed form."""
    fitted, factors = form.fit(analysis.weights, analysis)
    return factored_loss(fitted, factors, analysis)


def factored_loss(form: Factorization, factors: Factors, analysis: RegionAnalysis) -> float:
    """Σ over sites of tr(G ΔW A ΔWᵀ) between the weights and what ``factors`` multiply out to."""
    sites = len(analysis.weights)
    return sum(
        analysis.metrics[name].loss(weight.double() - widened(form, factors, site, weight.shape).double())
        for site, (name, weight) in enumerate(analysis.weights.items())
        if not (isinstance(form, Narrowing) and form.kept_outputs(site, sites) is not None)
    )


def widened(form: Factorization, factors: Factors, site: int, shape: tuple[int, ...]) -> Tensor:
    """What ``factors`` multiply out to, in the weight's (out, in) ``shape``: zeros where it is narrower."""
    dense = form.to_dense(factors, site)
    if not isinstance(form, Narrowing):
        return dense
    sites = 1 + max(int(name.partition("@")[2] or 0) for name in factors)
    rows, columns = form.kept_outputs(site, sites), form.kept_inputs(site, sites)
    wide = dense.new_zeros(shape)
    at = (
        torch.arange(shape[0]) if rows is None else rows,
        torch.arange(shape[1]) if columns is None else columns,
    )
    wide[at[0].to(dense.device)[:, None], at[1].to(dense.device)] = dense
    return wide


def stored(parts: Factors, like: Tensor) -> dict[str, Tensor]:
    """Factors in the dtype of the weight ``like``, each with memory of its own; integer ones as they are.

    Raises:
        NumericsError: a factor is not finite in that dtype.
    """
    return {
        name: require_finite(part.to(like), f"factor {name}").clone(memory_format=torch.contiguous_format)
        if part.is_floating_point()
        else part
        for name, part in parts.items()
    }


def rank_grid(limit: int, size: int) -> range:
    """Ranks below ``limit``, in steps that are a power of two and near ``size`` / `SIZES`."""
    step = 1 << max(0, (size // SIZES).bit_length() - 1)
    return range(step, limit, step)


def pair_ranks(region: Region) -> range:
    """Ranks below out · in / (out + in), where a pair of factors would be as big as the weight."""
    rows, columns = region.shape
    return rank_grid(-(-rows * columns // (rows + columns)), min(rows, columns))


def require_rank(rank: int, limit: int, region: Region) -> None:
    """Raises PlanError unless 1 <= rank <= limit."""
    if not 1 <= rank <= limit:
        raise PlanError(
            f"rank {rank} is outside 1..{limit}",
            where=f"{region.name}, shape {region.shape}",
            fix="mend the rank",
        )
