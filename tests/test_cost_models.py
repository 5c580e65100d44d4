"""Cost models: counts, the roofline, and curves through what was timed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from geofx.cost_models import DEVICES, Device, Flops, Measured, Roofline, Size
from geofx.cost_models.measured import ANCHORS, Curve, alignment
from geofx.errors import ConfigError, NumericsError
from geofx.factorizations import Dense, Factorization, GaugeFixed, LowRank
from geofx.options import Option
from geofx.piece import Piece
from geofx.region import Region
from geofx.site import Site
from geofx.workload import Workload, measure

WORK = Workload(flops=2e6, parameters=10**6, weight_bytes=4 * 10**6, activation_bytes=4000.0, launches=2)
DEVICE = Device("paper", {"float32": 1e12, "float16": 2e12}, bytes_per_s=1e11, launch_s=1e-6)
SINGLE = Region("w", "single", (Site("w", (256, 512)),))
JOINT = Region("qk", "shared_input", (Site("q", (256, 512), input="x"), Site("k", (128, 512), input="x")))


def option(form: Factorization, region: Region = SINGLE, rows: float = 1.0) -> Option:
    return Option(region, form, measure(form, region).times(rows), 0.0, rows)


def test_counts() -> None:
    item = option(LowRank(64))
    assert (Size().cost(item), Flops().cost(item)) == (64 * 768 * 4, 2 * 64 * 768)


def test_one_token_is_bound_by_memory_and_many_by_arithmetic() -> None:
    assert Roofline(DEVICE, 1).latency_s(WORK) == pytest.approx(4.004e6 / 1e11 + 2e-6)
    assert Roofline(DEVICE, 4096).latency_s(WORK) == pytest.approx(4096 * 2e6 / 1e12 + 2e-6)
    assert Roofline(DEVICE, 4096, "float16").latency_s(WORK) == pytest.approx(4096 * 2e6 / 2e12 + 2e-6)


def test_a_roofline_counts_bytes_in_the_dtype_of_the_target() -> None:
    item = option(Dense())
    work = item.workload
    half = Roofline(DEVICE, 1, "float16").cost(item)
    assert half == pytest.approx(
        (work.weight_bytes + work.activation_bytes) / 2 / 1e11 + work.launches * 1e-6
    )
    with pytest.raises(ConfigError, match="no peak of bfloat16"):
        Roofline(DEVICE, 1, "bfloat16")


def test_devices_say_where_their_peaks_are_from() -> None:
    assert {"h100-sxm", "a100-sxm", "l4", "t4", "rtx-4090", "server-cpu"} == set(DEVICES)
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.source
        assert device.flops_per_s.keys() == {"float32", "float16", "bfloat16"}
        assert 1e-6 <= device.launch_s <= 1e-5
        balance = device.flops_per_s["float16"] / device.bytes_per_s
        assert 10 < balance < 1000


class Bench:
    """Seconds by a law, and what was asked for."""

    def __init__(self, misaligned: float = 1.0) -> None:
        self.misaligned, self.asked = misaligned, list[tuple[Sequence[Piece], int]]()

    def __call__(self, pieces: Sequence[Piece], rows: int) -> list[float]:
        self.asked.append((pieces, rows))
        return [self.seconds(piece, rows) for piece in pieces]

    def seconds(self, piece: Piece, rows: int) -> float:
        slow = 1.0 if alignment(piece.form) == 64 else self.misaligned
        return slow * (1e-6 + 1e-12 * rows * measure(piece.form, piece.region).flops)


def test_what_lies_between_timed_settings_is_interpolated() -> None:
    bench = Bench()
    model = Measured(bench, tokens=32)
    items = [option(Dense()), *(option(LowRank(rank)) for rank in range(8, 168, 8))]
    items += [option(GaugeFixed(rank)) for rank in range(8, 248, 8)]
    assert model.learn(items) == {}
    timed = sum(len(pieces) for pieces, _ in bench.asked)
    assert timed <= 3 + 2 * (ANCHORS + 4)
    for item in items:
        exact = bench.seconds(Piece.of(item.factorization, item.region), 32)
        assert model.cost(item) == pytest.approx(exact, rel=0.01)
    model.learn(items)
    assert sum(len(pieces) for pieces, _ in bench.asked) == timed


def test_ranks_that_a_device_does_not_like_are_dearer() -> None:
    bench = Bench(misaligned=1.5)
    model = Measured(bench, tokens=32)
    items = [option(Dense()), *(option(LowRank(rank)) for rank in range(8, 256, 8))]
    model.learn(items)
    costs = {item.factorization: model.cost(item) for item in items}
    assert costs[LowRank(136)] == pytest.approx(bench.seconds(Piece.of(LowRank(136), SINGLE), 32), rel=0.02)
    assert costs[LowRank(128)] < costs[LowRank(120)]


def test_noise_does_not_make_a_smaller_form_slower() -> None:
    found = {LowRank(64 * k): (float(k), ratio) for k, ratio in enumerate((0.2, 0.35, 0.3, 0.6), 1)}
    curve = Curve.through(found)
    assert curve.ratios == pytest.approx((0.2, 0.325, 0.325, 0.6))
    assert [curve.at(size) for size in (0.5, 1.5, 9.0)] == pytest.approx([0.2, 0.2625, 0.6])


def test_a_joint_region_is_priced_beside_its_parts() -> None:
    bench = Bench()
    model = Measured(bench, tokens=4)
    parts = [option(Dense(), Region(site.weight, "single", (site,))) for site in JOINT.sites]
    items = [*parts, *(option(LowRank(rank), JOINT) for rank in (64, 128, 192))]
    model.learn(items)
    whole = sum(model.cost(part) for part in parts)
    one = bench.seconds(Piece.of(LowRank(128), JOINT), 4)
    assert model.cost(items[-2]) == pytest.approx(one, rel=0.01)
    assert model.gain_s(items[-2]) == pytest.approx(whole - one, rel=1e-6)


def test_uses_and_rows_of_a_call() -> None:
    bench = Bench()
    often, seldom = option(Dense(), rows=12.0), option(Dense(), rows=1 / 16)
    model = Measured(bench, tokens=32)
    model.learn([often, seldom])
    assert [rows for _, rows in bench.asked] == [32, 2]
    assert model.cost(often) == pytest.approx(12 * bench.seconds(Piece.of(Dense(), SINGLE), 32))
    assert model.cost(seldom) == pytest.approx(bench.seconds(Piece.of(Dense(), SINGLE), 2))
    with pytest.raises(NumericsError, match="not known"):
        model.cost(option(LowRank(8)))


def test_a_form_that_cannot_be_timed_is_told() -> None:
    class Broken(Bench):
        def __call__(self, pieces: Sequence[Piece], rows: int) -> list[float]:
            if any(isinstance(piece.form, GaugeFixed) for piece in pieces):
                raise RuntimeError("no kernel\nand more")
            return super().__call__(pieces, rows)

    model = Measured(Broken(), tokens=32)
    told = model.learn([option(Dense()), option(LowRank(64)), option(GaugeFixed(64))])
    assert told == {("w", "gauge_fixed"): "no kernel"}
