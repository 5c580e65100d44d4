"""Whether a GGUF file is what its header says: every count, length and offset lies inside the file."""

from __future__ import annotations

import importlib
import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from geofx.errors import ArtifactCorruptError, MissingDependencyError

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type number."""
STRING, ARRAY, UINT32 = 8, 9, 4
MAX_DIMS = 4
SMALLEST_PAIR, SMALLEST_TENSOR = 13, 24
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32


def require_sound_gguf(path: Path) -> str:
    """The type that most weights are stored in, such as ``Q4_1``, by a walk over the header.

    No weight is read; time and memory are bounded by the header's length.

    Raises:
        ArtifactCorruptError: not GGUF, truncated, or a count, length or offset that cannot be.
        MissingDependencyError: the package gguf is not installed.
    """
    gguf = _gguf()
    sizes = {int(kind): block for kind, block in gguf.GGML_QUANT_SIZES.items()}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            elements = _check(_Cursor(data, len(data)), sizes)
    except (ValueError, struct.error) as error:
        what = f"a damaged or truncated GGUF file: {error}"
        raise ArtifactCorruptError(what, where=path.name, fix="fetch the file anew") from error
    return str(gguf.GGMLQuantizationType(max(elements, key=elements.__getitem__)).name)


@dataclass
class _Cursor:
    """A position in the file that never leaves it."""

    data: mmap.mmap
    size: int
    position: int = 0

    def skip(self, count: int) -> bytes:
        """Go ``count`` bytes on; at most the first 64 of them are returned."""
        if count > self.size - self.position:
            raise ValueError(f"{count} bytes at {self.position} go past the end, {self.size}")
        start, self.position = self.position, self.position + count
        return self.data[start : start + min(count, 64)]

    def number(self, form: str) -> int:
        """One unsigned integer, ``"I"`` or ``"Q"``."""
        return int(struct.unpack(f"<{form}", self.skip(struct.calcsize(form)))[0])

    def count(self, smallest: int) -> int:
        """A count of items of at least ``smallest`` bytes each."""
        value = self.number("Q")
        if value * smallest > self.size - self.position:
            raise ValueError(f"{value} items at {self.position} go past the end, {self.size}")
        return value

    def text(self) -> bytes:
        """A string with its length before it."""
        return self.skip(self.number("Q"))


def _check(cursor: _Cursor, sizes: dict[int, tuple[int, int]]) -> Counter[int]:
    """Type number -> elements of that type."""
    if cursor.skip(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version} is not known")
    tensors, pairs = cursor.count(SMALLEST_TENSOR), cursor.count(SMALLEST_PAIR)
    alignment = _alignment(cursor, pairs)
    if tensors == 0:
        raise ValueError("it holds no tensors")
    elements: Counter[int] = Counter()
    end = max(_tensor_end(cursor, sizes, elements) for _ in range(tensors))
    start = -(-cursor.position // alignment) * alignment
    if start + end > cursor.size:
        raise ValueError(f"weights end at {start + end}, the file at {cursor.size}")
    return elements


def _alignment(cursor: _Cursor, pairs: int) -> int:
    """Walk over all settings; the one that says where weights begin is returned."""
    alignment = DEFAULT_ALIGNMENT
    for _ in range(pairs):
        key, kind, value = cursor.text(), cursor.number("I"), cursor.position
        _skip_value(cursor, kind)
        if key == b"general.alignment":
            alignment = struct.unpack_from("<I", cursor.data, value)[0] if kind == UINT32 else 0
    if alignment == 0 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment} is not a power of two")
    return alignment


def _skip_value(cursor: _Cursor, kind: int) -> None:
    if kind == STRING:
        cursor.text()
    elif kind == ARRAY:
        _skip_array(cursor)
    elif kind in SCALARS:
        cursor.skip(SCALARS[kind])
    else:
        raise ValueError(f"unknown type {kind} at {cursor.position}")


def _skip_array(cursor: _Cursor) -> None:
    kind = cursor.number("I")
    if kind == STRING:
        for _ in range(cursor.count(8)):
            cursor.text()
    elif kind in SCALARS:
        cursor.skip(cursor.count(SCALARS[kind]) * SCALARS[kind])
    else:
        raise ValueError(f"an array of type {kind} at {cursor.position}")


def _tensor_end(cursor: _Cursor, sizes: dict[int, tuple[int, int]], counted: Counter[int]) -> int:
    """Offset of the first byte behind a tensor, from where the weights begin; its elements are counted."""
    name, rank = cursor.text(), cursor.number("I")
    if not 1 <= rank <= MAX_DIMS:
        raise ValueError(f"a tensor of {rank} dimensions")
    elements = math.prod(cursor.number("Q") for _ in range(rank))
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in sizes or elements % sizes[kind][0]:
        raise ValueError(f"tensor {name!r} of {elements} elements has no type {kind}")
    counted[kind] += elements
    return offset + elements // sizes[kind][0] * sizes[kind][1]


def _gguf() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingDependencyError("gguf is not installed", fix='pip install "geofx[hf]"') from error
