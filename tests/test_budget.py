from __future__ import annotations

import time
from typing import Any

import pytest

from geofx.budget import Budget, describe
from geofx.errors import ConfigError
from geofx.patterns import matching

NAMES = (
    "model.embed.weight",
    "model.layers.0.mlp.up.weight",
    "model.layers.1.mlp.up.weight",
    "model.layers.10.attn.q.weight",
    "lm_head.weight",
    "lm_head_extra.weight",
)


@pytest.mark.parametrize(
    "bad",
    [
        0,
        -1,
        1,
        0.0,
        -0.5,
        1.5,
        float("nan"),
        float("inf"),
        True,
        "0.6",
        "",
        "12 parsecs",
        "120mb",
        "0 MB",
        "-3 MB",
        "101%",
        "0%",
        "1e3 MB",
        "MB",
        "１２ MB",
        "1_000 MB",
        b"1MB",
        [1],
    ],
)
def test_row_1_a_size_that_is_none_names_the_accepted_forms(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"share such as 0\.8.*120MB.*MiB"):
        Budget(size=bad)


@pytest.mark.parametrize("resource", ["parameters", "flops"])
@pytest.mark.parametrize("bad", [0, -1, 1.5, float("nan"), False, "120MB", "0.6"])
def test_row_1_counts(resource: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"share such as 0\.8"):
        Budget(**{resource: bad})


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf"), True, "0.1"])
def test_row_1_losses(bad: Any) -> None:
    with pytest.raises(ConfigError, match="0 or above"):
        Budget(loss=bad)


def test_row_1_nothing_limited_and_unknown_scope() -> None:
    with pytest.raises(ConfigError, match="limits nothing"):
        Budget()
    with pytest.raises(ConfigError, match="unknown scope 'layers'"):
        Budget(size=0.5, scope="layers")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "limit"),
    [
        (0.8, 800),
        (1.0, 1001),
        ("80%", 800),
        (2, 2),
        (10**12, 10**12),
        ("120MB", 120_000_000),
        ("350 MiB", 350 * 2**20),
        ("350 MB", 350_000_000),
        ("1.5GB", 1_500_000_000),
        (" 2 kB ", 2000),
        ("512B", 512),
    ],
)
def test_row_1_sizes_in_bytes(size: Any, limit: int) -> None:
    assert Budget(size=size).limits(1001, 0, 0.0) == {"size": limit}


def test_limits_are_shares_of_the_dense_model() -> None:
    budget = Budget(size=0.5, parameters=300, flops="25%", loss=0)
    assert budget.limits(999, 100, 10.0) == {"size": 499, "parameters": 300, "flops": 2.5, "loss": 0.0}


def test_describe_uses_decimal_units() -> None:
    assert describe("size", 3_200_000) == "3.2 MB"
    assert describe("size", 12) == "12 B"
    assert describe("parameters", 1_234_000) == "1.234 M parameters"
    assert describe("loss", 0.0123, "nats") == "loss 0.0123 nats"


@pytest.mark.parametrize(
    ("include", "ignore", "expected"),
    [
        ((), (), NAMES),
        (["lm_head"], (), ("lm_head.weight",)),
        ("model.layers.1", (), ("model.layers.1.mlp.up.weight",)),
        (["*.mlp.*"], ["model.layers.0"], ("model.layers.1.mlp.up.weight",)),
        ((), ["model"], ("lm_head.weight", "lm_head_extra.weight")),
        ([r"re:model\.layers\.[0-9]+\.(mlp|attn)\.(up|q)\.weight"], (), NAMES[1:4]),
        ([r"re:lm_head\.weight"], ["*"], ()),
    ],
)
def test_matching_takes_globs_prefixes_and_regexes(include: Any, ignore: Any, expected: Any) -> None:
    assert matching(NAMES, include, ignore) == expected


def test_row_6_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'lm_heat' matches nothing.*'lm_head'"):
        matching(NAMES, ignore=["lm_heat"])
    with pytest.raises(ConfigError, match="only once"):
        matching(NAMES, ignore=(name for name in ["lm_head"]))
    with pytest.raises(ConfigError, match="matches nothing"):
        matching(NAMES, include=["re:lm_head"])


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "(a|aa)+$",
        "(a*)*b",
        "((a?){30}){30}",
        "a?" * 30 + "a" * 30,
        ".*" * 9 + "!",
        "(x{1,9}){1,9}",
        "(?:){1000000000}",
        "(?=(a+)+b)",
        "(a|a)" * 12,
        "(?(1)(a+)+|b)",
        "(",
        "[",
        "*",
        "a{5}{5}",
        "(" * 150,
        "a" * 999,
        "(?i:(a+)+)$",
        "(?>(a+)+)b",
        "(?:a++)+b",
    ],
)
def test_row_7_invalid_and_catastrophic_regexes_end_within_a_second(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match="use a shell glob"):
        matching(["a" * 60 + "!x"] * 20, include=[f"re:{pattern}"])
    assert time.monotonic() - start < 1.0


def test_row_7_a_slow_regex_that_is_allowed_ends_within_a_second() -> None:
    names, start = ["a" * 100] * 10_000, time.monotonic()
    with pytest.raises(ConfigError, match="too long to match"):
        matching(names, include=["re:.*.*.*.*!"])
    assert time.monotonic() - start < 1.0


def test_row_7_globs_with_many_stars_do_not_backtrack() -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match="matches nothing"):
        matching(["a" * 200] * 10, include=["*a" * 60 + "b"])
    assert time.monotonic() - start < 1.0
