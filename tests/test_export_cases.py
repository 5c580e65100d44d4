"""What an export is compared on: shapes, positions, and how near is near enough."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from geofx.errors import VerificationError
from geofx.export.cases import Case, make_cases, require_equal, shortened

pytest.importorskip("onnxruntime")


def test_row_147_not_a_number_is_an_error() -> None:
    case = Case("here", {}, (torch.ones(3),))
    with pytest.raises(VerificationError, match="nan"):
        require_equal(case, [torch.tensor([1.0, float("nan"), 1.0])], 1e-4)
    with pytest.raises(VerificationError, match="shape"):
        require_equal(case, [torch.ones(1, 3)], 1e-4)


@pytest.mark.parametrize("wrong", [5.0, float("nan"), float("inf")])
def test_row_147_error_tells_where_it_differs_most(wrong: float) -> None:
    expected = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    actual = expected.clone()
    actual[1, 2, 3], actual[2, 0, 0] = wrong, actual[2, 0, 0] + 1e-2
    with pytest.raises(
        VerificationError, match=r"'y' at here, most at index \[1, 2, 3\] of shape \[3, 4, 5\]"
    ):
        require_equal(Case("here", {}, (expected,)), [actual], 1e-4, ["y"])
    with pytest.raises(VerificationError, match=r"most at index \[0\] of shape \[\]"):
        require_equal(Case("here", {}, (torch.tensor(1.0),)), [torch.tensor(wrong)], 1e-4)


def test_bound_is_relative_to_the_largest_visible_value() -> None:
    expected = torch.tensor([[1.0, 100.0, float("inf")]])
    mask = {"attention_mask": torch.tensor([[1, 0, 1]])}
    assert require_equal(Case("here", {}, (expected,)), [expected + 0.5], 1e-2) == 0.5
    with pytest.raises(VerificationError, match=r"by 0\.5, allowed is 0\.01"):
        require_equal(Case("here", mask, (expected,)), [expected + 0.5], 1e-2)
    assert require_equal(Case("here", {}, (torch.ones(0, 3),)), [torch.ones(0, 3)], None) == 0.0


def test_long_examples_are_checked_short_and_padding_stays() -> None:
    sizes: list[torch.Size] = []

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        sizes.append(inputs["attention_mask"].shape)
        return [inputs["input_ids"]]

    mask = torch.ones(2, 512, dtype=torch.long)
    mask[1, -1] = mask[0, 0] = 0
    axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
    ids = torch.arange(1024).reshape(2, 512)
    example = shortened(run, {"input_ids": ids, "attention_mask": mask}, axes)
    assert example["attention_mask"].tolist() == [[0] + [1] * 15, [1] * 15 + [0]]
    assert example["input_ids"][0].tolist() == [round(i * 511 / 15) for i in range(16)]
    assert max(size[0] * size[1] for size in sizes) == 2 * 16
    cases = make_cases(run, example, axes)
    assert len(sizes) == 1, "a case is made when it is asked for"
    assert [tuple(case.inputs["input_ids"].shape) for case in cases] == [(2, 16), (1, 16), (2, 1), (5, 33)]


def test_example_is_kept_where_the_original_refuses_a_shorter_one() -> None:
    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        assert inputs["x"].shape[1] >= 20
        return [inputs["x"]]

    example = {"x": torch.randn(2, 24)}
    assert shortened(run, example, {"x": {0: "batch", 1: "sequence"}}) is example


def test_only_valid_positions_are_compared() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    expected = torch.zeros(2, 3, 4)
    case = Case("here", {"attention_mask": mask}, (expected + 1,))
    hidden, seen = expected + 1, expected + 1
    hidden[0, 2], hidden[1] = 9.0, float("nan")
    assert require_equal(case, [hidden], 1e-4) == 0.0
    seen[0, 1, 2] = 9.0
    with pytest.raises(VerificationError, match="differs"):
        require_equal(case, [seen], 1e-4)


def test_row_146_sizes_that_the_original_refuses_are_left_out() -> None:
    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        assert inputs["x"].shape[1] <= 5
        return [inputs["x"]]

    found = make_cases(run, {"x": torch.randn(2, 4)}, {"x": {0: "batch", 1: "sequence"}})
    assert [case.label for case in found] == [
        "batch=2, sequence=4",
        "batch=1, sequence=4",
        "batch=2, sequence=1",
        "batch=3, sequence=5",
    ]
