"""Text of the model's own: drawn from it, of the lengths of what it was given; or tokens replaced."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch

from geofx.batches import Batch
from geofx.generated_text import REPLACED_RATIO, generated_text, replaced_tokens, written_text
from geofx.objective import NextToken, SquaredError
from geofx.trace import trace

LENGTH, ROWS = 24, 2


def windows(count: int, seed: int = 0, first: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (count, ROWS, LENGTH), generator=generator)
    ids[:, :, 0] = first
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


def test_what_is_written_begins_as_the_windows_do_and_is_drawn_from_the_model() -> None:
    model, given = tiny_models.build("llama"), windows(3)
    found = written_text(model, given, rounds=2)
    ids = torch.cat([batch["input_ids"] for batch in found])
    assert ids.shape == (2 * 3 * ROWS, LENGTH)
    assert {len(batch["input_ids"]) for batch in found} == {ROWS}
    size = 1 + max(1, round(LENGTH / 16))
    assert torch.equal(ids[: 3 * ROWS, :size], torch.cat([batch["input_ids"] for batch in given])[:, :size])
    assert (ids[:, 0] == 1).all()
    again = torch.cat([batch["input_ids"] for batch in written_text(model, given, rounds=2)])
    other = torch.cat([batch["input_ids"] for batch in written_text(model, given, rounds=2, seed=1)])
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)


def test_a_sharp_model_writes_what_it_finds_likely() -> None:
    """With large weights of the head the next token is all but certain: samples follow the arg max."""
    model = tiny_models.build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e4)
    found = written_text(model, windows(2), rounds=1)
    ids = torch.cat([batch["input_ids"] for batch in found])
    with torch.no_grad():
        logits = model(ids).logits
    logits[:, :, 2] = -torch.inf  # the end of a text is not drawn before the window is full
    start = 1 + max(1, round(LENGTH / 16))
    assert torch.equal(ids[:, start:-1], logits[:, start - 1 : -2].argmax(-1))


def test_writing_leaves_the_model_and_the_random_state_alone() -> None:
    model = tiny_models.build("llama").train()
    before = torch.random.get_rng_state()
    written_text(model, windows(2), rounds=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training


def test_rows_of_padded_windows_are_begun_from_cut_to_few_lengths() -> None:
    given = windows(3)
    given[0]["attention_mask"][0, -3:] = 0
    given[2]["attention_mask"][:, 1:] = 0
    found = [batch["input_ids"] for batch in written_text(_llama(), given, rounds=1)]
    assert [tuple(ids.shape) for ids in found] == [(2, 16), (2, LENGTH)]
    start = 1 + max(1, round(16 / 16))
    assert torch.equal(found[0][:, :start], given[0]["input_ids"][:, :start])


def test_the_models_own_settings_of_generation_do_not_matter() -> None:
    model, own = _llama(), _llama()
    own.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=2, num_beams=2, temperature=0.1)
    settings = own.generation_config
    one, other = (written_text(item, windows(2), rounds=1) for item in (model, own))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))
    assert own.generation_config is settings


def _llama() -> Any:
    return tiny_models.build("llama")


def test_replaced_tokens_keep_ends_padding_and_vocabulary() -> None:
    given = windows(80)
    for batch in given:
        batch["attention_mask"][0, -5:] = 0
        batch["input_ids"][0, -5:] = 0
    found = replaced_tokens(given, 1, "input_ids", 128)
    before = torch.cat([batch["input_ids"] for batch in given])
    after = torch.cat([batch["input_ids"] for batch in found])
    mask = torch.cat([batch["attention_mask"] for batch in given]).bool()
    changed = before != after
    assert not changed[:, 0].any()
    assert not (changed & ~mask).any()
    assert not changed[mask & ~torch.roll(mask, -1, 1)].any()
    inner = changed[1::2, 1:-1].float().mean()
    assert abs(float(inner) - REPLACED_RATIO * 127 / 128) < 0.03
    assert set(after.unique().tolist()) == set(range(128))


def test_models_that_write_nothing_and_data_without_tokens() -> None:
    given = windows(2)
    decoder = trace(_llama(), given[0])
    for module in (None, torch.nn.Linear(3, 3)):
        replaced = generated_text(module, decoder, given, NextToken(), 2)
        assert len(replaced) == 4
        assert torch.equal(replaced[0]["input_ids"][:, -1], given[0]["input_ids"][:, -1])
    assert generated_text(_llama(), decoder, given, NextToken(), 1)[0]["input_ids"].shape == (ROWS, LENGTH)
    plain = trace(tiny_models.build("mlp"), {"input": torch.randn(4, 32)})
    assert generated_text(None, plain, [{"input": torch.randn(4, 32)}], SquaredError(), 1) == []


def test_a_model_that_needs_more_than_ids_gets_tokens_replaced() -> None:
    given = [
        {**batch, "position_ids": torch.arange(LENGTH).expand(ROWS, LENGTH).clone()} for batch in windows(2)
    ]
    decoder = trace(_llama(), given[0])
    for batch in generated_text(_llama(), decoder, given, NextToken(), 1):
        assert set(batch) == set(given[0])


def test_a_model_that_fails_as_it_writes_gets_tokens_replaced(caplog: pytest.LogCaptureFixture) -> None:
    given, module = windows(2), _llama()
    decoder = trace(module, given[0])
    module.generate = None
    assert len(generated_text(module, decoder, given, NextToken(), 1)) == 2
    assert "the model writes no text" in caplog.text


def test_ids_without_rows_are_left_alone() -> None:
    program = trace(torch.nn.Embedding(9, 4), {"input": torch.arange(5)})
    assert generated_text(None, program, [{"input": torch.arange(5)}], SquaredError(), 1) == []


def test_every_round_is_of_every_length() -> None:
    """Moments are of the first round alone; what was padded is cut to a power of two."""
    padded = windows(4)
    for batch in padded:
        batch["attention_mask"][0, LENGTH // 2 :] = 0
    found = generated_text(_llama(), trace(_llama(), padded[0]), padded, NextToken(), 2)
    first, second = found[: len(found) // 2], found[len(found) // 2 :]
    lengths = [batch["input_ids"].shape for batch in first]
    assert lengths == [batch["input_ids"].shape for batch in second]
    assert {shape[1] for shape in lengths} == {8, 16}
    assert not torch.equal(first[0]["input_ids"], second[0]["input_ids"])
