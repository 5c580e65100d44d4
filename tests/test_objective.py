"""Losses over a vocabulary, taken some rows at a time, against the whole at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from geofx.batches import Batch
from geofx.errors import CalibrationError, ConfigError, NumericsError
from geofx.objective import ROWS, Custom, NextToken, is_causal_language_model, next_tokens
from geofx.trace import trace
from geofx.verify import verify

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


class Ruled(torch.nn.Module):
    """A language model, ``shift`` away from another, that never says token 3."""

    def __init__(self, shift: float = 0.0, never: float = -torch.inf) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, 8)
        self.head = torch.nn.Linear(8, VOCABULARY)
        with torch.no_grad():
            for seed, part in enumerate(self.parameters()):
                part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(seed)) + shift)
        rule = torch.zeros(VOCABULARY)
        rule[3] = never
        self.register_buffer("rule", rule)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids)) + self.rule


def ids_without_3() -> Batch:
    ids = batch()["input_ids"]
    return {"input_ids": torch.where(ids == 3, 4, ids)}


@pytest.mark.parametrize("never", [-torch.inf, torch.finfo(torch.float32).min])
def test_tokens_that_are_ruled_out_leave_all_figures_finite(never: float) -> None:
    given = ids_without_3()
    original, other = (trace(Ruled(shift, never), given) for shift in (0.0, 0.1))
    found, same = (verify(original, one, [given], NextToken()) for one in (other, original))
    assert found.kl is not None
    assert 0.0 < found.kl < 10.0
    if never == -torch.inf:
        assert 0.0 < found.relative_l2 < 1.0
    assert same.kl == pytest.approx(0.0, abs=1e-9)
    assert same.relative_l2 == 0.0
    logits = original(**given).detach().requires_grad_()
    NextToken().distance(other(**given), logits, given)[0].backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_a_result_that_is_not_a_number_where_the_original_is_infinite_is_refused() -> None:
    given = ids_without_3()
    with pytest.raises(NumericsError, match="not finite"):
        verify(trace(Ruled(), given), trace(Ruled(never=torch.nan), given), [given], NextToken())


def test_held_out_data_without_a_loss_is_refused() -> None:
    given = ids_without_3()
    model = trace(Ruled(), given)
    alone = {"input_ids": given["input_ids"][:, :2], "attention_mask": torch.tensor([[1, 0]] * 3)}
    with pytest.raises(CalibrationError, match="no loss term"):
        verify(model, model, [alone], NextToken())
    ruled_out = {"input_ids": torch.full((3, LENGTH), 3)}
    with pytest.raises(CalibrationError, match="not finite"):
        verify(model, model, [ruled_out], NextToken())


def test_hidden_states_wider_than_the_ids_are_no_logits() -> None:
    given = ids_without_3()
    body = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, 4 * VOCABULARY))
    for model, name, expected in ((body, "input", False), (Ruled(), "input_ids", True)):
        asked = {name: given["input_ids"]}
        assert is_causal_language_model(trace(model, asked), asked, name) == expected


def test_a_loss_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(ConfigError, match="returns a float"):
        Custom(lambda output, batch: 1.0).compare(None, None, {})  # type: ignore[arg-type, return-value]
