"""JSON from files that nobody vouches for: bounded in size and depth, every key once, every number finite."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

from geofx.errors import ArtifactCorruptError

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64
_INT_DIGITS = 20
_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1
# The closing quote is optional: a string that never ends must not send the scan back to its start.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


def parse(text: str | bytes, *, limit_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """The value of the JSON document ``text``.

    Raises:
        ValueError: not JSON, longer or deeper than allowed, a key twice in one object, or a number that is
            NaN, infinite or an integer outside 64 bits.
    """
    size = len(text) if isinstance(text, bytes) else len(text.encode(errors="surrogatepass"))
    if size > limit_bytes:
        raise ValueError(f"it has {size} bytes, and {limit_bytes} are allowed")
    decoded = text if isinstance(text, str) else text.decode()
    _check_depth(decoded, max_depth)
    return json.loads(
        decoded,
        object_pairs_hook=_unique,
        parse_constant=_refuse_constant,
        parse_int=_bounded_int,
        parse_float=_finite_float,
    )


def loads(text: str | bytes, what: str, *, limit_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """`parse` for the file called ``what``.

    Raises:
        ArtifactCorruptError: `parse` refuses it.
    """
    try:
        return parse(text, limit_bytes=limit_bytes, max_depth=max_depth)
    except ValueError as error:
        reason = f"{what} is not strict JSON: {error}"
        raise ArtifactCorruptError(reason, where=what, fix="take the file from its source again") from error


def dumps(value: Any) -> str:
    """``value`` as JSON text, the same for equal values: sorted keys, one line an item, newline at the end.

    Raises:
        ValueError: a float that is not finite.
    """
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def _check_depth(text: str, limit: int) -> None:
    depth = 0
    for found in _BRACKETS.finditer(text):
        piece = found.group()
        if piece in "[{":
            depth += 1
            if depth > limit:
                raise ValueError(f"nested more than {limit} deep")
        elif piece in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice[:80]!r} appears twice")
    return result


def _refuse_constant(text: str) -> float:
    raise ValueError(f"the number {text} is not finite")


def _bounded_int(text: str) -> int:
    if len(text) > _INT_DIGITS or not _INT_MIN <= int(text) <= _INT_MAX:
        raise ValueError(f"the integer {text[:24]} does not fit in 64 bits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:24]} is not finite")
    return value
