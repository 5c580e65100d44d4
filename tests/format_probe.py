"""What the tests of single formats share: ONNX Runtime beside the dense weight, tensorly, curvatures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import tensorly
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from geofx.factorizations import Factorization, Factors, Lookup
from geofx.factorizations.refine import Dense
from geofx.region_analysis import Metric


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    """tensorly on torch's tensors, in every test of a file that imports this."""
    with tensorly.backend_context("pytorch"):
        yield


class Applied(nn.Module):
    """One linear map as a format runs it."""

    def __init__(self, form: Factorization, factors: Factors) -> None:
        super().__init__()
        self.form, self.names = form, list(factors)
        for name, part in factors.items():
            self.register_buffer(name, part)

    @property
    def factors(self) -> Factors:
        return {name: getattr(self, name) for name in self.names}

    def forward(self, x: Tensor) -> Tensor:
        return self.form.apply(x, self.factors)


def outputs_of(form: Factorization, factors: Factors, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """What ONNX Runtime gives at three batch shapes that were not exported, and x · to_denseᵀ."""
    weight = form.to_dense(factors)
    example, generator = torch.zeros(2, 3, weight.shape[1]), torch.Generator().manual_seed(0)
    dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    model = Applied(form, factors).eval()
    program = torch.onnx.export(model, (example,), dynamo=True, optimize=False, dynamic_shapes=dims)
    assert program is not None
    program.save(folder / "applied.onnx")
    session = onnxruntime.InferenceSession(folder / "applied.onnx", providers=["CPUExecutionProvider"])
    for lead in ((1, 1), (4, 7), (5, 2)):
        x = torch.randn(*lead, weight.shape[1], generator=generator)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        yield torch.from_numpy(found), x @ weight.T


class LookedUp(Applied):
    """One table as a format reads it."""

    def forward(self, ids: Tensor) -> Tensor:
        assert isinstance(self.form, Lookup)
        return self.form.lookup(ids, self.factors)


def lookups_of(
    form: Factorization, factors: Factors, rows: int, folder: Path
) -> Iterator[tuple[Tensor, Tensor]]:
    """What ONNX Runtime and a traced module read at shapes that were not exported, and to_dense[ids]."""
    generator = torch.Generator().manual_seed(0)
    model, example = LookedUp(form, factors).eval(), torch.zeros(2, 3, dtype=torch.int64)
    dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(model, (example,), dynamo=True, optimize=False, dynamic_shapes=dims)
    assert program is not None
    program.save(folder / "lookup.onnx")
    session = onnxruntime.InferenceSession(folder / "lookup.onnx", providers=["CPUExecutionProvider"])
    traced = torch.jit.trace(model, (example,))
    weight = form.to_dense(factors)
    for lead in ((1, 1), (4, 7), (5, 2)):
        ids = torch.randint(0, rows, lead, generator=generator)
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        yield torch.from_numpy(found), weight[ids]
        yield traced(ids), weight[ids]


class Sizes(TorchDispatchMode):
    """The most numbers that any operation wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.largest = max(self.largest, result.numel())
        return result


def curvature(dense: Dense, factors: Factors, name: str, metric: Metric, step: Tensor) -> Tensor:
    """Jᵀ M J of a step in one factor, J being the derivative of ``dense`` by it."""
    change = dense({**factors, name: step})
    value = factors[name].clone().requires_grad_()
    return torch.autograd.grad(dense({**factors, name: value}), value, metric.gradient(change))[0]
