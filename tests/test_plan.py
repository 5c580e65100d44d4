from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geofx.budget import Budget
from geofx.choice import Totals
from geofx.errors import ArtifactMismatchError, PlanError
from geofx.factorizations import Dense, Factorization, GaugeFixed, LowRank
from geofx.options import Option
from geofx.plan import Plan
from geofx.planner import choose
from geofx.region import Region
from geofx.site import Site, Skip
from geofx.workload import measure

SHAPE = (12, 8)
REGIONS = tuple(
    Region(f"layers.{i}.up.weight", "single", (Site(f"layers.{i}.up.weight", SHAPE),)) for i in range(3)
)
SETTINGS: tuple[Factorization, ...] = (
    Dense(),
    *(LowRank(r) for r in (1, 2, 3)),
    *(GaugeFixed(r) for r in (1, 4)),
)


@pytest.fixture
def plan() -> Plan:
    options = [
        Option(
            region,
            setting,
            measure(setting, region),
            0.0 if setting == Dense() else 1.0 / setting.rank,
        )
        for region in REGIONS
        for setting in SETTINGS
    ]
    return choose(
        options, Budget(size=0.8), Totals(100, 25, 0.0), [Skip("norm", "NOT_A_MATMUL", "1-D")], "hash-a"
    )


def edited(plan: Plan, change: Callable[[Any], None]) -> str:
    data = json.loads(plan.to_json())
    change(data)
    return json.dumps(data)


def test_json_round_trip_is_exact_and_stable(plan: Plan, tmp_path: Path) -> None:
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == text
    assert Plan.load(tmp_path / "plan.json") == plan


def test_totals_are_those_of_the_choices(plan: Plan) -> None:
    dense = 3 * 12 * 8
    assert plan.dense == Totals(4 * dense + 100, dense + 25, 2.0 * dense)
    assert plan.factorizable == Totals(4 * dense, dense, 2.0 * dense)
    assert plan.predicted.bytes == 100 + sum(choice.bytes for choice in plan.choices)
    assert plan.predicted.bytes <= plan.limits["size"]
    assert plan.loss == sum(choice.loss or 0.0 for choice in plan.choices)
    assert [choice.factorization.name for choice in plan.rewritten] == ["gauge_fixed"] * len(plan.rewritten)
    assert {rejection.reason for rejection in plan.rejections} == {"NOT_CHOSEN", "NOT_A_MATMUL"}


def test_edit_replaces_one_choice_and_prices_it(plan: Plan) -> None:
    name = plan.rewritten[0].region
    other = plan.edit({name: LowRank(2)})
    (choice,) = [choice for choice in other.choices if choice.region == name]
    assert (choice.bytes, choice.parameters, choice.flops, choice.loss) == (4 * 40, 40, 80.0, None)
    assert other.loss is None
    assert other.solver.status == "edited"
    assert other.predicted.bytes - plan.predicted.bytes == 160 - plan.rewritten[0].bytes
    back = other.edit({choice.region: Dense() for choice in other.choices})
    assert (back.predicted, back.loss, back.rewritten) == (plan.dense, 0.0, ())


def test_an_entry_taken_out_by_hand_is_an_edit_that_leaves_its_region_dense(plan: Plan) -> None:
    """The budget is then the editor's business, and no bug of geofx."""
    index = next(index for index, choice in enumerate(plan.choices) if not choice.is_dense)
    found = Plan.from_json(edited(plan, lambda data: data["choices"].pop(index)))
    assert found.solver.status == "edited"
    gone = plan.choices[index]
    assert found.predicted.bytes == plan.predicted.bytes + gone.dense_bytes - gone.bytes


def test_edit_refuses_what_is_not_there(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"no region 'layers.7.up.weight'.*nearest are 'layers"):
        plan.edit({"layers.7.up.weight": Dense()})
    with pytest.raises(PlanError, match=r"rank 9 is outside 1..8"):
        plan.edit({REGIONS[0].name: LowRank(9)})


def test_a_rank_edited_by_hand_is_priced_anew(plan: Plan) -> None:
    def change(data: Any) -> None:
        data["choices"][1]["factorization"] = {"name": "low_rank", "rank": 2}

    read = Plan.from_json(edited(plan, change))
    assert read.choices[1].bytes == 160
    assert read.choices[1].loss is None
    assert read.loss is None
    assert read.predicted.bytes == 100 + sum(choice.bytes for choice in read.choices)
    assert "loss unknown" in str(read)


def test_recorded_totals_are_not_believed(plan: Plan) -> None:
    def change(data: Any) -> None:
        data["predicted"]["bytes"] = 1
        data["loss"] = 0.0
        data["choices"][0]["dense_bytes"] = 10**9

    read = Plan.from_json(edited(plan, change))
    assert read.predicted == plan.predicted
    assert read.loss == plan.loss


@settings(max_examples=60, deadline=None)
@given(
    index=st.integers(0, 2),
    rank=st.one_of(st.integers(-5, 0), st.integers(9, 2**62)),
    name=st.sampled_from(["low_rank", "gauge_fixed"]),
)
def test_row_9_ranks_that_do_not_fit_name_the_entry(index: int, rank: int, name: str) -> None:
    plan = make_plan()

    def change(data: Any) -> None:
        data["choices"][index]["factorization"] = {"name": name, "rank": rank}

    with pytest.raises(PlanError, match=rf"choices\[{index}\]"):
        Plan.from_json(edited(plan, change))
    factorization = LowRank(rank) if name == "low_rank" else GaugeFixed(rank)
    choices = list(plan.choices)
    choices[index] = replace(choices[index], factorization=factorization)
    with pytest.raises(PlanError, match=rf"choices\[{index}\]"):
        replace(plan, choices=tuple(choices)).require_for(REGIONS, "")


def make_plan() -> Plan:
    options = [Option(region, Dense(), measure(Dense(), region), 0.0) for region in REGIONS]
    return choose(options, Budget(size=1.0), Totals(0, 0, 0.0))


def test_row_9_unknown_region_and_stale_hash(plan: Plan) -> None:
    plan.require_for(REGIONS, "hash-a")
    with pytest.raises(ArtifactMismatchError, match="plan again"):
        plan.require_for(REGIONS, "hash-b")
    with pytest.raises(PlanError, match=r"no region 'layers.2.up.weight'.*choices\[2\].*nearest are 'layers"):
        plan.require_for(REGIONS[:2], "hash-a")


def test_row_9_another_shape_or_dtype(plan: Plan) -> None:
    for site, field in (
        (Site("layers.1.up.weight", (12, 9)), "shapes"),
        (replace(REGIONS[1].site, dtype="float16"), "dtype"),
    ):
        others = (REGIONS[0], Region(REGIONS[1].name, "single", (site,)), REGIONS[2])
        with pytest.raises(PlanError, match=rf"choices\[1\]\.{field}"):
            plan.require_for(others, "hash-a")


def test_row_10_a_weight_rewritten_twice(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"layers.0.up.weight is rewritten twice.*choices\[3\]"):
        Plan.from_json(edited(plan, lambda data: data["choices"].append(data["choices"][0])))
    with pytest.raises(PlanError, match="rewritten twice"):
        replace(plan, choices=(*plan.choices, plan.choices[0])).require_for(REGIONS, "hash-a")


def test_row_10_a_tied_weight_under_its_other_name(plan: Plan) -> None:
    tied = Region(REGIONS[0].name, "single", (replace(REGIONS[0].site, aliases=("lm_head.weight",)),))
    extra = replace(plan.choices[0], region="lm_head.weight", weights=("lm_head.weight",))
    with pytest.raises(PlanError, match=r"lm_head.weight is rewritten twice, also by choices\[0\]"):
        replace(plan, choices=(*plan.choices, extra)).require_for((tied, *REGIONS[1:]), "hash-a")


def drop(*path: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (drop("choices", 0, "weights"), "choices[0].weights"),
        (put("choices", 1, "bytes", value="12"), "choices[1].bytes"),
        (put("choices", 1, "bytes", value=12.0), "choices[1].bytes"),
        (put("choices", 1, "bytes", value=-1), "choices[1].bytes"),
        (put("choices", 1, "bytes", value=True), "choices[1].bytes"),
        (put("choices", 2, "colour", value=1), "choices[2].colour"),
        (put("choices", 2, "shapes", value=[[12, 2**40]]), "choices[2].shapes[0][1]"),
        (put("choices", 2, "shapes", value=[[12, 8], [12, 8]]), "choices[2]"),
        (put("choices", 2, "dtype", value="Generator"), "choices[2].dtype"),
        (put("choices", 2, "kind", value="os.system"), "choices[2].kind"),
        (put("choices", 0, "factorization", value={"name": "os.system"}), "choices[0].factorization"),
        (put("choices", 0, "factorization", value={"name": ["low_rank"]}), "choices[0].factorization"),
        (
            put("choices", 0, "factorization", value={"name": "low_rank", "rank": "4"}),
            "choices[0].factorization",
        ),
        (
            put("choices", 0, "factorization", value={"name": "low_rank", "rank": 4, "x": 1}),
            "choices[0].factorization",
        ),
        (put("choices", 0, "factorization", value="low_rank"), "choices[0].factorization"),
        (put("budget", "size", value="0.6"), "size '0.6' is not a budget"),
        (put("budget", "colour", value=1), "budget.colour"),
        (put("solver", "gap", value="small"), "solver.gap"),
        (put("schema_version", value=2), "schema_version"),
        (drop("schema_version"), "schema_version"),
        (put("extra", value=1), "extra"),
    ],
)
def test_rows_9_and_118_faulty_entries_are_named(
    plan: Plan, change: Callable[[Any], None], path: str
) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(edited(plan, change))
    assert path in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"a": 1',
        "[" * 100_000,
        '{"a":' * 5_000 + "1" + "}" * 5_000,
        '"' + "x" * (17 * 10**6) + '"',
        "9" * 10_000,
        "\ud800",
    ],
)
def test_row_115_what_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_row_115_numbers_that_are_none(plan: Plan, literal: str) -> None:
    text = plan.to_json().replace('"gap": ', f'"gap": {literal}, "was": ')
    with pytest.raises(PlanError, match=r"finite|NaN|Infinity"):
        Plan.from_json(text)


def test_row_115_a_key_that_is_there_twice(plan: Plan) -> None:
    text = plan.to_json().replace('"budget": {', '"budget": {"size": 0.1, ', 1)
    with pytest.raises(PlanError, match="size"):
        Plan.from_json(text)


def test_load_of_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\x80\x04\x95")
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path / "binary.json")


def test_the_table(plan: Plan) -> None:
    assert str(plan) == (
        "plan: 2 of 3 regions rewritten, optimal\n"
        "  asked size of the model <= 1.001 kB: 996 B\n"
        "  1.252 kB -> 996 B (79.6%)\n"
        "  313 parameters -> 249 parameters (79.6%)\n"
        "  576 flops per token -> 448 flops per token (77.8%)\n"
        "  predicted loss 0.5 nats per token\n"
        "  solver objective 0.5, bound 0.5, gap 0\n"
        "  layers.*.up.weight    1 x dense  384 B -> 384 B  loss 0\n"
        "  layers.*.up.weight    2 x gauge_fixed rank 4  768 B -> 512 B  loss 0.5\n"
        "  1 x NOT_A_MATMUL\n"
        "  6 x NOT_CHOSEN"
    )
    assert "rank 2..3  768 B -> 400 B  loss unknown" in str(
        plan.edit({REGIONS[0].name: LowRank(2), REGIONS[1].name: LowRank(3), REGIONS[2].name: Dense()})
    )
    bigger = plan.edit(dict.fromkeys([region.name for region in REGIONS], Dense()))
    assert "<= 1.001 kB: 1.252 kB  OVER BUDGET" in str(bigger)


def test_row_123_names_cannot_drive_a_terminal(plan: Plan) -> None:
    evil = replace(plan.choices[0], region="\x1b]8;;http://x\x07layers\u202e")
    assert "\x1b" not in str(replace(plan, choices=(evil,)))
    assert "]*;;http://xlayers" in str(replace(plan, choices=(evil,)))
    assert "\u202e" not in str(replace(plan, choices=(evil,)))
