"""A decoder with its past in ONNX Runtime: what is kept of the tokens stays where the runtime has it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofx.errors import ConfigError, ExportError
from geofx.export.onnx_runtime import OnnxRunner

PAST, PRESENT = "past_key_values.", "present."


class DecoderSession:
    """(ids of new tokens) -> logits of the last of them, in rows that grow together.

    Rows of unlike length are padded on the left. Keys and values are bound, not copied.

    Args:
        path: an ONNX file with inputs ``input_ids``, ``attention_mask``, maybe ``position_ids`` and
            ``past_key_values.N.key`` and ``.value``, and outputs ``logits`` and ``present.N.key`` and so on.
        threads: threads per operator; 0 leaves the choice to ONNX Runtime.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        ExportError: it cannot load the file, or the file is not of such a decoder.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        self._session = OnnxRunner(path, threads=threads).session
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._past = [name for name in self._inputs if name.startswith(PAST)]
        wanted = {"logits", *(name.replace(PAST, PRESENT, 1) for name in self._past)}
        if (
            not self._past
            or not {"input_ids", "attention_mask"} <= self._inputs.keys()
            or wanted != set(self._outputs)
        ):
            raise ExportError(
                "the file is not of a decoder with its past",
                where=Path(path).name,
                fix="export it with geofx export OUT --onnx PATH --with-past",
            )
        self._known: dict[str, Any] = {}
        self._mask: NDArray[np.int64] = np.zeros((0, 0), np.int64)

    def fresh(self) -> DecoderSession:
        """One that has read nothing, of the same loaded file: texts of both go on side by side."""
        other = copy.copy(self)
        other._known, other._mask = {}, np.zeros((0, 0), np.int64)
        return other

    @property
    def tokens(self) -> int:
        """Tokens of a row that were read, padding included."""
        return int(self._mask.shape[1])

    def start(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Forget what was read and read prompts (rows, tokens); logits (rows, vocabulary) of what follows.

        Raises:
            ConfigError: ids or mask are not of such shapes, or a row does not end with a token.
        """
        mask = np.ones_like(ids) if mask is None else mask
        if ids.ndim != 2 or not ids.size or mask.shape != ids.shape or not mask[:, -1].all():
            what = f"prompts of shape {ids.shape} with a mask of {mask.shape}"
            raise ConfigError(what, fix="give (rows, tokens) of both, padded on the left")
        self._mask = mask[:, :0].astype(np.int64)
        self._known = {name: self._nothing(name, len(ids)) for name in self._past}
        return self._read(ids, mask)

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read one more token of each row, (rows,); logits (rows, vocabulary) of what follows.

        Raises:
            ConfigError: nothing was started, or other rows than these.
        """
        if not self.tokens or ids.shape != (len(self._mask),):
            what = f"tokens of shape {ids.shape} to go on with, where {len(self._mask)} rows were started"
            raise ConfigError(what, fix="start with prompts, then give one token of each row, (rows,)")
        return self._read(ids[:, None], np.ones((len(ids), 1), np.int64))

    def _read(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        self._mask = np.concatenate([self._mask, mask.astype(np.int64)], 1)
        positions = positions_of(self._mask, ids.shape[1])
        given = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        binding = self._session.io_binding()
        for name, value in given.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(value, np.int64))
        for name, known in self._known.items():
            binding.bind_ortvalue_input(name, known)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        found = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        self._known = {name: found[name.replace(PAST, PRESENT, 1)] for name in self._past}
        logits: NDArray[np.float32] = found["logits"].numpy()[:, -1].astype(np.float32)
        return logits

    def _nothing(self, name: str, rows: int) -> Any:
        import onnxruntime

        _, heads, _, width = self._inputs[name].shape
        kind = np.float16 if self._inputs[name].type == "tensor(float16)" else np.float32
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((rows, heads, 0, width), kind))


def positions_of(mask: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """Of the last ``tokens`` of each row, counted from its first that is not masked."""
    positions: NDArray[np.int64] = np.maximum(mask.cumsum(1) - 1, 0)[:, mask.shape[1] - tokens :]
    return positions


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask, (rows, longest)."""
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = row
        mask[place, longest - len(row) :] = 1
    return ids, mask
