"""W ≈ [C₁; I; C₂] B: r of the outputs span the others, so rank r takes r (out + in) - r² numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional

from geofx.errors import NumericsError
from geofx.factorizations.contract import Factorization, Factors, rank_grid, require_rank, stored
from geofx.factorizations.low_rank import LowRank
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import eigh_psd
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights

Rows = Literal["window", "pivoted"]

WINDOWS = 9
"""Number of evenly spaced row windows that a fit tries, both ends included: rounding grows with max |C|."""


@dataclass(frozen=True)
class GaugeFixed:
    """Low rank with its gauge fixed (PIFA, Zhao et al. 2025): y_P = B x, all other outputs are C y_P.

    With ``rows="window"`` P is the run of outputs start .. start + r, so y needs one concatenation and no
    permutation; `fit` takes the window with the smallest max |C|. With ``rows="pivoted"`` P comes from a
    pivoted QR, max |C| stays near 1 as half precision needs, and an index restores the order.
    """

    rank: int
    rows: Rows = "window"
    start: int = 0

    name: ClassVar[str] = "gauge_fixed"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})
    closed_form: ClassVar[bool] = True
    static: ClassVar[frozenset[str]] = frozenset({"index"})

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Ranks in even steps below min(out, in): the form is smaller than the weight at each of them."""
        rows, columns = region.site.shape
        kind: Rows = "window" if region.site.dtype in ("float32", "float64") else "pivoted"
        yield from (cls(rank, kind) for rank in rank_grid(min(rows, columns), min(rows, columns)))

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``basis`` (r, in), ``mix`` (out - r, r); ``index`` (out,) where pivoted."""
        rows, columns = region.site.shape
        require_rank(self.rank, min(rows - 1, columns), region)
        shapes: dict[str, tuple[int, ...]] = {
            "basis": (self.rank, columns),
            "mix": (rows - self.rank, self.rank),
        }
        return shapes if self.rows == "window" else {**shapes, "index": (rows,)}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """Σ_{i > r} σ_i², as for `LowRank`: the same matrix, written in fewer numbers."""
        return analysis.spectrum.tail(self.rank)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """B = L_P R and C = L_P̄ L_P^{-1} of the truncation L R.

        Raises:
            NumericsError: no choice of rows keeps the rounding below the truncation error.
        """
        weight = weights[analysis.region.site.weight]
        whole = analysis.truncation
        left, right = whole.left[:, : self.rank].double(), whole.right[: self.rank].double()
        fitted, factors = (
            self._fit_window(left, right) if self.rows == "window" else self._fit_pivoted(left, right)
        )
        cast = {name: part if name == "index" else part.to(weight) for name, part in factors.items()}
        rounding = _rounding_loss(fitted.to_dense(cast), left @ right, analysis)
        if rounding > _tolerable_loss(analysis, self.rank):
            raise NumericsError(
                f"gauge-fixed factors of rank {self.rank} lose {rounding:.2g} by rounding",
                where=f"{analysis.region.name}, {weight.dtype}",
                fix="use low_rank here",
            )
        return fitted, cast

    def _fit_window(self, left: Tensor, right: Tensor) -> tuple[Self, Factors]:
        last = left.shape[0] - self.rank
        starts = sorted({round(last * step / (WINDOWS - 1)) for step in range(WINDOWS)})
        mixes = {start: _mix(left, list(range(start, start + self.rank))) for start in starts}
        start = min(mixes, key=lambda key: float(mixes[key].abs().max()))
        basis = left[start : start + self.rank] @ right
        return replace(self, start=start), {"basis": basis, "mix": mixes[start]}

    def _fit_pivoted(self, left: Tensor, right: Tensor) -> tuple[Self, Factors]:
        _, _, order = scipy.linalg.qr(left.T.numpy(force=True), mode="economic", pivoting=True)
        chosen = sorted(int(row) for row in order[: self.rank])
        others = sorted(set(range(left.shape[0])) - set(chosen))
        index = torch.empty(left.shape[0], dtype=torch.int32)
        index[torch.tensor(chosen + others)] = torch.arange(left.shape[0], dtype=torch.int32)
        return self, {"basis": left[chosen] @ right, "mix": _mix(left, chosen), "index": index}

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """[z Cᵀ[:start], z, z Cᵀ[start:]] with z = x Bᵀ."""
        spanned = functional.linear(x, factors["basis"])
        others = functional.linear(spanned, factors["mix"])
        if self.rows == "pivoted":
            return torch.cat([spanned, others], -1).index_select(-1, factors["index"])
        if self.start == 0:
            return torch.cat([spanned, others], -1)
        last = factors["mix"].shape[0]
        if self.start == last:
            return torch.cat([others, spanned], -1)
        before, after = others.narrow(-1, 0, self.start), others.narrow(-1, self.start, last - self.start)
        return torch.cat([before, spanned, after], -1)

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """Rows P are B, the others C B."""
        basis, mix = factors["basis"], factors["mix"]
        rows = basis.shape[0] + mix.shape[0]
        order = torch.arange(rows) if self.rows == "window" else torch.argsort(factors["index"].cpu())
        spanning = self._spanning(factors, rows)
        dense = basis.new_empty(rows, basis.shape[1])
        others = order[~torch.isin(order, spanning)]
        dense[spanning], dense[others] = basis, mix @ basis
        return dense

    def unfold(self, factors: Factors, dense: Tensor) -> tuple[Factorization, dict[str, Tensor]]:
        """L R with LᵀL = R Rᵀ: a step on C would move all other outputs by as much as C is large."""
        basis = factors["basis"].double()
        identity = torch.eye(self.rank, dtype=basis.dtype, device=basis.device)
        axes, upper = torch.linalg.qr(
            self.to_dense({**factors, "basis": identity, "mix": factors["mix"].double()})
        )
        lifted = upper @ basis
        squares, turned = eigh_psd(lifted @ lifted.T, "product of gauge-fixed factors")
        roots = squares.clamp_min(torch.finfo(squares.dtype).eps * float(squares[0])) ** 0.25
        parts = {"left": axes @ turned * roots, "right": turned.T @ lifted / roots[:, None]}
        return LowRank(self.rank), {**self._index(factors), **stored(parts, factors["basis"])}

    def fold(self, trained: Factors) -> dict[str, Tensor]:
        """B = L_P R, C = L_P̄ L_P⁻¹ for the same rows P."""
        left, right = trained["left"].double(), trained["right"].double()
        spanning = self._spanning(trained, left.shape[0])
        parts = {"basis": left[spanning] @ right, "mix": _mix(left, spanning.tolist())}
        return {**self._index(trained), **stored(parts, trained["left"])}

    def _spanning(self, factors: Factors, rows: int) -> Tensor:
        """The outputs P, in the order of the rows of B."""
        if self.rows == "window":
            return torch.arange(self.start, self.start + self.rank)
        return torch.argsort(factors["index"].cpu())[: self.rank]

    def _index(self, factors: Factors) -> dict[str, Tensor]:
        return {"index": factors["index"]} if self.rows == "pivoted" else {}

    def geometry(self, region: Region) -> GeometricForm:
        """Two subspaces of dimension r, the output's given as a graph over r of its coordinates."""
        rows, columns = region.site.shape
        spaces = Subspace("input", self.rank, columns), Subspace("output", self.rank, rows)
        steps = (
            Transformation("project", ("input",), "spanning outputs"),
            Transformation("expand", ("spanning outputs",), "other outputs"),
            Transformation("direct_sum", ("spanning outputs", "other outputs"), "output"),
        )
        reordered = (Transformation("permute", ("output",), "output"),) if self.rows == "pivoted" else ()
        return GeometricForm(spaces, (*steps, *reordered))


def _mix(left: Tensor, rows: list[int]) -> Tensor:
    """C with C left[rows] = left[others]; infinite where the chosen rows are singular."""
    others = sorted(set(range(left.shape[0])) - set(rows))
    solution, info = torch.linalg.solve_ex(left[rows].T, left[others].T)
    return (
        solution.T if int(info) == 0 else torch.full((len(others), len(rows)), float("inf"), dtype=left.dtype)
    )


def _rounding_loss(stored: Tensor, exact: Tensor, analysis: RegionAnalysis) -> float:
    """Loss between the truncation and what its factors multiply out to; infinite where they overflow."""
    if not torch.isfinite(stored).all():
        return float("inf")
    return analysis.metric.loss(stored.double() - exact)


def _tolerable_loss(analysis: RegionAnalysis, rank: int) -> float:
    """A hundredth of what the truncation costs, or one part in 10⁴ of the weight."""
    return max(0.01 * analysis.spectrum.tail(rank), 1e-8 * analysis.spectrum.total)
