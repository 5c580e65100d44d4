"""Losses over a vocabulary, taken some rows at a time, against the whole at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from geofx.batches import Batch
from geofx.objective import ROWS, NextToken, next_tokens

VOCABULARY, LENGTH = 13, ROWS + 5


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -4:], mask[1, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, LENGTH, VOCABULARY, generator=generator)


def pairs(values: Tensor, given: Batch) -> tuple[Tensor, Tensor]:
    """Predictions and targets of neighbours that are both no padding, one by one."""
    ids, mask = given["input_ids"], given["attention_mask"]
    places = [(i, t) for i in range(3) for t in range(LENGTH - 1) if mask[i, t] and mask[i, t + 1]]
    rows = torch.stack([values[i, t] for i, t in places])
    return rows, torch.tensor([ids[i, t + 1] for i, t in places])


def test_places_are_those_of_neighbours_that_are_no_padding() -> None:
    given, values = batch(), logits(1)
    places, targets = next_tokens(given)
    rows, wanted = pairs(values, given)
    assert torch.equal(targets, wanted)
    assert torch.equal(values.flatten(0, 1)[places], rows)


def test_the_sum_and_its_gradient_are_those_of_cross_entropy() -> None:
    given, one, other = batch(), logits(1).requires_grad_(), logits(1).requires_grad_()
    total, terms = NextToken().gradient_seed(one, given)
    rows, targets = pairs(other, given)
    wanted = functional.cross_entropy(rows, targets, reduction="sum")
    assert terms == len(targets)
    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=0.0)
    (3.0 * total).backward()
    (3.0 * wanted).backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_the_distance_and_its_gradient_are_those_of_the_divergence() -> None:
    given, teacher, one, other = batch(), logits(2), logits(1).requires_grad_(), logits(1).requires_grad_()
    total, terms = NextToken().distance(teacher, one, given)
    p, _ = pairs(teacher.log_softmax(-1), given)
    q, _ = pairs(other.log_softmax(-1), given)
    wanted = (p.exp() * (p - q)).sum()
    assert terms == len(p)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=0.0)
    total.backward()
    wanted.backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_gradient_is_taken_once() -> None:
    total, _ = NextToken().gradient_seed(logits(1).requires_grad_(), batch())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        total.backward()
