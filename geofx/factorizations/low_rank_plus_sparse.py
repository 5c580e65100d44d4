"""W ≈ L R + S: low rank for most outputs, and the outputs that it fits worst whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from geofx.errors import PlanError
from geofx.factorizations.contract import SIZES, Factors, measured_loss, require_rank, stored
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import cholesky
from geofx.region import Region, RegionKind
from geofx.region_analysis import Metric, RegionAnalysis, Truncation, Weights, on_right, truncate


@dataclass(frozen=True)
class LowRankPlusSparse:
    """LoSparse (Li et al., 2023): ``rank`` r for all outputs but ``rows`` k of them, which S keeps whole.

    S is structured by neurons as in the paper, for single entries left over would need sparse kernels, an
    index each, and no runtime makes them fast. Rows of L under rows of S would be a gauge freedom, so L has
    out - k rows: the same matrices in k r fewer numbers. y is [L R x, D x] in the order that ``index`` gives.
    """

    rank: int
    rows: int

    name: ClassVar[str] = "low_rank_plus_sparse"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """At a share s of the weight's size, s³ of the rows: none as s goes to 0, all as it goes to 1."""
        outputs, inputs = region.site.shape
        previous = 0
        for step in range(1, SIZES):
            share = step / SIZES
            rows = max(1, round(share**3 * outputs))
            rank = (
                round((share * outputs - rows) * inputs / (outputs - rows + inputs)) if rows < outputs else 0
            )
            numbers = rank * (outputs - rows + inputs) + rows * inputs
            if 1 <= rank <= min(outputs - rows, inputs) and previous < numbers < outputs * inputs:
                yield cls(rank, rows)
                previous = numbers

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``left`` (out - k, r), ``right`` (r, in), ``kept`` (k, in), ``index`` (out,): their places."""
        outputs, inputs = region.site.shape
        if not 1 <= self.rows < outputs:
            raise PlanError(
                f"{self.rows} rows are outside 1..{outputs - 1}", where=region.name, fix="mend the rows"
            )
        require_rank(self.rank, min(outputs - self.rows, inputs), region)
        return {
            "left": (outputs - self.rows, self.rank),
            "right": (self.rank, inputs),
            "kept": (self.rows, inputs),
            "index": (outputs,),
        }

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """The loss of what `fit` gives."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """Rows by their residual, then the optimum in the metric for these rows, and once again.

        Three choices compete: by the residual without weights, by that of rows of equal norm (a few large
        rows would draw R to themselves), and by that in the metric.
        """
        weight, metric = weights[analysis.region.site.weight], analysis.metric
        norms = weight.double().square().sum(1)
        level = Metric(output=1.0 / norms.clamp_min(1e-12 * norms.max() + torch.finfo(torch.float64).tiny))
        starts = [(plain, truncate(weight, plain, analysis.region.name)) for plain in (Metric(), level)]
        free = _inverse_diagonal(metric.output)
        chosen = [self._worst(weight, plain, whole) for plain, whole in starts]
        chosen.append(self._worst(weight, metric, analysis.truncation, free))
        best = min((_Split.of(weight, metric, kept) for kept in chosen), key=self._loss)
        again = self._worst(weight, metric, best.truncation, free)
        if not torch.equal(again, best.kept):
            best = min(best, _Split.of(weight, metric, again), key=self._loss)
        parts = best.factors(weight, self.rank)
        order = torch.argsort(torch.cat([best.others, best.kept])).int()
        return self, stored({**parts, "index": order}, weight)

    def _worst(self, weight: Tensor, metric: Metric, whole: Truncation, free: Tensor | None = None) -> Tensor:
        """The k rows, ascending, that lose most on the row space of R: ‖E_i‖²_A / (G⁻¹)_ii.

        E is what is left of W; the divisor ``free`` counts what the other rows can make good, as in Optimal
        Brain Surgeon (Hassibi and Stork, 1993).
        """
        work, basis = weight.double(), whole.right[: self.rank].double()
        pulled = on_right(basis, metric.input)
        # rows of a truncation's R are orthogonal under A
        squares = (pulled * basis).sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        left_over = work - (work @ pulled.T / squares) @ basis
        losses = (on_right(left_over, metric.input) * left_over).sum(1)
        losses = losses if free is None else losses / free
        return losses.topk(self.rows).indices.sort().values

    def _loss(self, split: _Split) -> float:
        return split.truncation.spectrum.tail(self.rank)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """[(x Rᵀ) Lᵀ, x Dᵀ] in the order of the outputs."""
        latent = functional.linear(x, factors["right"])
        parts = functional.linear(latent, factors["left"]), functional.linear(x, factors["kept"])
        return torch.cat(parts, -1).index_select(-1, factors["index"])

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """Rows of L R and of D, put where they belong."""
        order = torch.argsort(factors["index"])
        rows = torch.cat([factors["left"] @ factors["right"], factors["kept"]])
        return torch.zeros_like(rows).index_copy(0, order, rows)

    def geometry(self, region: Region) -> GeometricForm:
        """The two subspaces of low rank, and one of whole outputs beside them."""
        outputs, inputs = region.site.shape
        spaces = (
            Subspace("input", self.rank, inputs),
            Subspace("output", self.rank, outputs - self.rows),
            Subspace("kept outputs", self.rows, outputs),
        )
        steps = (
            Transformation("project", ("input",), "latent"),
            Transformation("expand", ("latent",), "output"),
            Transformation("direct_sum", ("output", "kept outputs"), "all outputs"),
            Transformation("permute", ("all outputs",), "all outputs"),
        )
        return GeometricForm(spaces, steps)


@dataclass(frozen=True, eq=False)
class _Split:
    """The optimum for given ``kept`` rows K, at every rank at once.

    With O the other rows, S_K = W_K + M (W - L R)_O, M = G_KK⁻¹ G_KO, makes good what it can; what remains is
    the low-rank problem of W_O under A and the Schur complement G_OO - G_OK M.
    """

    kept: Tensor
    others: Tensor
    mix: Tensor
    truncation: Truncation

    @classmethod
    def of(cls, weight: Tensor, metric: Metric, kept: Tensor) -> Self:
        left_out = torch.ones(len(weight), dtype=torch.bool).index_fill(0, kept, False)
        others = left_out.nonzero()[:, 0]
        mix, output = torch.zeros(len(kept), len(others), dtype=torch.float64), metric.output
        if output is not None and output.dim() == 2:
            whole = output.double()
            cross = whole[kept][:, others]
            root = cholesky(whole[kept][:, kept], "second moment of the kept outputs")
            mix = torch.cholesky_solve(cross, root)
            output = whole[others][:, others] - cross.T @ mix
        elif output is not None:
            output = output[others]
        rest = Metric(metric.input, output, metric.scale)
        return cls(kept, others, mix, truncate(weight[others], rest))

    def factors(self, weight: Tensor, rank: int) -> dict[str, Tensor]:
        left, right = self.truncation.left[:, :rank], self.truncation.right[:rank]
        missed = weight[self.others].double() - left.double() @ right.double()
        return {"left": left, "right": right, "kept": weight[self.kept].double() + self.mix @ missed}


def _inverse_diagonal(output: Tensor | None) -> Tensor:
    """(G⁻¹)_ii."""
    if output is None:
        return torch.ones(())
    if output.dim() == 1:
        return 1.0 / output.double()
    return torch.cholesky_inverse(cholesky(output, "second moment of the outputs")).diagonal()
