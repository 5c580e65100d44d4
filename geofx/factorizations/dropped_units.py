"""y = W₂ h(x) ≈ W₂' h_K(x): an MLP that keeps the hidden units K, its last matrix refitted to them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from geofx.errors import PlanError
from geofx.factorizations.blocks import whole
from geofx.factorizations.contract import Factors, of_site, rank_grid, require_rank, stored
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import cholesky, require_finite
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

GROUPS = 48
"""In how many groups, of units dropped at once, the order is made."""
LEAST_SHARE = 0.25
"""Smallest share of the units that is proposed."""


@dataclass(frozen=True, eq=False)
class _Path:
    """Units in the order in which they are dropped, and what dropping the first j loses."""

    order: Tensor
    losses: Tensor


_PATHS: WeakKeyDictionary[RegionAnalysis, _Path] = WeakKeyDictionary()


@dataclass(frozen=True)
class DroppedUnits:
    """argmin over K and W₂' of tr(G (W₂ - W₂' S_K) C (W₂ - W₂' S_K)ᵀ), C = E[h hᵀ], S_K the selection of K.

    For given K the refit is W₂' = W₂ C_{:K} C_KK⁻¹. Dropping unit j of those left loses
    w_jᵀ G w_j / [C⁻¹]_jj, so K is found by dropping the least such, a group at a time, with W₂ and C⁻¹
    brought up to date between: the optimal brain surgeon (Hassibi and Stork, 1993) on whole columns. The
    maps before lose the rows of the units that go, exactly: units act one by one between them.

    Attributes:
        units: number of units kept, |K|.
        kept: bits of the units, 1 for those in K, in base64; empty before `fit`.
    """

    units: int
    kept: str = ""

    name: ClassVar[str] = "dropped_units"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"gated_mlp"})
    closed_form: ClassVar[bool] = True

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Numbers of units between `LEAST_SHARE` and all of them."""
        total = _total(region)
        yield from (cls(units) for units in rank_grid(total, total) if units >= LEAST_SHARE * total)

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``weight`` of each site: (units, in) of those before, (out, units) of the last.

        And ``index`` (units,), int32, where a site before has a bias, which is selected as it is used.
        """
        require_rank(self.units, _total(region), region)
        if self.kept and (len(self.indices) != self.units or int(self.indices[-1]) >= _total(region)):
            raise PlanError(
                f"the {len(self.indices)} units named are not {self.units} of {_total(region)}",
                where=region.name,
                fix="plan again",
            )
        *before, last = region.sites
        shapes: dict[str, tuple[int, ...]] = {
            of_site("weight", index): (self.units, site.shape[1]) for index, site in enumerate(before)
        }
        shapes[of_site("weight", len(before))] = (last.shape[0], self.units)
        return shapes | ({"index": (self.units,)} if any(site.has_bias for site in before) else {})

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Σ over the dropped units of what each group lost, for every number of units from one path."""
        path = _path(analysis)
        return float(path.losses[_total(region) - self.units])

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """K from the path, W₂' by the normal equations, in the weights' dtype."""
        total = _total(analysis.region)
        dropped = _path(analysis).order[: total - self.units]
        keep = torch.ones(total, dtype=torch.bool)
        keep[dropped] = False
        *before, last = (weight.double() for weight in weights.values())
        parts = {of_site("weight", index): weight[keep] for index, weight in enumerate(before)}
        parts[of_site("weight", len(before))] = _refit(last, _inputs(analysis), keep)
        fitted = replace(self, kept=_to_text(keep))
        if "index" in fitted.factor_shapes(analysis.region):
            parts["index"] = fitted.indices.to(torch.int32)
        return fitted, stored(parts, next(iter(weights.values())))

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """x Wᵀ with the rows, or the columns, of the units kept."""
        return functional.linear(x, factors[of_site("weight", site)])

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """The site's matrix without the units dropped; `contract.widened` puts zeros in their place."""
        return factors[of_site("weight", site)]

    def narrow_bias(self, bias: Tensor, factors: Factors) -> Tensor:
        """The bias at the units kept."""
        return bias.index_select(0, factors["index"])

    @property
    def indices(self) -> Tensor:
        """The units kept, ascending, int64; the first ones before `fit`."""
        return _from_text(self.kept) if self.kept else torch.arange(self.units)

    def kept_outputs(self, site: int, sites: int) -> Tensor | None:
        """The units, for all sites but the last."""
        return self.indices if site < sites - 1 else None

    def kept_inputs(self, site: int, sites: int) -> Tensor | None:
        """The units, for the last site."""
        return self.indices if site == sites - 1 else None

    def geometry(self, region: Region) -> GeometricForm:
        """One subspace of the hidden space, spanned by coordinates; the output map is refitted to it."""
        spaces = (Subspace("hidden", self.units, _total(region)),)
        steps = (
            Transformation("select", ("hidden",), "hidden"),
            Transformation("expand", ("hidden",), "output"),
        )
        return GeometricForm(spaces, steps)


def _total(region: Region) -> int:
    return region.sites[-1].shape[1]


def _inputs(analysis: RegionAnalysis) -> Tensor:
    """C = E[h hᵀ], shrunk, (units, units) in float64."""
    last = analysis.region.weights[-1]
    return whole(analysis.metrics[last].input, _total(analysis.region)).double()


def _refit(weight: Tensor, moment: Tensor, keep: Tensor) -> Tensor:
    root = cholesky(moment[keep][:, keep], "second moment of the units kept")
    refitted: Tensor = torch.cholesky_solve(moment[keep] @ weight.T, root).T
    return refitted


def _path(analysis: RegionAnalysis) -> _Path:
    """The whole order of dropping and its losses, computed once for an analysis."""
    if analysis not in _PATHS:
        last = analysis.region.weights[-1]
        metric = analysis.metrics[last]
        weight = require_finite(analysis.weights[last], last).double()
        _PATHS[analysis] = _drop(weight, metric.left(weight), _inputs(analysis), metric.scale)
    return _PATHS[analysis]


def _drop(weight: Tensor, lifted: Tensor, moment: Tensor, scale: float) -> _Path:
    """Greedy path for W (out, n), G W and C; both products are brought up to date alike."""
    total = weight.shape[1]
    inverse = torch.cholesky_inverse(cholesky(moment, "second moment of the units"))
    weight, lifted = weight.clone(), lifted.clone()
    left = torch.arange(total)
    order, losses = list[Tensor](), [0.0]
    while len(left) > 1:
        count = min(-(-total // GROUPS), len(left) - 1)
        scores = (weight * lifted).sum(0) / inverse.diagonal()
        chosen = scores.argsort(stable=True)[:count]
        root = cholesky(inverse[chosen][:, chosen], "inverse second moment of the units")
        rows = inverse[chosen]
        gram = weight[:, chosen].T @ lifted[:, chosen]
        losses += (losses[-1] + _steps(gram, root)).tolist()
        mixed = torch.cholesky_solve(rows, root)
        order.append(left[chosen])
        rest = torch.ones(len(left), dtype=torch.bool)
        rest[chosen] = False
        weight = weight[:, rest] - weight[:, chosen] @ mixed[:, rest]
        lifted = lifted[:, rest] - lifted[:, chosen] @ mixed[:, rest]
        inverse = inverse[rest][:, rest] - rows[:, rest].T @ mixed[:, rest]
        left = left[rest]
    return _Path(torch.cat([*order, left]), scale * torch.tensor(losses, dtype=torch.float64))


def _steps(gram: Tensor, root: Tensor) -> Tensor:
    """tr(Wᵀ_R G W_R (C⁻¹_RR)⁻¹) for R the first 1, 2, .. units of a group, ``root`` of C⁻¹_RR.

    With L Lᵀ = C⁻¹_RR the inverse of a leading block is L_k⁻ᵀ L_k⁻¹, so the sums are running sums of the
    diagonal of L⁻¹ (WᵀGW) L⁻ᵀ.
    """
    half = torch.linalg.solve_triangular(root, gram, upper=False)
    lifted: Tensor = torch.linalg.solve_triangular(root, half.T, upper=False)
    return lifted.diagonal().clamp_min(0.0).cumsum(0)


def _to_text(keep: Tensor) -> str:
    return base64.b64encode(np.packbits(keep.numpy()).tobytes()).decode()


def _from_text(text: str) -> Tensor:
    try:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8))
    except (binascii.Error, ValueError) as error:
        raise PlanError("the kept units are not base64", fix="plan again") from error
    return torch.from_numpy(np.flatnonzero(bits))
