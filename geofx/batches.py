"""Calibration and held-out data as a list of batches: inputs by the name of forward's arguments."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from geofx.digest import digest
from geofx.errors import CalibrationError
from geofx.program import Program

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

aten = torch.ops.aten
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.alias.default,
    aten.clone.default,
    aten.to.dtype,
    aten._to_copy.default,
)

HOLDOUT_RATIO = 0.125
"""Share of the calibration batches kept for verification when no held-out data is given."""


def collect(data: Any, names: Sequence[str], what: str = "calibration data") -> list[Batch]:
    """Batches from a tensor, a DataLoader, a generator or any iterable of tensors, tuples or dicts.

    ``names`` are forward's arguments, which tensors and tuples are matched to in order.

    Raises:
        CalibrationError: nothing usable comes out; an error inside the source names the sample's index.
    """
    if isinstance(data, (Tensor, Mapping)):
        data = [data]
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise CalibrationError(
            f"{what} of type {type(data).__name__} cannot be read",
            fix="pass batches, token ids, or text with a tokenizer",
        )
    batches: list[Batch] = []
    iterator = iter(data)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            break
        except Exception as error:
            raise CalibrationError(f"{what} failed: {error}", where=f"batch {len(batches)}") from error
        batches.append(_as_batch(item, names, f"{what}, batch {len(batches)}"))
    batches = [batch for batch in batches if _rows(batch) > 0]
    if not batches:
        raise CalibrationError(f"{what} is empty", fix="pass at least one batch, or mode='data_free'")
    return batches


def split(batches: list[Batch], ratio: float = HOLDOUT_RATIO) -> tuple[list[Batch], list[Batch]]:
    """The last ``ratio`` of the batches apart, at least one; both parts the same where there is only one."""
    if len(batches) == 1:
        return batches, batches
    kept = max(1, round(len(batches) * ratio))
    return batches[:-kept], batches[-kept:]


def spread(batches: list[Batch], ratio: float = HOLDOUT_RATIO) -> tuple[list[Batch], list[Batch]]:
    """As `split`, but those apart are evenly spread: they show what all show, if from the same texts."""
    kept = max(1, round(len(batches) * ratio))
    places = {(2 * turn + 1) * len(batches) // (2 * kept) for turn in range(kept)}
    rest = [batch for place, batch in enumerate(batches) if place not in places]
    return rest, [batches[place] for place in sorted(places)]


def warn_of_shared_rows(trained: Iterable[Batch], held: Iterable[Batch]) -> None:
    """Say how many rows to measure on are among those that the factors are made from."""
    shared = rows_in_both(trained, held)
    if shared:
        logger.warning(
            "%d rows to measure on are among those trained or calibrated on: what is measured looks too good",
            shared,
        )


def rows_in_both(one: Iterable[Batch], other: Iterable[Batch]) -> int:
    """How many rows of ``other``, over all its tensors, stand in ``one`` too."""
    asked = list(_row_hashes(other))
    known = set(_row_hashes(one)) if asked else set()
    return sum(row in known for row in asked)


def _row_hashes(batches: Iterable[Batch]) -> Iterator[str]:
    for batch in batches:
        parts = [part for part in batch.values() if isinstance(part, Tensor) and part.dim()]
        yield from (digest(*row) for row in zip(*parts, strict=False))


def inputs_of(program: Program, batch: Batch) -> Batch:
    """What of ``batch`` the traced graph takes, with ids checked against the embedding.

    Raises:
        CalibrationError: a token id lies outside the vocabulary.
    """
    inputs = program.bind((), {name: value for name, value in batch.items() if name in program.input_names})
    for name, rows in vocabularies(program).items():
        ids = inputs[name]
        if ids.numel() and (int(ids.max()) >= rows or int(ids.min()) < 0):
            bad = int(ids.max()) if int(ids.max()) >= rows else int(ids.min())
            raise CalibrationError(
                f"id {bad} is outside the vocabulary of {rows}",
                where=f"input {name!r}",
                fix="use the model's own tokenizer",
            )
    return inputs


@contextmanager
def of_the_data(where: str) -> Iterator[None]:
    """What a model raises on a batch, of another shape than it was traced with, is an error of the data.

    Raises:
        CalibrationError: names the batch.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        what = f"the model cannot run on this batch: {(str(error).splitlines() or [''])[0]}"
        raise CalibrationError(what, where=where, fix="pass inputs like those it was traced with") from error


def longest_sequence(config: Mapping[str, Any] | None) -> int | None:
    """The longest sequence that a model's configuration allows; None where it does not say."""
    known = config or {}
    value = known.get("max_position_embeddings") or known.get("n_positions")
    return int(value) if isinstance(value, int) and value > 0 else None


def token_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """The (batch, sequence) mask of tokens that are not padding, or None where there is no padding."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


def select_rows(batch: Batch, rows: Tensor) -> Batch:
    """The rows of every tensor with a batch dim where ``rows`` is true."""
    count = rows.numel()
    return {
        name: value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value
        for name, value in batch.items()
    }


def _as_batch(item: Any, names: Sequence[str], where: str) -> Batch:
    if isinstance(item, Tensor):
        item = (item,)
    if isinstance(item, Mapping):
        return {str(name): value for name, value in item.items() if value is not None}
    if not isinstance(item, (tuple, list)) or not item or not isinstance(item[0], Tensor):
        raise CalibrationError(
            f"a batch of type {type(item).__name__}", where=where, fix="yield tensors, tuples or dicts"
        )
    if len(item) > len(names):
        raise CalibrationError(
            f"{len(item)} tensors for forward({', '.join(names)})",
            where=where,
            fix="yield dicts, targets under 'labels'",
        )
    return dict(zip(names, item, strict=False))


def _rows(batch: Batch) -> int:
    sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    return (
        min(sizes, default=0)
        if not any(v.numel() == 0 for v in batch.values() if isinstance(v, Tensor))
        else 0
    )


def vocabularies(program: Program) -> dict[str, int]:
    """Input name -> rows of the table that it is looked up in, reshapes and casts between seen through."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    names = dict(zip(placeholders, program.input_names, strict=True))
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.target is aten.embedding.default and node.args[0].op == "get_attr":
            name = names.get(_behind_views(node.args[1]))
            if name is not None:
                found[name] = program.weight(str(node.args[0].target)).shape[0]
    return found


def _behind_views(node: Any) -> Any:
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]
    return node
