"""CP, Tucker and tensor train of one tensor: which subspaces each has, and what it does among them.

    python examples/tensor_formats_side_by_side.py

A weight of 16 x 120 is a tensor of 16 x 12 x 10, its inputs folded in two. CP adds direct products in one
common space, Tucker resizes every order of a core, a tensor train contracts the order that neighbours share
(Geometry is All You Need, arXiv 2410.03040, Section 3.3). Each is rebuilt here from these operations alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from geofx.factorizations import CP, Factorization, TensorTrain, Tucker
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site
from geofx.subspaces import compose, contract, resize
from geofx.workload import measure

SHAPE = (16, 12, 10)


def sum_of_products(factors: Mapping[str, Tensor]) -> Tensor:
    """CP: terms a x b x c, all in the same space, added."""
    terms = zip(*(factors[name].T for name in ("row1", "column1", "column2")), strict=True)
    return torch.stack([compose(*vectors) for vectors in terms]).sum(0)


def resized_core(factors: Mapping[str, Tensor]) -> Tensor:
    """Tucker: every order of the core carried from its rank to its full size."""
    tensor = factors["core"]
    for order, name in enumerate(("row1", "column1", "column2")):
        tensor = resize(tensor, order, factors[name])
    return tensor


def chain(factors: Mapping[str, Tensor]) -> Tensor:
    """Tensor train: the order that neighbours share is absorbed, the next core's own is added."""
    first, middle, last = (factors[f"core{place}"].squeeze((1, 2)) for place in (1, 2, 3))
    return contract(contract(first.squeeze(0), middle), last.squeeze(-1))


def main() -> None:
    """The three at nearly the same number of parameters."""
    i, j, k = torch.meshgrid(
        *(torch.arange(1.0, size + 1, dtype=torch.float64) for size in SHAPE), indexing="ij"
    )
    tensor = 1 / (i + j + k) + 0.01 * torch.sin(i * j / k)
    weight = tensor.reshape(SHAPE[0], -1)
    region = Region("weight", "single", (Site("weight", (16, 120), dtype="float64"),))
    analysis = RegionAnalysis(region, {"weight": weight}, {"weight": Metric()})
    formats: tuple[tuple[Factorization, object], ...] = (
        (CP(4, (16,), (12, 10)), sum_of_products),
        (Tucker((16,), (12, 10), (3, 3, 3)), resized_core),
        (TensorTrain((16, 1, 1), (1, 12, 10), (3, 2)), chain),
    )
    for form, rebuild in formats:
        fitted, factors = form.fit(analysis.weights, analysis)
        rebuilt = rebuild(factors)
        off = float((rebuilt.reshape(16, 120) - fitted.to_dense(factors)).abs().max())
        error = float((rebuilt - tensor).norm() / tensor.norm())
        print(f"{form.name}: {fitted.geometry(region)}")
        print(
            f"  {measure(form, region).parameters} numbers, error {error:.3f}; rebuilt, differs by {off:.1e}"
        )


if __name__ == "__main__":
    main()
