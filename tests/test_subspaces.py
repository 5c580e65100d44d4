"""The numeric engine: bases, compositions, contractions, and axes that are the singular vectors."""

from __future__ import annotations

import pytest
import torch

from geofx.errors import NumericsError
from geofx.subspaces import compose, contract, principal_axes, resize

random = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(9, 6, generator=random, dtype=torch.float64)
TENSOR = torch.randn(3, 4, 5, generator=random, dtype=torch.float64)


def test_composition_is_definition_7_and_8() -> None:
    a, b, c = (torch.randn(size, generator=random, dtype=torch.float64) for size in (3, 4, 5))
    assert torch.equal(compose(a, b), torch.outer(a, b))
    assert compose(a, b, c)[1, 2, 3] == a[1] * b[2] * c[3]
    assert torch.equal(compose(compose(a, b), c), compose(a, b, c))


def test_contraction_absorbs_the_shared_order() -> None:
    torch.testing.assert_close(contract(WEIGHT, WEIGHT.T), WEIGHT @ WEIGHT.T)
    other = torch.randn(5, 2, generator=random, dtype=torch.float64)
    torch.testing.assert_close(contract(TENSOR, other), torch.einsum("abc,cd->abd", TENSOR, other))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_resizing_changes_one_order(order: int) -> None:
    matrix = torch.randn(7, TENSOR.shape[order], generator=random, dtype=torch.float64)
    letters = "abc"
    before, after = letters, letters.replace(letters[order], "z")
    expected = torch.einsum(f"z{letters[order]},{before}->{after}", matrix, TENSOR)
    torch.testing.assert_close(resize(TENSOR, order, matrix), expected)


def test_axes_project_and_expand() -> None:
    inputs, scales, outputs = principal_axes(WEIGHT, 4)
    assert (inputs.dim, outputs.dim) == (4, 4)
    for basis in (inputs, outputs):
        gram = basis.vectors.T @ basis.vectors
        torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
        coordinates = torch.randn(3, 4, generator=random, dtype=torch.float64)
        torch.testing.assert_close(basis.project(basis.expand(coordinates)), coordinates)
    torch.testing.assert_close(scales, torch.linalg.svdvals(WEIGHT)[:4], rtol=1e-10, atol=0)
    x = torch.randn(2, 6, generator=random, dtype=torch.float64)
    whole = principal_axes(WEIGHT, 6)
    torch.testing.assert_close(whole[2].expand(whole[0].project(x) * whole[1]), x @ WEIGHT.T)


@pytest.mark.parametrize(
    ("weight", "dim"),
    [
        (torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)), 3),
        (torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0)).double(), 2),
        (WEIGHT, 7),
        (torch.zeros(3, 3, dtype=torch.float64), 1),
    ],
    ids=["zero axis", "zero but for rounding", "more than inputs", "zeros"],
)
def test_a_weight_without_so_many_axes_is_refused(weight: torch.Tensor, dim: int) -> None:
    with pytest.raises(NumericsError, match=f"fewer than {dim} axes"):
        principal_axes(weight, dim)


def test_axes_of_a_float32_weight_are_in_float32() -> None:
    inputs, scales, outputs = principal_axes(WEIGHT.float(), 6)
    assert {inputs.vectors.dtype, scales.dtype, outputs.vectors.dtype} == {torch.float32}
    x = torch.randn(2, 6, generator=random)
    torch.testing.assert_close(outputs.expand(inputs.project(x) * scales), x @ WEIGHT.float().T)
