"""Fault row 115: JSON bombs and JSON that Python alone would let through."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geofx import strict_json
from geofx.errors import ArtifactCorruptError

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text()
VALUES = st.recursive(
    SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_round_trip_is_exact(value: object) -> None:
    text = strict_json.dumps(value)
    assert strict_json.loads(text, "x") == value
    assert strict_json.loads(text.encode(), "x") == value


def test_dumps_is_stable() -> None:
    assert strict_json.dumps({"b": 1, "a": [True]}) == '{\n "a": [\n  true\n ],\n "b": 1\n}\n'


def test_dumps_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        strict_json.dumps({"a": math.nan})


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        "-Infinity",
        "1e999",
        "[-1e999]",
        '{"a": 1, "a": 2}',
        '{"x": {"a": 1, "b": 2, "a": 1}}',
        str(2**63),
        str(-(2**63) - 1),
        "9" * 5000,
        "[" * 65 + "]" * 65,
        "[" * 100_000,
        '{"a":' * 100_000,
        "[1,]",
        "",
        "{'a': 1}",
        "\ufeff1",
        "1 2",
        '"' + '\\"' * 50_000,
        b"\xff\xfe",
        b"\x80\x04N.",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_row_115_is_refused_by_name(text: str | bytes) -> None:
    began = time.perf_counter()
    with pytest.raises(ArtifactCorruptError, match=r"plan\.json"):
        strict_json.loads(text, "plan.json")
    assert time.perf_counter() - began < 1.0


def test_row_115_size_cap_comes_before_the_parse() -> None:
    with pytest.raises(ArtifactCorruptError, match="11 bytes, and 10"):
        strict_json.loads("[" * 11, "x", limit_bytes=10)


def test_brackets_inside_strings_are_not_depth() -> None:
    text = '["' + "[" * 1000 + '\\"' + "{" * 1000 + '"]'
    assert strict_json.loads(text, "x") == ["[" * 1000 + '"' + "{" * 1000]


def test_depth_at_the_limit_is_accepted() -> None:
    assert strict_json.loads("[" * 64 + "]" * 64, "x") is not None
