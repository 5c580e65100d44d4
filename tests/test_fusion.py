"""Prices of kernels on paper, by hand; and what they make of a program on each target."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build, example

import geofx
from geofx import Target
from geofx.cost_models import DEVICES, Device
from geofx.cost_models.kernels import (
    Shape,
    Work,
    block_diagonal,
    block_diagonal_chain,
    fastest_s,
    total_s,
)
from geofx.errors import ConfigError
from geofx.factorizations import GaugeFixed, LowRank, Monarch, TensorTrain, TokenMPS
from geofx.fusion import fused, rows_of, timed_to_pay
from geofx.ops import LOW_RANK_LINEAR
from geofx.ops.tiles import Tile
from geofx.piece import Piece
from geofx.piece_latency import repeated
from geofx.program import Program

GPU = Device("a GPU", {"float16": 1e12}, 1e9, 1e-6, processors=10, cache_bytes_per_s=1e10)
TILE = Tile(16, 64, 64, 32)


def test_time_is_that_of_what_binds() -> None:
    assert Work(1e12, 1.0).seconds(GPU, "float16") == pytest.approx(1.0 + 1e-6)
    assert Work(1.0, 1e9).seconds(GPU, "float16") == pytest.approx(1.0 + 1e-6)
    assert Work(1.0, 1.0, 1e10).seconds(GPU, "float16") == pytest.approx(1.0 + 1e-6)
    assert Work(1.0, 1.0, 1e9, programs=5).seconds(GPU, "float16") == pytest.approx(0.2 + 1e-6), "half idle"
    assert Work(1.0, 1.0, 1e9, programs=15).seconds(GPU, "float16") == pytest.approx(0.1 / 0.75 + 1e-6)
    slow = Device("no figure for its cache", {"float16": 1e12}, 1e9, 0.0)
    assert Work(1.0, 1.0, 1e9).seconds(slow, "float16") == pytest.approx(1.0)


def test_low_rank_kernel_reads_r_once_for_each_tile_of_outputs() -> None:
    work = Shape(tokens=1, inputs=96, outputs=128, rank=65).low_rank("float16", TILE)
    assert work.programs == 2
    assert work.memory_bytes == 2 * (96 + 65 * (96 + 128) + 128)
    assert work.cache_bytes == 2 * 2 * (2 * 96 + 65 * (96 + 64)), "x twice, as 65 ranks are two blocks"
    assert work.flops == 2 * (2 * 16 * 128 * (96 + 64)), "whole tiles, of two blocks of 64 ranks"


def test_gauge_fixed_kernel_has_programs_for_z_as_well() -> None:
    shape = Shape(tokens=1, inputs=96, outputs=128, rank=64)
    work, others = shape.gauge_fixed("float16", TILE), Shape(1, 96, 64, 64).low_rank("float16", TILE)
    assert (work.programs, others.programs) == (2, 1)
    assert work.memory_bytes == 2 * (96 + 64 * (96 + 64) + 64 + 64)
    assert work.cache_bytes == others.cache_bytes + 2 * (1 + 64) * 96


def test_chains_are_two_matmuls_and_their_copies() -> None:
    shape = Shape(tokens=3, inputs=10, outputs=20, rank=5)
    first, second = shape.chain("float32")
    assert (first.flops, second.flops) == (2 * 3 * 10 * 5, 2 * 3 * 5 * 20)
    assert first.memory_bytes == 4 * (3 * 10 + 10 * 5 + 3 * 5)
    assert len(shape.gauge_fixed_chain("float32")) == 3
    left, right = (4, 5, 4), (2, 8, 5)
    works = block_diagonal_chain(3, left, right, "float32")
    assert sum(work.flops for work in works) == 2 * 3 * (4 * 5 * 4 + 2 * 8 * 5)
    assert len(works) == 4
    one = block_diagonal(3, left, right, "float32", TILE)
    assert one.memory_bytes == 4 * (80 + 80 + 3 * (10 + 20))
    assert one.programs == 4


def test_fusing_wins_at_small_ranks_and_few_tokens_alone() -> None:
    device = DEVICES["h100-sxm"]

    def wins(tokens: int, rank: int) -> bool:
        shape = Shape(tokens, 4096, 4096, rank)
        kernel_s = fastest_s(device, "bfloat16", lambda tile: shape.low_rank("bfloat16", tile))
        return kernel_s < total_s(device, "bfloat16", shape.chain("bfloat16"))

    assert wins(1, 16)
    assert not wins(1, 512)
    assert not wins(2048, 16)


def program_of(form: object, kind: torch.dtype = torch.float32, side: int = 512) -> Program:
    region = "embedding" if isinstance(form, TokenMPS | TensorTrain) else "single"
    return repeated(Piece(form, region, (((side, side), False),), str(kind)[6:]), 1, 2)


def operations(program: Program) -> set[str]:
    return {str(node.target).split(".")[1] for node in program.graph.nodes if "geofx" in str(node.target)}


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (LowRank(8), "low_rank_linear"),
        (GaugeFixed(8), "gauge_fixed_linear"),
        (Monarch(8, 4), "block_diagonal_linear"),
        (TokenMPS(512, 4), "token_mps_lookup"),
        (TensorTrain((8, 8, 8), (8, 8, 8), (8, 8)), "tensor_train_lookup"),
    ],
)
def test_a_paper_device_gets_the_operations_that_pay(form: object, name: str) -> None:
    target = Target(device="h100-sxm", tokens=1)
    program = program_of(form)
    made = fused(program, target, target.tokens)
    assert operations(made) == {name}
    for one, other in zip(made(**program.example), program(**program.example), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_does_not_pay_and_what_has_no_kernels_is_the_program_itself() -> None:
    program = program_of(LowRank(256))
    many = Target(device="h100-sxm", tokens=4096)
    assert all(
        fused(other, many, 4096) is other for other in (program_of(LowRank(8)), program_of(GaugeFixed(8)))
    )
    for target in (
        Target(device="h100-sxm", tokens=1),
        Target(tokens=1),
        Target(runtime="onnxruntime", tokens=1),
        Target(runtime="compile", tokens=1),
        Target(device="server-cpu", tokens=1),
    ):
        assert fused(program, target, target.tokens) is program
    double = program_of(LowRank(8), torch.float64)
    assert fused(double, Target(device="h100-sxm", tokens=1), 1) is double, "no peak, no price"


def test_a_lookup_without_a_kernel_stays() -> None:
    four, odd = TensorTrain((4, 4, 4, 8), (4, 4, 4, 8), (4, 4, 4)), TokenMPS(512, 14)
    target = Target(device="h100-sxm", tokens=1)
    for form in (four, odd):
        program = program_of(form)
        assert fused(program, target, 1) is program


def test_rows_are_those_of_a_call() -> None:
    target = Target(batch=3, tokens=7)
    assert rows_of(geofx.trace(build("mlp"), example("mlp")), target) == 3
    assert rows_of(geofx.trace(build("bert"), example("bert")), target) == 21


def test_targets_that_are_not_there() -> None:
    program = program_of(LowRank(8))
    with pytest.raises(ConfigError, match=r"no device 'h200'.*the nearest are 'h100-sxm'"):
        fused(program, Target(device="h200"), 1)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            fused(program, Target(device="cuda"), 1)


def test_on_cuda_the_faster_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def medians(calls: dict, rounds: int) -> dict[str, float]:
        for call in calls.values():
            call()
        asked.append(rounds)
        return {"op": seconds, "chain": 1.0}

    monkeypatch.setattr("geofx.fusion.interleaved_medians", medians)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    x, left, right = torch.empty(2, 3, 8, device="meta"), torch.randn(12, 3), torch.randn(3, 8)
    for seconds in (0.9, 1.1):
        assert timed_to_pay(5, LOW_RANK_LINEAR, (x, left, right, None)) == (seconds < 1.0)
    assert len(asked) == 2
