"""Moments against gradients taken by hand, and the calibration rows of the fault table."""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.nn import functional

import geofx
from geofx.batches import collect, rows_in_both, split, spread
from geofx.errors import CalibrationError, ConfigError
from geofx.moments import Moments
from geofx.objective import Custom, NextToken, SquaredError, choose_objective
from geofx.passes.analyse import analyse
from geofx.passes.calibrate import calibrate
from geofx.passes.canonicalize import Canonicalize
from geofx.passes.contract import run_passes
from geofx.passes.find_regions import find_regions
from geofx.passes.find_sites import FindSites, sites_of
from geofx.program import Program
from geofx.trace import trace


def program_of(name: str) -> tuple[nn.Module, Program]:
    model = tiny_models.build(name)
    program = trace(model, tiny_models.example(name))
    run_passes(program, [Canonicalize(), FindSites()])
    return model, program


def unpadded(name: str, batch: int, length: int, seed: int = 0) -> dict[str, Any]:
    inputs = tiny_models.example(name, batch, length, seed)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    return inputs


def moments_by_hand(
    model: nn.Module, layer: nn.Linear, batches: list[dict[str, Any]]
) -> tuple[Tensor, Tensor]:
    """A and G of one layer of a causal language model, by module hooks and plain autograd."""
    inputs, gradients, terms, tokens = [], [], 0, 0
    keep = layer.register_forward_hook(
        lambda m, args, out: inputs.append(args[0].detach().double().flatten(0, -2))
    )
    hook = layer.register_full_backward_hook(lambda m, i, o: gradients.append(o[0].double().flatten(0, -2)))
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        logits = model(**batch, use_cache=False).logits
        both = (mask[:, 1:] & mask[:, :-1]).flatten()
        losses = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        losses[both].sum().backward()
        terms, tokens = terms + int(both.sum()), tokens + int(mask.sum())
        inputs[-1] = inputs[-1][mask.flatten()]
    keep.remove()
    hook.remove()
    x, g = torch.cat(inputs), torch.cat(gradients)
    return x.T @ x / tokens, g.T @ g / terms


@pytest.mark.parametrize("padded", [False, True])
def test_moments_are_those_of_the_eager_model(padded: bool) -> None:
    model, program = program_of("llama")
    make = tiny_models.example if padded else unpadded
    batches = [make("llama", 3, 12, seed) for seed in range(3)]
    moments = calibrate(program, batches, NextToken())
    assert not any(parameter.grad is not None for parameter in program.graph_module.parameters())
    for path in (
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.mlp.up_proj",
    ):
        a, g = moments_by_hand(model, model.get_submodule(path), batches)
        torch.testing.assert_close(moments.input_moment(f"{path}.weight").double(), a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.output_moment(f"{path}.weight").double(), g, rtol=1e-4, atol=1e-9)


def same(first: Moments, second: Moments, tolerance: float = 1e-5) -> None:
    for one, other in ((first.inputs, second.inputs), (first.outputs, second.outputs)):
        assert one.keys() == other.keys()
        for key in one:
            scale = float(one[key].abs().max())
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=tolerance * scale)


@pytest.mark.parametrize("side", ["left", "right"])
def test_row_50_padding_does_not_change_the_statistics(side: str) -> None:
    """One row of 8 tokens, alone and padded to 14 beside a row that is padding all over."""
    _, program = program_of("llama")
    plain = unpadded("llama", 1, 8)
    ids, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.long)
    place = slice(0, 8) if side == "right" else slice(6, 14)
    ids[0, place], mask[0, place] = plain["input_ids"][0], 1
    alone = calibrate(program, [plain], NextToken())
    padded = calibrate(program, [{"input_ids": ids, "attention_mask": mask}], NextToken())
    assert padded.loss_terms == alone.loss_terms == 7
    assert padded.tokens == alone.tokens
    same(alone, padded)


def test_objectives_are_chosen_by_what_the_model_computes() -> None:
    kinds = {
        name: type(choose_objective(program_of(name)[1], tiny_models.example(name), None))
        for name in tiny_models.MODELS
    }
    decoders = {"llama", "gpt2", "qwen3", "gemma3", "mixtral"}
    assert {name for name, kind in kinds.items() if kind is NextToken} == decoders
    assert {name for name, kind in kinds.items() if kind is SquaredError} == kinds.keys() - decoders


def test_squared_error_moments_are_gauss_newton() -> None:
    """For y = W2 W1 x the G of layer 1 is W2ᵀ W2 / E‖y‖², up to sampling noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)).eval()
    x = torch.randn(20000, 6)
    program = trace(model, x[:4])
    run_passes(program, [Canonicalize(), FindSites()])
    moments = calibrate(program, [{"input": x}], SquaredError(seed=1))
    with torch.no_grad():
        expected = model[1].weight.T @ model[1].weight / model(x).square().sum(1).mean()
    error = (moments.outputs["0.weight"] - expected).norm() / expected.norm()
    assert error < 0.05


def test_a_loss_of_the_users_own() -> None:
    _, program = program_of("llama")
    batches = [unpadded("llama", 3, 12, seed) for seed in range(2)]

    def loss(output: Any, batch: Any) -> Tensor:
        logits, ids = output.logits[:, :-1], batch["input_ids"][:, 1:]
        return functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")

    same(calibrate(program, batches, NextToken()), calibrate(program, batches, Custom(loss)))
    with pytest.raises(ConfigError, match="returns a float"):
        calibrate(program, batches, Custom(lambda output, batch: 1.0))  # type: ignore[arg-type, return-value]


def test_modes_say_what_they_lose() -> None:
    model = tiny_models.build("llama")
    batches = [tiny_models.example("llama", 3, 12, seed) for seed in range(3)]
    units = {}
    for mode in ("two_sided", "forward", "data_free"):
        analysis = geofx.analyze(model, batches, mode=mode)
        units[mode] = analysis.moments.unit
        assert bool(analysis.moments.outputs) == (mode == "two_sided")
        assert bool(analysis.moments.inputs) == (mode != "data_free")
        result = analysis.apply(analysis.plan(geofx.Budget(size=0.8, scope="factorizable")))
        assert result.plan.unit == units[mode]
        if mode != "two_sided":
            with pytest.raises(ConfigError, match="needs its gradients"):
                analysis.plan(geofx.Budget(loss=0.1))
    assert len(set(units.values())) == 3


@pytest.mark.parametrize("data", [[], iter(()), (batch for batch in ()), torch.zeros(0, 4, dtype=torch.long)])
def test_row_47_no_data_is_an_error(data: Any) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        geofx.analyze(tiny_models.build("llama"), data)
    with pytest.raises(CalibrationError, match="no calibration data"):
        geofx.analyze(tiny_models.build("llama"))


def test_row_48_a_generator_is_read_once() -> None:
    generator = (tiny_models.example("llama", 2, 8, seed) for seed in range(4))
    analysis = geofx.analyze(tiny_models.build("llama"), generator)
    assert analysis.holdout
    assert analysis.moments.loss_terms == 3 * (7 + 5)


def test_all_forms_of_data_give_the_same_batches() -> None:
    ids = torch.randint(0, 128, (4, 8), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=2)
    names = ("input_ids", "attention_mask")
    for data in (
        loader,
        list(ids.split(2)),
        [{"input_ids": part} for part in ids.split(2)],
        [(p,) for p in ids.split(2)],
    ):
        batches = collect(data, names)
        assert [batch["input_ids"].tolist() for batch in batches] == [part.tolist() for part in ids.split(2)]
    assert len(collect(ids, names)) == 1
    assert [len(part) for part in split([{}] * 16)] == [14, 2]


@pytest.mark.parametrize(
    ("count", "apart"), [(2, [1]), (3, [1]), (8, [4]), (16, [4, 12]), (32, [4, 12, 20, 28]), (13, [3, 9])]
)
def test_validation_batches_are_evenly_spread(count: int, apart: list[int]) -> None:
    every = [{"x": torch.tensor(place)} for place in range(count)]
    rest, held = spread(every)
    assert [int(batch["x"]) for batch in held] == apart
    assert [int(batch["x"]) for batch in rest] == [place for place in range(count) if place not in apart]


def test_one_batch_is_on_both_sides() -> None:
    assert split([{}]) == ([{}], [{}])


def test_row_62_held_out_rows_that_are_calibrated_on_are_told(caplog: pytest.LogCaptureFixture) -> None:
    given = [unpadded("llama", 2, 8, seed) for seed in range(3)]
    held = [{name: part.flip(0) for name, part in given[1].items()}, unpadded("llama", 2, 8, 7)]
    assert rows_in_both(given, held) == 2
    geofx.analyze(tiny_models.build("llama"), given, holdout=held)
    assert "2 rows to measure on are among those trained or calibrated on" in caplog.text
    caplog.clear()
    geofx.analyze(tiny_models.build("llama"), given, holdout=held[1:])
    assert "held-out" not in caplog.text


def test_row_51_ids_outside_the_vocabulary_are_named() -> None:
    batch = unpadded("llama", 2, 8)
    batch["input_ids"][1, 3] = 128
    with pytest.raises(CalibrationError, match=r"id 128 is outside the vocabulary of 128.*input_ids"):
        geofx.analyze(tiny_models.build("llama"), [unpadded("llama", 2, 8), batch, batch])


def test_row_64_an_error_in_the_source_names_the_batch() -> None:
    def source() -> Any:
        yield unpadded("llama", 2, 8)
        raise OSError("disk on fire")

    with pytest.raises(CalibrationError, match=r"disk on fire.*batch 1"):
        geofx.analyze(tiny_models.build("llama"), source())


def test_row_55_a_bad_row_is_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    _, program = program_of("mlp")
    good = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    bad = torch.cat([good[:20], torch.full((1, 32), float("nan")), good[20:]])
    objective = Custom(lambda output, batch: output.square().sum(-1))
    with caplog.at_level(logging.WARNING):
        dropped = calibrate(program, [{"input": bad}], objective)
    same(calibrate(program, [{"input": good}], objective), dropped)
    assert dropped.dropped == {"not finite": 1}
    assert "linear" in caplog.text
    with pytest.raises(CalibrationError, match="of 40 rows"):
        calibrate(program, [{"input": torch.where(good > 1.5, torch.nan, good)}], objective)


@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_row_59_grams_neither_overflow_nor_vanish(scale: float) -> None:
    _, program = program_of("mlp")
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    moments = calibrate(program, [{"input": x * scale}], Custom(lambda o, b: o.mean(-1)), mode="forward")
    first = moments.inputs[moments.input_of["0.weight"]]
    expected = (x * scale).double().T @ (x * scale).double() / 64
    torch.testing.assert_close(first.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_row_58_outlier_channels_keep_the_small_ones_exact() -> None:
    _, program = program_of("mlp")
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 1e5
    moments = calibrate(program, [{"input": part} for part in x.split(16)], SquaredError(), mode="forward")
    first = moments.inputs[moments.input_of["0.weight"]].double()
    expected = x.double().T @ x.double() / 256
    torch.testing.assert_close(first[6:, 6:], expected[6:, 6:], rtol=1e-4, atol=1e-5)


class Blind(nn.Module):
    """Layers whose output the loss never sees, or that only ever see zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.unread, self.dead = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        unread = self.unread(x)
        return self.seen(x) + 0.0 * unread + self.dead(0.0 * x)


def test_rows_41_and_57_a_site_without_signal_stays_dense() -> None:
    """Its predicted loss would be 0 at every rank, and the planner would wipe it for nothing."""
    torch.manual_seed(0)
    analysis = geofx.analyze(Blind(), [torch.randn(32, 8) for _ in range(4)])
    assert {(skip.weight, skip.reason) for skip in analysis.skips} == {
        ("unread.weight", "NO_SIGNAL"),
        ("dead.weight", "NO_SIGNAL"),
    }
    assert list(analysis.regions) == ["seen.weight"]


def test_rows_41_and_57_a_site_without_tokens_stays_dense() -> None:
    empty = Moments(inputs={"x": torch.zeros(6, 6)}, tokens={"x": 0}, input_of={"w": "x"}, mode="forward")
    assert empty.input_moment("w") is None
    _, program = program_of("mlp")
    moments = Moments(tokens={}, mode="forward")
    regions, told = find_regions(program, sites_of(program)), list[tuple[str, int, int]]()
    found, skips = analyse(program, regions, moments, progress=lambda *step: told.append(step))
    assert not found
    assert {skip.reason for skip in skips} == {"NO_CALIBRATION"}
    assert told == [("analyse", done, len(regions)) for done in range(len(regions) + 1)]


def test_in_place_changes_of_a_sites_input_do_not_reach_its_moments() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 1.0
            y = self.first(h)
            h.add_(100.0)
            return self.second(h) + y

    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    program = trace(InPlace().eval(), x)
    run_passes(program, [Canonicalize(), FindSites()])
    moments = calibrate(program, [{"x": x}], SquaredError(), mode="forward")
    expected = x.T @ x / 40
    torch.testing.assert_close(moments.input_moment("first.weight"), expected, rtol=1e-4, atol=1e-5)


def test_tokens_under_another_name_are_found_by_the_table_they_are_looked_up_in() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)

        def forward(self, idx: Tensor) -> Tensor:
            return self.head(torch.cumsum(self.table(idx), 1))

    torch.manual_seed(0)
    batches = [{"idx": torch.randint(0, 50, (4, 12))} for _ in range(4)]
    analysis = geofx.analyze(Small(), batches)
    assert analysis.objective == NextToken("idx")
    result = analysis.apply(analysis.plan(geofx.Budget(size=0.9, scope="factorizable")))
    assert result.fidelity.kl is not None


def test_row_46_buffers_are_restored_bit_for_bit() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return self.layer(x)

    model = Counter().eval()
    x = torch.randn(8, 4)
    analysis = geofx.analyze(model, [x, x, x])
    result = analysis.apply(analysis.plan(geofx.Budget(size=1.0)))
    assert analysis.moments.loss_terms > 0
    assert model.seen.item() == 0.0
    assert analysis.original.weight("seen").item() == 0.0
    assert result.program.weight("seen").item() == 0.0
    result(x)
    assert result.program.weight("seen").item() == 1.0


def test_row_65_the_same_seed_gives_the_same_plan() -> None:
    model = tiny_models.build("bert")
    batches = [tiny_models.example("bert", 3, 12, seed) for seed in range(4)]
    plans = [geofx.analyze(model, batches, seed=3).plan(geofx.Budget(size=0.9)).to_json() for _ in range(2)]
    assert plans[0] == plans[1]


def test_row_22_batches_of_other_lengths_are_taken() -> None:
    batches = [unpadded("gpt2", size, length) for size, length in itertools.product((1, 4), (2, 31))]
    analysis = geofx.analyze(tiny_models.build("gpt2"), batches, holdout=batches[:1])
    assert analysis.moments.loss_terms == sum(
        b["input_ids"].shape[0] * (b["input_ids"].shape[1] - 1) for b in batches
    )


def test_nothing_of_a_calibration_stays_in_memory() -> None:
    _, program = program_of("llama")
    calibrate(program, [tiny_models.example("llama")], NextToken())
    kept = weakref.ref(program)
    del program
    gc.collect()
    assert kept() is None, "hooks and the values that they hang on keep each other alive"
