"""Training after the rewrite: closer to the original, resumable to the bit, never worse, ESPACE's W whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import tiny_models
import torch
from recovered import SETTINGS, batches, compressed, factors_of
from torch import nn
from torch.nn import functional

import geofx
from geofx import Budget, OptimizedModel
from geofx.errors import CalibrationError, ConfigError, NumericsError
from geofx.factorizations import Factored
from geofx.objective import NextToken
from geofx.program import flat_tensors
from geofx.recovery import Recovery
from geofx.report import Report
from geofx.training import Training, native_autocast


@pytest.fixture(scope="module")
def decoder() -> OptimizedModel:
    return compressed("llama")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mlp"])
def test_the_outputs_come_closer_on_data_that_was_not_trained_on(name: str) -> None:
    before = compressed(name)
    fresh = batches(name, 3, 50)
    settings: dict[str, Any] = {**SETTINGS, "steps": 96, "every": 24}
    after = before.recover(batches(name, 16), holdout=fresh, **settings)
    unchanged = before.recover(batches(name, 16), holdout=fresh, steps=1, learning_rate=1e-12)
    assert after.fidelity is not None
    assert unchanged.fidelity is not None
    assert after.fidelity.relative_l2 < 0.99 * unchanged.fidelity.relative_l2
    assert after.program.size_bytes() == before.program.size_bytes()
    assert after.plan == before.plan
    losses = [row["validation"] for row in after.report.recovery]
    assert min(losses) < losses[0]
    assert [row["step"] for row in after.report.recovery] == [0, 24, 48, 72, 96]
    with torch.no_grad():
        graph, module = (flat_tensors(model(**fresh[0])) for model in (after.program, after.to_module()))
    for one, other in zip(graph, module, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_original_and_the_result_before_stay_as_they_are(decoder: OptimizedModel) -> None:
    model, weights = decoder.module, {name: part.clone() for name, part in factors_of(decoder).items()}
    assert model is not None
    before = {name: part.clone() for name, part in model.state_dict().items()}
    settings: dict[str, Any] = {**SETTINGS, "steps": 32, "every": 8}
    after = decoder.recover(batches("llama", 16), **settings)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    assert all(part.requires_grad for part in model.parameters())
    assert all(torch.equal(part, weights[name]) for name, part in factors_of(decoder).items())
    assert any(not torch.equal(part, weights[name]) for name, part in factors_of(after).items())
    norm = "model.norm.weight"
    assert not torch.equal(after.program.weight(norm), decoder.program.weight(norm))
    only = decoder.recover(batches("llama", 16), vectors=False, **settings)
    assert torch.equal(only.program.weight(norm), decoder.program.weight(norm))


def test_a_ruinous_learning_rate_gives_back_what_there_was(decoder: OptimizedModel) -> None:
    after = decoder.recover(batches("llama", 4), steps=6, learning_rate=3.0, every=2)
    assert Report.from_json(after.report.to_json()) == after.report
    assert all(torch.equal(part, factors_of(decoder)[name]) for name, part in factors_of(after).items())


def test_a_start_that_is_not_finite_is_an_error() -> None:
    huge = {name: value * 1e38 for name, value in batches("mlp")[0].items()}
    with pytest.raises(NumericsError, match="before training"):
        compressed("mlp").recover(batches("mlp"), validation=[huge], **SETTINGS)


def test_steps_in_bfloat16_move_factors_that_stay_float32(decoder: OptimizedModel) -> None:
    settings: dict[str, Any] = {**SETTINGS, "steps": 48, "every": 12}
    low, full = (
        decoder.recover(batches("llama", 16), autocast=dtype, **settings) for dtype in (torch.bfloat16, None)
    )
    losses = [row["validation"] for row in low.report.recovery]
    assert min(losses) < losses[0] == full.report.recovery[0]["validation"]
    for one, other in zip(factors_of(low).values(), factors_of(full).values(), strict=True):
        assert one.dtype == other.dtype
        assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("told", "dtype"),
    [
        ({"avx512_bf16": True, "avx2": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": True, "sve": True}, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, None),
        ({}, None),
    ],
)
def test_only_devices_that_multiply_bfloat16_are_asked_to(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, bool], dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    assert native_autocast(torch.device("cpu")) is dtype
    assert native_autocast(torch.device("meta")) is None


def by_metric(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.5)


def test_what_cannot_run_here_is_refused(decoder: OptimizedModel) -> None:
    with pytest.raises(ConfigError, match="closure"):
        decoder.recover(batches("llama", 4), optimizer=torch.optim.LBFGS, **SETTINGS)
    with pytest.raises(ConfigError, match="2 processes"):
        decoder.recover(batches("llama", 4), accelerator=SimpleNamespace(num_processes=2), **SETTINGS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("moved", [False, True])
def test_a_device(decoder: OptimizedModel, moved: bool) -> None:
    assert decoder.module is not None
    teacher = decoder.module.cuda() if moved else decoder.module
    after = decoder.recover(batches("llama", 4), device="cuda", teacher=teacher, **SETTINGS)
    decoder.module.cpu()
    losses = [row["validation"] for row in after.report.recovery]
    assert min(losses) < losses[0]


def test_with_labels_the_text_itself_is_learnt(decoder: OptimizedModel) -> None:
    """More of the text, less of the original: rows that repeat, which no random model foresees."""
    rows = [{"input_ids": (torch.arange(24) + start).repeat(4, 1) % 64} for start in range(8)]
    settings: dict[str, Any] = {"steps": 40, "every": 10, "holdout": rows[-2:], "learning_rate": 3e-3}
    faithful, taught = (decoder.recover(rows[:6], labels=share, **settings).fidelity for share in (0.0, 0.9))
    assert faithful is not None
    assert taught is not None
    assert taught.loss_optimized < faithful.loss_optimized - 0.05
    assert (taught.kl or 0.0) > (faithful.kl or 0.0)


def test_labels_are_of_models_that_predict_tokens() -> None:
    with pytest.raises(ConfigError, match=r"labels are of models that predict tokens"):
        compressed("mlp").recover(batches("mlp"), labels=0.5)


def test_labels_share_the_distance() -> None:
    original, optimized = (torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    batch = {"input_ids": torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(2))}
    pure, text, mixed = (
        float(NextToken(labels=share).distance(original, optimized, batch)[0]) for share in (0.0, 1.0, 0.25)
    )
    wanted = functional.cross_entropy(optimized[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    assert text == pytest.approx(16 * float(wanted), rel=1e-5)
    assert mixed == pytest.approx(0.75 * pure + 0.25 * text, rel=1e-5)


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "RMSprop"])
def test_any_optimizer_and_schedule_of_torch(decoder: OptimizedModel, tmp_path: Path, name: str) -> None:
    made = getattr(torch.optim, name)
    rates: list[float] = []

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        found = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=13, cycle_momentum=False)
        step = found.step
        found.step = lambda *given: (step(*given), rates.append(found.get_last_lr()[0]))[0]  # type: ignore[method-assign]
        return found

    after = decoder.recover(
        batches("llama", 4),
        optimizer=lambda parts: made(parts, lr=1e-4),
        schedule=schedule,
        checkpoint=tmp_path,
        **SETTINGS,
    )
    assert len(after.report.recovery) == 5
    assert len(set(rates)) == 12


def test_an_accelerator_places_and_runs_it(decoder: OptimizedModel) -> None:
    alone = decoder.recover(batches("llama", 4), **SETTINGS)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerated = decoder.recover(batches("llama", 4), accelerator=accelerator, **SETTINGS)
    for name, part in factors_of(accelerated).items():
        torch.testing.assert_close(part, factors_of(alone)[name], rtol=1e-5, atol=1e-6)


def test_an_accelerated_schedule_that_goes_by_the_loss_is_told_it(decoder: OptimizedModel) -> None:
    alone = decoder.recover(batches("llama", 4), schedule=by_metric, **SETTINGS)
    accelerator = accelerate.Accelerator(cpu=True)
    other = decoder.recover(batches("llama", 4), schedule=by_metric, accelerator=accelerator, **SETTINGS)
    for one, same in zip(other.report.recovery, alone.report.recovery, strict=True):
        assert one["validation"] == pytest.approx(same["validation"], rel=1e-4)


@pytest.mark.parametrize("name", ["validation", "holdout"])
def test_row_62_rows_that_are_trained_and_measured_on_are_told(
    decoder: OptimizedModel, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    data = batches("llama", 4)
    rows = len(data[0]["input_ids"])
    decoder.recover(data, **{name: [data[0]]}, steps=1)
    assert f"{rows} rows to measure on are among those trained or calibrated on" in caplog.text


def test_espace_trains_the_weight_whole_under_a_static_projection() -> None:
    """The projection stays, and W P moves as W did: Adam's steps on W, of which P is taken at the end."""
    before = compressed("llama", 0.3, formats="activation_subspace")
    settings: dict[str, Any] = {**SETTINGS, "steps": 32, "every": 8}
    after = before.recover(batches("llama", 16), **settings)
    moved = 0
    for region, factored in after.rewrites.items():
        old = before.rewrites[region]
        assert torch.equal(factored.factors["projection"], old.factors["projection"])
        moved += not torch.equal(factored.factors["weight"], old.factors["weight"])
        _check_folded(before, factored)
    assert moved == len(after.rewrites) > 0
    losses = [row["validation"] for row in after.report.recovery]
    assert losses[-1] < losses[0]


def _check_folded(before: OptimizedModel, factored: Factored) -> None:
    """W P with P orthonormal: in the span of the projection, and still near the dense weight there."""
    assert before.module is not None
    dense = before.module.get_parameter(factored.weights[0]).detach()
    weight, projection = factored.factors["weight"], factored.factors["projection"]
    assert weight.shape == (dense.shape[0], projection.shape[0])
    start = dense @ projection.T
    assert 0 < float((weight - start).norm() / start.norm()) < 1.0


def test_a_loaded_result_recovers_with_its_teacher(decoder: OptimizedModel, tmp_path: Path) -> None:
    decoder.save(tmp_path / "out")
    loaded = geofx.load(tmp_path / "out")
    with pytest.raises(ConfigError, match="original"):
        loaded.recover(batches("llama", 4), **SETTINGS)
    after = loaded.recover(batches("llama", 4), teacher=decoder.module, **SETTINGS)
    direct = decoder.recover(batches("llama", 4), **SETTINGS)
    for name, part in factors_of(after).items():
        torch.testing.assert_close(part, factors_of(direct)[name], rtol=1e-5, atol=1e-6)
    after.save(tmp_path / "after")
    assert geofx.load(tmp_path / "after").report.recovery == after.report.recovery


def test_a_graph_without_its_module_is_trained_as_a_graph() -> None:
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))
    example = torch.randn(8, 24)
    exported = torch.export.export(model, (example,))
    data = [torch.randn(8, 24) for _ in range(64)]
    result = geofx.optimize(exported, Budget(size=0.2), calibration=data[:40])
    after = result.recover(data, **SETTINGS)
    losses = [row["validation"] for row in after.report.recovery]
    assert min(losses) < losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 3}, "nearest are 'steps'"),
        ({"steps": 0}, "give 1 or more"),
        ({"steps": True}, "give 1 or more"),
        ({"labels": 1.5}, "labels is"),
        ({"learning_rate": "1e-3"}, "give 3e-4"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"autocast": "bfloat16"}, "give torch.bfloat16"),
        ({"autocast": torch.float16}, "give torch.bfloat16"),
    ],
)
def test_wrong_settings_are_named(decoder: OptimizedModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decoder.recover(batches("llama", 2), **settings)


@pytest.mark.parametrize("loss", [0.04, 0.25, 9.0])
def test_the_learning_rate_goes_by_the_loss(loss: float) -> None:
    part = nn.Parameter(torch.tensor([3.0, -4.0]))
    (group,) = Training().made_optimizer([part], loss).param_groups
    assert group["lr"] == pytest.approx(1e-3 * min(1.0, loss**0.5) * 12.5**0.5)
    (group,) = Training(learning_rate=0.5).made_optimizer([part], loss).param_groups
    assert group["lr"] == pytest.approx(0.5 * 12.5**0.5)


def test_one_batch_cannot_be_both_trained_and_validated_on(decoder: OptimizedModel) -> None:
    with pytest.raises(CalibrationError, match="one batch"):
        decoder.recover(batches("llama", 1))


class Ragged(nn.Module):
    """A model with dropout, and with a layer that its outputs do not read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(32, 64), nn.Linear(64, 10), nn.Linear(5, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.second(self.dropout(torch.relu(self.first(input))))
        return output


def test_parameters_that_the_outputs_do_not_read_stay_as_they_are() -> None:
    model = Ragged().eval()
    before = geofx.optimize(model, Budget(size=0.6), calibration=batches("mlp"))
    after = before.recover(batches("mlp"), **SETTINGS)
    losses = [row["validation"] for row in after.report.recovery]
    assert min(losses) < losses[0]
    assert torch.equal(after.to_module().unused.bias, model.unused.bias)
    assert after.report.notes[-1].endswith("the batches that the best state was chosen on")


def test_an_original_in_training_mode_teaches_without_its_dropout() -> None:
    model = Ragged().eval()
    before = geofx.optimize(model, Budget(size=0.6), calibration=batches("mlp"))
    expected = before.recover(batches("mlp"), **SETTINGS)
    model.train()
    found = before.recover(batches("mlp"), **SETTINGS)
    assert model.training
    assert model.dropout.training
    assert found.report.recovery == expected.report.recovery


class Scaled(Ragged):
    """Takes an argument that is no tensor."""

    def forward(self, input: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input) * scale


def test_arguments_that_are_no_tensors_are_passed_on() -> None:
    plain, scaled = Ragged().eval(), Scaled().eval()
    expected, found = (
        geofx.optimize(model, Budget(size=0.6), calibration=data).recover(data, **SETTINGS).report.recovery
        for model, data in ((plain, batches("mlp")), (scaled, [{**x, "scale": 3.0} for x in batches("mlp")]))
    )
    for one, other in zip(found, expected, strict=True):
        assert one["validation"] == pytest.approx(other["validation"], rel=1e-3)


@pytest.mark.parametrize("held", [0, 2])
def test_validated_and_measured_on_what_the_analysis_kept_apart(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, holdout = batches("mlp", 10), batches("mlp", held, 10)
    options = {"holdout": holdout} if held else {}
    analysis = geofx.analyze(tiny_models.build("mlp"), every, effort="balanced", **options)
    result = analysis.apply(analysis.plan(Budget(size=0.12, scope="factorizable")))
    seen: list[Any] = []
    real = Recovery.run

    def run(self: Recovery, data: list[Any], validation: list[Any]) -> Any:
        seen.append(([*data], [*validation]))
        return real(self, data, validation)

    monkeypatch.setattr(Recovery, "run", run)
    after = result.recover(every, **options, **SETTINGS)
    ((data, validation),) = seen
    assert sums(validation) == sums(analysis.validation if held else analysis.holdout)
    assert set(sums(data)) >= set(sums(analysis.calibration))
    assert after.fidelity is not None


def sums(data: list[Any]) -> list[float]:
    return [float(batch["input"].double().sum()) for batch in data]
