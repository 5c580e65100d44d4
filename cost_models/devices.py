"""Peaks of hardware, dense (no sparsity), as the makers state them."""

from __future__ import annotations

from geofx.cost_models.contract import Device

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "h100-sxm",
            {"float32": 66.9e12, "float16": 989e12, "bfloat16": 989e12},
            bytes_per_s=3.35e12,
            launch_s=4e-6,
            processors=132,
            cache_bytes_per_s=5120 * 1.755e9,
            source="NVIDIA H100 Tensor Core GPU datasheet (2023): SXM5, dense; L2 as of an A100, per clock",
        ),
        Device(
            "a100-sxm",
            {"float32": 19.5e12, "float16": 312e12, "bfloat16": 312e12},
            bytes_per_s=2.039e12,
            launch_s=4e-6,
            processors=108,
            cache_bytes_per_s=5120 * 1.41e9,
            source="NVIDIA A100 80GB SXM datasheet (2021), dense; architecture whitepaper: L2 5120 B/clock",
        ),
        Device(
            "l4",
            {"float32": 30.3e12, "float16": 121e12, "bfloat16": 121e12},
            bytes_per_s=300e9,
            launch_s=4e-6,
            processors=58,
            source="NVIDIA L4 datasheet (2023), dense: half of the rates with sparsity",
        ),
        Device(
            "t4",
            {"float32": 8.1e12, "float16": 65e12, "bfloat16": 8.1e12},
            bytes_per_s=320e9,
            launch_s=5e-6,
            processors=40,
            cache_bytes_per_s=1.27e12,
            source="NVIDIA T4 datasheet (2019); no bfloat16 units: priced as float32; L2: Jia et al. (2019)",
        ),
        Device(
            "rtx-4090",
            {"float32": 82.6e12, "float16": 165.2e12, "bfloat16": 165.2e12},
            bytes_per_s=1008e9,
            launch_s=4e-6,
            processors=128,
            source="NVIDIA Ada GPU architecture whitepaper (2023): RTX 4090, fp32 accumulation, dense",
        ),
        Device(
            "server-cpu",
            {"float32": 5.3e12, "float16": 5.3e12, "bfloat16": 5.3e12},
            bytes_per_s=204.8e9,
            launch_s=2e-6,
            processors=32,
            has_kernels=False,
            source="32 cores of 2 AVX-512 FMA units, 2.6 GHz (32 · 2 · 16 · 2 · 2.6e9); 8 x DDR4-3200",
        ),
    )
}
"""By name. Launches: what a small kernel takes end to end when it is queued, not the makers' figure."""
