"""A format's `apply` through ONNX and ONNX Runtime, beside its dense weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from geofx.factorizations import Factorization, Factors


class Applied(nn.Module):
    """One linear map as a format runs it."""

    def __init__(self, form: Factorization, factors: Factors) -> None:
        super().__init__()
        self.form, self.parts = form, nn.ParameterDict(dict(factors))

    def forward(self, x: Tensor) -> Tensor:
        return self.form.apply(x, self.parts)


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
