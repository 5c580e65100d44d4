"""A saved folder holds none of the data that the model was traced on, and an example that still runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from geofx import artifact
from geofx.program import Program, flat_tensors
from geofx.stand_in import with_stand_in
from geofx.trace import trace


def with_example(**example: torch.Tensor) -> Program:
    program = trace(tiny_models.build("mlp"), tiny_models.example("mlp"))
    return dataclasses.replace(program, example=example)


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "mlp"])
def test_no_row_of_the_users_data_is_saved_and_the_example_runs(name: str, tmp_path: Path) -> None:
    example = tiny_models.example(name, seed=5)
    program = trace(tiny_models.build(name), example)
    artifact.save(tmp_path / "out", program, "{}", {})
    loaded = artifact.load(tmp_path / "out").program
    for key, value in program.example.items():
        stored = loaded.example[key]
        assert (stored.shape, stored.dtype) == (value.shape, value.dtype)
        same = [torch.equal(one, other) for one, other in zip(stored, value, strict=True)]
        assert all(same) if key.endswith("mask") else not any(same)
    assert all(torch.isfinite(value).all() for value in flat_tensors(loaded(**loaded.example)))
    stored = load_file(tmp_path / "out" / "geofx.safetensors")
    assert {key.removeprefix("example/") for key in stored if key.startswith("example/")} == set(example)


def test_ids_stay_inside_the_table() -> None:
    ids = torch.tensor([[0, 2, 1, 2], [2, 2, 1, 0]])
    assert with_stand_in(with_example(ids=ids)).example["ids"].tolist() == [[2, 1, 0, 2], [1, 0, 2, 1]]


def test_a_stand_in_is_its_own_stand_in() -> None:
    program = with_stand_in(
        with_example(
            ids=torch.full((2, 9), 120),
            pixels=torch.rand(2, 3, dtype=torch.bfloat16),
            waves=torch.ones(2, 3, dtype=torch.complex64),
            flags=torch.tensor([True, False]),
            scalar=torch.tensor(7),
            none=torch.zeros(0, dtype=torch.int64),
        )
    )
    again = with_stand_in(program).example
    assert all(torch.equal(value, again[name]) for name, value in program.example.items())
    assert program.example["ids"].flatten().tolist() == list(range(120, 102, -1))
    assert program.example["scalar"] == 7
