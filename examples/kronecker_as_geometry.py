"""The Kronecker product as geometry: parents v, w, and at each of their places children e, f.

    python examples/kronecker_as_geometry.py

Where A = v x w and B = e x f, A ⊗ B = vec(v x e) x vec(w x f): four vectors, composed pair by pair
(Geometry is All You Need, arXiv 2410.03040, equation 14). Any A ⊗ B is a sum of such.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geofx.factorizations import Kronecker
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site
from geofx.subspaces import compose, principal_axes

PARENTS, CHILDREN = (4, 5), (6, 3)


def product(v: Tensor, w: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """vec(v x e) x vec(w x f)."""
    return compose(compose(v, e).flatten(), compose(w, f).flatten())


def rank_one_parts(matrix: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs (v, w) whose compositions v x w add up to ``matrix``."""
    inputs, scales, outputs = principal_axes(matrix, min(matrix.shape))
    return list(zip((outputs.vectors * scales).T, inputs.vectors.T, strict=True))


def main() -> None:
    """One product of four vectors, a product of any two matrices, and a weight that is a sum of three."""
    random = torch.Generator().manual_seed(0)
    v, w, e, f = (torch.randn(n, generator=random, dtype=torch.float64) for n in (*PARENTS, *CHILDREN))
    kron = torch.kron(compose(v, w), compose(e, f))
    print(f"four vectors: differ by {float((product(v, w, e, f) - kron).abs().max()):.1e}")

    weight = torch.zeros(PARENTS[0] * CHILDREN[0], PARENTS[1] * CHILDREN[1], dtype=torch.float64)
    for _ in range(3):
        a, b = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in (PARENTS, CHILDREN))
        parts = [
            product(*parents, *children) for parents in rank_one_parts(a) for children in rank_one_parts(b)
        ]
        total = torch.stack(parts).sum(0)
        print(
            f"A ⊗ B as {len(parts)} products: differ by {float((total - torch.kron(a, b)).abs().max()):.1e}"
        )
        weight += total

    region = Region("weight", "single", (Site("weight", (24, 15), dtype="float64"),))
    analysis = RegionAnalysis(region, {"weight": weight}, {"weight": Metric()})
    rows, columns = zip(PARENTS, CHILDREN, strict=True)
    form, factors = Kronecker(3, rows, columns).fit(analysis.weights, analysis)
    print(f"kronecker of 3 terms differs by {float((form.to_dense(factors) - weight).abs().max()):.1e}")
    print(f"kronecker has {form.geometry(region)}")


if __name__ == "__main__":
    main()
