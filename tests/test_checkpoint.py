"""Checkpoints of a recovery: taken up where they stand, refused where they are of another run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from recovered import SETTINGS, batches, compressed, factors_of
from torch import nn

from geofx import OptimizedModel
from geofx.cache import Cache
from geofx.checkpoint import Checkpoint, Progressed
from geofx.errors import ArtifactMismatchError


@pytest.fixture(scope="module")
def decoder() -> OptimizedModel:
    return compressed("llama")


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Its milestones are keys that are numbers."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 10], gamma=0.3)


def by_metric(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.5)


def in_turn(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    first = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [first, stepped(optimizer)], milestones=[5])


@pytest.mark.parametrize(
    "further",
    [{}, {"learning_rate": None}, {"schedule": stepped}, {"schedule": by_metric}, {"schedule": in_turn}],
    ids=["default", "rate of its own", "milestones", "by metric", "in turn"],
)
def test_an_interrupted_run_ends_where_one_in_one_piece_ends(
    decoder: OptimizedModel, tmp_path: Path, further: dict[str, Any]
) -> None:
    class StoppedError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "recover" and done == 8:
            raise StoppedError

    settings = SETTINGS | further
    whole = decoder.recover(batches("llama", 4), **settings)
    kept = {**settings, "checkpoint": tmp_path / "run"}
    with pytest.raises(StoppedError):
        decoder.recover(batches("llama", 4), progress=stop, **kept)
    steps: list[int] = []
    resumed = decoder.recover(
        batches("llama", 4), progress=lambda stage, done, total: steps.append(done), **kept
    )
    assert steps[0] == 6, "the last checkpoint before the stop"
    for name, part in factors_of(resumed).items():
        assert torch.equal(part, factors_of(whole)[name]), name
    assert resumed.report.recovery == whole.report.recovery
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix in (".pt", ".pkl", ".bin")]


def test_a_checkpoint_of_other_settings_is_not_taken_up(decoder: OptimizedModel, tmp_path: Path) -> None:
    def made(rate: float) -> Any:
        return lambda parts: torch.optim.AdamW(parts, lr=rate)

    plain = {"steps": 4, "every": 2}
    for further in ({}, {"optimizer": made(1e-4)}, {"optimizer": made(1e-3)}, {"schedule": stepped}):
        alone = decoder.recover(batches("llama", 4), **plain, **further)
        kept = decoder.recover(batches("llama", 4), checkpoint=tmp_path, **plain, **further)
        assert kept.report.recovery == alone.report.recovery, further


def test_schedules_that_differ_only_in_their_functions_are_told_apart(
    decoder: OptimizedModel, tmp_path: Path
) -> None:
    def made(ratio: float) -> Any:
        return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, partial(pow, ratio))

    data, plain = batches("llama", 4), {"steps": 4, "every": 2}
    runs = [decoder.recover(data, checkpoint=tmp_path, schedule=made(r), **plain) for r in (0.9, 0.1)]
    assert runs[1].report.recovery == decoder.recover(data, schedule=made(0.1), **plain).report.recovery
    assert runs[0].report.recovery != runs[1].report.recovery


def test_a_checkpoint_that_lacks_a_parameter_is_refused(tmp_path: Path) -> None:
    part = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([part], lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    checkpoint = Checkpoint(Cache(tmp_path), "run")
    checkpoint.write(Progressed(), {"a": part}, {"a": part.detach()}, optimizer, schedule)
    with pytest.raises(ArtifactMismatchError, match="another run"):
        checkpoint.read({"a": part, "b": part}, optimizer, schedule)


def test_a_checkpoint_of_another_teacher_is_not_taken_up(tmp_path: Path) -> None:
    before, other = compressed("mlp"), tiny_models.build("mlp", seed=1)
    data, settings = batches("mlp"), {**SETTINGS, "checkpoint": tmp_path}
    expected = before.recover(data, **SETTINGS)
    before.recover(data, teacher=other, **settings)
    assert before.recover(data, **settings).report.recovery == expected.report.recovery
