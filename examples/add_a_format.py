"""A format of one's own, outside geofx: W ≈ K S, where S selects some of the inputs and K maps those.

    python examples/add_a_format.py

That is pruning the width of a layer. What is left is refitted in the metric of the loss, with A the second
moment of the inputs: K = W A Sᵀ (S A Sᵀ)⁻¹.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from plain_module import batches, model
from torch import Tensor
from torch.nn import functional

import geofx
from geofx.factorizations import Factors, register
from geofx.factorizations.contract import measured_loss, rank_grid, stored
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights, on_right


@register
@dataclass(frozen=True)
class FewInputs:
    """``kept`` of ``inputs`` numbers are read."""

    kept: int
    inputs: int

    name: ClassVar[str] = "few_inputs"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"single"})
    closed_form: ClassVar[bool] = False

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Sixty-four sizes or fewer."""
        yield from (cls(kept, region.shape[1]) for kept in rank_grid(region.shape[1], region.shape[1]))

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """What is stored: K, and which inputs it reads."""
        return {"matrix": (region.shape[0], self.kept), "index": (self.kept,)}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """tr(G ΔW A ΔWᵀ) at the fit."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """The inputs j of largest (WᵀGW)_jj A_jj, and K for them."""
        weight, metric = analysis.weight.double(), analysis.metric
        moment = on_right(torch.eye(self.inputs, dtype=torch.float64), metric.input)
        energies = (weight * metric.left(weight)).sum(0) * moment.diagonal()
        index = energies.topk(self.kept).indices.sort().values
        matrix = torch.linalg.solve(moment[index][:, index], (weight @ moment)[:, index], left=False)
        return self, stored({"matrix": matrix, "index": index.int()}, analysis.weight)

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """K S x."""
        return functional.linear(x.index_select(-1, factors["index"]), factors["matrix"])

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """K S."""
        whole = factors["matrix"].new_zeros(len(factors["matrix"]), self.inputs)
        return whole.index_copy(1, factors["index"].long(), factors["matrix"])

    def geometry(self, region: Region) -> GeometricForm:
        """A subspace of coordinates, and its image."""
        rows = region.shape[0]
        spaces = Subspace("input", self.kept, self.inputs), Subspace("output", min(self.kept, rows), rows)
        steps = Transformation("select", ("input",), "input"), Transformation("expand", ("input",), "output")
        return GeometricForm(spaces, steps)


def main() -> None:
    """Planned alone and beside low rank, saved and read like any other."""
    batch, *rest = batches(24)
    analysis = geofx.analyze(
        model(),
        rest[:16],
        holdout=rest[16:],
        loss=lambda output, batch: functional.cross_entropy(output, batch["labels"], reduction="none"),
    )
    predicted = []
    for formats in (["low_rank", FewInputs], ["low_rank"], [FewInputs]):
        plan = analysis.plan(geofx.Budget(size=0.5), formats=formats)
        result = analysis.apply(plan)
        names = " and ".join(sorted({choice.factorization.name for choice in plan.rewritten}))
        found = result.fidelity
        print(f"half the bytes by {names}: loss {found.loss_original:.4f} -> {found.loss_optimized:.4f}")
        predicted.append(plan.loss)
    assert predicted[0] <= min(predicted)
    with tempfile.TemporaryDirectory() as folder:
        loaded = geofx.load(result.save(Path(folder) / "out"))
    print(loaded.plan)
    assert torch.equal(loaded(batch["input"]), result(batch["input"]))


if __name__ == "__main__":
    main()
