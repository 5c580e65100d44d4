"""Records of results, read from JSON: the field that is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from geofx.errors import ArtifactCorruptError

T = TypeVar("T")


def read_record(
    adapter: TypeAdapter[T], data: Mapping[str, Any] | str | bytes, what: str, *, where: str = "", fix: str
) -> T:
    """The record that ``data`` describes, a parsed object or its text; ``what`` it is to be, as in "a plan".

    Raises:
        ArtifactCorruptError: it is none; names the field.
    """
    text = data if isinstance(data, str | bytes) else json.dumps(data)
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ArtifactCorruptError(f"not {what}: {place}: {first['msg']}", where=where, fix=fix) from error
