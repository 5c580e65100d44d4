"""Small results to be trained, and how."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch

import geofx
from geofx import Budget, OptimizedModel

SETTINGS: dict[str, Any] = {"steps": 12, "learning_rate": 1e-3, "every": 3}


def batches(name: str, count: int = 6, start: int = 0) -> list[Any]:
    rows = 64 if name == "mlp" else 4
    return [tiny_models.example(name, rows, 24, seed) for seed in range(start, start + count)]


def compressed(name: str, size: float = 0.12, **options: Any) -> OptimizedModel:
    analysis = geofx.analyze(tiny_models.build(name), batches(name))
    return analysis.apply(analysis.plan(Budget(size=size, scope="factorizable"), **options))


def factors_of(result: OptimizedModel) -> dict[str, torch.Tensor]:
    return {
        stored: factored.factors[name]
        for factored in result.rewrites.values()
        for name, stored in factored.attributes.items()
    }
