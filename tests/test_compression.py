"""The figures of Definitions 1, 2, 4 and 5, and the certificate of Definition 6."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn
from torch.nn import functional

import geofx
from geofx.compression import Certificate, Condition, compression_ratio, parameter_count, parameter_mae
from geofx.errors import ConfigError, VerificationError
from geofx.parameter_space import ParameterSpace
from geofx.verify import HELD_OUT, SEEN


def space_of(*values: float) -> ParameterSpace:
    module = nn.Module()
    module.v = nn.Parameter(torch.tensor(values))
    return ParameterSpace.of(module)


def batches(count: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    return [tiny_models.example("llama", 4, 24, seed) for seed in range(first, first + count)]


@pytest.fixture(scope="module")
def result() -> geofx.OptimizedModel:
    analysis = geofx.analyze(tiny_models.build("llama"), batches(3), holdout=batches(2, 10))
    return analysis.apply(analysis.plan(geofx.Budget(size=0.8, scope="factorizable")))


def test_the_figures_by_hand() -> None:
    original, other = space_of(1.0, 0.0, -2.0, 4.0), space_of(1.5, 0.0, 0.0, 4.0)
    assert parameter_count(original) == 3
    assert compression_ratio(3, 2) == 0.5
    assert compression_ratio(2, 4) == -0.5
    assert parameter_mae(original, other) == (0.5 + 2.0) / 4
    assert parameter_mae(original, original) == 0.0


def test_the_figures_of_a_result_from_its_tensors(result: geofx.OptimizedModel) -> None:
    """FDL against plain tensor arithmetic on the eager modules, ACC against the loss of the eager module."""
    certificate = result.certify(1.0, 10.0, 0.0)
    fdl, acc, ratio = (condition.reached for condition in certificate.conditions)
    eager = result.to_module().requires_grad_(False)
    before = {name: tensor.detach() for name, tensor in result.module.named_parameters()}
    frequencies = 8  # of the rotary embedding: a buffer that the graph reads
    numbers = sum(tensor.numel() for tensor in before.values()) + frequencies
    difference = sum(
        float((eager.get_submodule(weight.rpartition(".")[0]).weight.double() - before[weight]).abs().sum())
        for factored in result.rewrites.values()
        for weight in factored.weights
    )
    assert fdl == pytest.approx(difference / numbers, rel=1e-9)
    assert fdl == result.fidelity.parameter_mae > 0.0
    stored = sum(int(torch.count_nonzero(tensor)) for _, tensor in result.program.tensors())
    total = sum(int(torch.count_nonzero(tensor)) for tensor in before.values()) + frequencies
    assert ratio == (total - stored) / stored > 0.0
    assert (certificate.parameters_before, certificate.parameters_after) == (total, stored)
    losses, terms = 0.0, 0
    for batch in batches(2, 10):
        targets = batch["input_ids"][:, 1:][batch["attention_mask"][:, 1:] > 0]
        with torch.no_grad():
            logits = eager(**batch, use_cache=False).logits[:, :-1][batch["attention_mask"][:, 1:] > 0]
        losses += float(functional.cross_entropy(logits, targets, reduction="sum"))
        terms += len(targets)
    assert acc == pytest.approx(losses / terms, rel=1e-5)
    assert (certificate.tokens, certificate.unit, certificate.data) == (terms, "nats per token", HELD_OUT)


def test_each_condition_decides_and_equality_does_not_do(result: geofx.OptimizedModel) -> None:
    fdl, acc, ratio = (condition.reached for condition in result.certify(1, 1, 1).conditions)
    assert result.certify(fdl * 1.01, acc * 1.01, ratio * 0.99).holds
    assert result.certify(math.inf, math.inf, -math.inf).holds
    for asked in ((fdl, math.inf, 0.0), (1.0, acc, 0.0), (1.0, math.inf, ratio)):
        certificate = result.certify(*asked)
        assert not certificate.holds
        assert [condition.holds for condition in certificate.conditions].count(False) == 1
    assert not Condition("FDL", "<", 1.0, math.nan).holds


def test_tampered_tensors_change_the_certificate() -> None:
    analysis = geofx.analyze(
        tiny_models.build("mlp"), [tiny_models.example("mlp", 8, seed=s) for s in (0, 1)]
    )
    result = analysis.apply(analysis.plan(geofx.Budget(size=0.8)))
    before = result.certify(1.0, 1.0, 0.0)
    assert before.conditions[0].reached == result.fidelity.parameter_mae
    with torch.no_grad():
        for name, tensor in result.program.tensors():
            if tensor.dim() == 2:
                result.program.set_tensor(name, torch.zeros_like(tensor), trainable=False)
    after = result.certify(1.0, 1.0, 0.0)
    assert after.conditions[0].reached > before.conditions[0].reached
    assert after.parameters_after < before.parameters_after


def test_without_a_measured_loss_or_an_original_there_is_no_certificate(
    result: geofx.OptimizedModel, tmp_path: Path
) -> None:
    blind = dataclasses.replace(result, fidelity=None)
    with pytest.raises(VerificationError, match="not measured"):
        blind.certify(1.0, 10.0, 0.0)
    with pytest.raises(VerificationError, match="not measured"):
        blind.certify(1.0, 10.0, 0.0, holdout=[])
    assert blind.certify(1.0, 10.0, 0.0, holdout=batches(2, 10)) == result.certify(1.0, 10.0, 0.0)
    for bound in (math.nan, "0.1", None):
        with pytest.raises(ConfigError, match="not all numbers"):
            result.certify(bound, 1.0, 0.0)  # type: ignore[arg-type]
    loaded = geofx.load(result.save(tmp_path / "out"))
    with pytest.raises(ConfigError, match="original parameters are not known"):
        loaded.certify(1.0, 10.0, 0.0)
    assert loaded.certify(1.0, 10.0, 0.0, original=result.module) == result.certify(1.0, 10.0, 0.0)


def test_data_that_was_calibrated_on_is_said_to_be() -> None:
    result = geofx.optimize(
        tiny_models.build("mlp"), geofx.Budget(size=0.8), calibration=[tiny_models.example("mlp", 8)]
    )
    assert result.certify(1.0, 1.0, 0.0).data == SEEN
    assert SEEN in str(result.certify(1.0, 1.0, 0.0))


def test_as_text_and_as_json() -> None:
    conditions = (
        Condition("FDL", "<", 0.01, 0.0025),
        Condition("ACC", "<", math.inf, 3.25),
        Condition("CR", ">", 0.5, 0.25),
    )
    certificate = Certificate(conditions, 125, 100, "held-out batches", 640, "nats per token")
    assert str(certificate) == (
        "(0.01, inf, 0.5)-compression does not hold\n"
        "  FDL 0.0025 < 0.01: mean |v - v̂|\n"
        "  ACC 3.25 < inf: nats per token, 640 loss terms of held-out batches\n"
        "  CR  0.25 not > 0.5: 125 numbers that are not zero, 100 after"
    )
    assert json.loads(json.dumps(certificate.to_json(), allow_nan=False)) == {
        "holds": False,
        "conditions": [
            {"metric": "FDL", "relation": "<", "asked": 0.01, "reached": 0.0025, "holds": True},
            {"metric": "ACC", "relation": "<", "asked": None, "reached": 3.25, "holds": True},
            {"metric": "CR", "relation": ">", "asked": 0.5, "reached": 0.25, "holds": False},
        ],
        "parameters_before": 125,
        "parameters_after": 100,
        "data": "held-out batches",
        "tokens": 640,
        "unit": "nats per token",
    }
