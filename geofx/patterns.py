"""Which names a list of patterns selects, with patterns that match nothing or never end refused."""

from __future__ import annotations

import difflib
import fnmatch
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from geofx.errors import ConfigError

Patterns = Iterable[str] | str

MAX_LENGTH = 200
MAX_REPEATS = 4
MAX_BRANCHES = 8
MAX_COUNT = 1000
MAX_SECONDS = 0.5
"""Bounds on a pattern: backtracking then costs at most a small power of a name's length."""

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)


def matching(
    names: Iterable[str],
    include: Patterns = (),
    ignore: Patterns = (),
) -> tuple[str, ...]:
    """{n in names: (no include, or some include matches n) and no ignore matches n}, in order.

    A pattern is a shell glob on the dotted name, where ``lm_head`` also takes all that begins with
    ``lm_head.``, or ``re:`` and a regular expression that must match the whole name.

    Raises:
        ConfigError: a pattern matches none of ``names``, or is no usable pattern.
    """
    known = tuple(names)
    included, ignored = (
        {pattern: _matches(pattern, known) for pattern in _listed(patterns)} for patterns in (include, ignore)
    )
    wanted = set().union(*included.values()) if included else set(known)
    unwanted = set().union(*ignored.values())
    return tuple(name for name in known if name in wanted and name not in unwanted)


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The names most like ``name``, quoted and joined, for an error message."""
    choices = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, choices, n=count, cutoff=0.3) or choices[:count]
    return ", ".join(repr(choice) for choice in close) or "none"


def _listed(patterns: Patterns) -> tuple[str, ...]:
    if isinstance(patterns, Iterator):
        raise ConfigError("patterns of a generator can be read only once", fix="give a list of them")
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matches(pattern: str, names: Sequence[str]) -> set[str]:
    test, deadline = _compiled(pattern), time.monotonic() + MAX_SECONDS
    found = set()
    for name in names:
        if test(name):
            found.add(name)
        if time.monotonic() > deadline:
            raise _unusable(pattern, "takes too long to match")
    if not found:
        prefixes = (
            ".".join(name.split(".")[:stop]) for name in names for stop in range(name.count(".") + 1, 0, -1)
        )
        near = nearest(pattern.removeprefix("re:"), prefixes)
        raise ConfigError(f"pattern {pattern!r} matches nothing", fix=f"the nearest names are {near}")
    return found


def _compiled(pattern: str) -> Callable[[str], object]:
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_LENGTH:
        raise _unusable(pattern, f"is not a text of 1 to {MAX_LENGTH} characters")
    if not pattern.startswith("re:"):
        return lambda name: fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
    source = pattern.removeprefix("re:")
    try:
        repeats = list(_choice_points(_parser.parse(source), nested=False))
        compiled = re.compile(source)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise _unusable(pattern, f"is not a regular expression that can be used: {error}") from error
    if repeats.count("repeat") > MAX_REPEATS or repeats.count("branch") > MAX_BRANCHES:
        raise _unusable(pattern, f"has more than {MAX_REPEATS} repeats or {MAX_BRANCHES} alternatives lists")
    return compiled.fullmatch


def _choice_points(parsed: Any, nested: bool) -> Iterator[str]:
    """``repeat`` or ``branch`` for each place where a match may go on in several ways."""
    for code, argument in parsed:
        repeats = code in _REPEATS
        if nested and (repeats or code is _constants.BRANCH):
            raise ValueError("a repeat holds another repeat or alternatives, as in (a+)+")
        if repeats and MAX_COUNT < argument[1] < int(_constants.MAXREPEAT):
            raise ValueError(f"a repeat counts beyond {MAX_COUNT}")
        if repeats or code is _constants.BRANCH:
            yield "repeat" if repeats else "branch"
        for child in _children(argument):
            yield from _choice_points(child, nested or (repeats and argument[1] > 1))


def _children(argument: Any) -> Iterator[Any]:
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _children(part)


def _unusable(pattern: object, why: str) -> ConfigError:
    return ConfigError(f"pattern {str(pattern)[:80]!r} {why}", fix="use a shell glob such as '*.mlp.*'")
