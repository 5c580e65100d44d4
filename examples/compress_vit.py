"""A vision transformer that classifies images, at 0.7 of the flops of its matmuls.

    python examples/compress_vit.py

Its weights are random, so the figures say nothing of a trained model; they show how to get them.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

import geofx


def images(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of 8 smooth images: like photographs, they vary slowly."""
    random = torch.Generator().manual_seed(seed)
    coarse = [torch.randn(8, 3, 8, 8, generator=random) for _ in range(count)]
    resize = torch.nn.Upsample(size=32, mode="bilinear")
    return [{"pixel_values": resize(batch)} for batch in coarse]


def main() -> None:
    """The relative error of the logits on images that were not calibrated on."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=10,
        initializer_range=0.1,
    )
    original = transformers.ViTForImageClassification(config).eval()
    budget = geofx.Budget(flops=0.7, scope="factorizable")
    result = geofx.optimize(original, budget, calibration=images(12, seed=1), holdout=images(2, seed=2))
    print(result.plan)
    with torch.no_grad():
        pairs = [(original(**batch).logits, result(**batch).logits) for batch in images(4, seed=3)]
    before, after = (torch.cat(logits) for logits in zip(*pairs, strict=True))
    error = float((after - before).norm() / before.norm())
    same = float((after.argmax(-1) == before.argmax(-1)).float().mean())
    used, limit = result.plan.used["flops"], result.plan.limits["flops"]
    print(f"flops per patch: {result.plan.factorizable.flops:.0f} -> {used:.0f}")
    print(f"relative error of the logits {error:.3f}, the same class for {same:.0%} of the images")
    assert used <= limit
    assert error < 0.3


if __name__ == "__main__":
    main()
