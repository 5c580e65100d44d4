"""SVD as geometry: a matrix projects onto axes of its input, scales, and expands along axes of its output.

    python examples/svd_as_geometry.py

No singular value decomposition is called to build it: the axes are those that the matrix stretches most and
keeps orthogonal (Geometry is All You Need, arXiv 2410.03040, Theorems 1 and 2).
"""

from __future__ import annotations

import torch

from geofx.factorizations import LowRank
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site
from geofx.subspaces import principal_axes

OUT, IN, RANK = 48, 36, 8


def main() -> None:
    """Three steps among two subspaces, against torch.linalg.svd and against geofx's own format."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=random, dtype=torch.float64)
    x = torch.randn(5, IN, generator=random, dtype=torch.float64)

    inputs, scales, outputs = principal_axes(weight, RANK)
    coordinates = inputs.project(x)  # where x lies along each of the 8 axes of the input
    scaled = coordinates * scales  # each stretched by its singular value
    y = outputs.expand(scaled)  # and laid along the 8 axes of the output

    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    truncated = left[:, :RANK] @ torch.diag(values[:RANK]) @ right[:RANK]
    print(f"singular values differ by {float((scales - values[:RANK]).abs().max()):.1e}")
    print(f"outputs differ by {float((y - x @ truncated.T).abs().max()):.1e}")

    region = Region("weight", "single", (Site("weight", (OUT, IN), dtype="float64"),))
    analysis = RegionAnalysis(region, {"weight": weight}, {"weight": Metric()})
    form, factors = LowRank(RANK, "none").fit(analysis.weights, analysis)
    print(f"low_rank differs by {float((form.apply(x, factors) - y).abs().max()):.1e}")
    print(f"low_rank has {form.geometry(region)}")


if __name__ == "__main__":
    main()
