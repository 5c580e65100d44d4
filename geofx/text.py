"""Text as batches of token windows, each beginning and ending as the tokenizer begins and ends a text."""

from __future__ import annotations

import codecs
import importlib
import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from geofx.batches import collect
from geofx.errors import CalibrationError, ConfigError

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Texts = str | Path | Iterable[str]

WINDOW_TOKENS = 512
"""Length of the windows that text is cut into."""

READ_BYTES = 1 << 20
PLACE_CHARACTERS = 32
"""How many, per token of a window, are read at a place of a corpus."""
CONTINUATION = bytes(range(0x80, 0xC0))
"""What a character of UTF-8 goes on with after its first byte."""
WORD_CHARACTERS = 64
"""Within so many a place goes on to where a word begins."""
PIECE_CHARACTERS = 1 << 16
"""A corpus is tokenized in pieces of about this length, so that a file of any size can be streamed."""


@dataclass(frozen=True)
class Specials:
    """The tokens that a tokenizer sets before and after a text, such as BOS, or [CLS] and [SEP]."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Specials:
        """Found by tokenizing a sample with and without them."""
        whole = list(tokenizer("a")["input_ids"])
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return cls(tuple(whole[:start]), tuple(whole[start + len(bare) :]))
        logger.warning("cannot tell how the tokenizer begins a text; windows begin without special tokens")
        return cls((), ())

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.prefix) + len(self.suffix)

    def wrap(self, ids: list[int]) -> list[int]:
        """``ids`` as a text of their own."""
        return [*self.prefix, *ids, *self.suffix]


class Windows(Iterator[Batch]):
    """Batches of ``input_ids`` and ``attention_mask``, both (batch, longest) int64, padded on the right.

    Attributes:
        dropped: reasons -> texts left out so far.
        tokens: unmasked tokens given so far.
    """

    def __init__(self, rows: Iterator[list[int]], batch_size: int, pad: int, dropped: Counter[str]) -> None:
        self.dropped, self.tokens = dropped, 0
        self._rows, self._batch_size, self._pad = rows, batch_size, pad

    def __next__(self) -> Batch:
        rows = list(islice(self._rows, self._batch_size))
        if not rows and self.tokens == 0:
            raise CalibrationError(
                "no text is left to calibrate on",
                where=", ".join(f"{count} {reason}" for reason, count in self.dropped.items()),
                fix="give texts of at least 2 tokens; pass pathlib.Path(...) if you meant a file",
            )
        if not rows:
            if self.dropped:
                logger.warning("texts left out: %s", dict(self.dropped))
            raise StopIteration
        self.tokens += sum(map(len, rows))
        return _batch(rows, self._pad)


def windows(
    texts: Texts,
    tokenizer: Any,
    *,
    length: int = 512,
    batch_size: int = 4,
    limit_tokens: int | None = None,
    max_positions: int | None = None,
    vocabulary: int | None = None,
) -> Windows:
    """Windows of at most ``length`` tokens, special ones included.

    A string or a file is one corpus: it is cut into whole windows, the remainder left out unless it is
    all there is. An iterable of strings is so many texts: each begins a window of its own, a long one
    goes on in further windows, short ones are padded and masked.

    Args:
        texts: a corpus, the path of a UTF-8 file, or separate texts.
        tokenizer: a Hugging Face tokenizer, or anything that is called like one.
        limit_tokens: the most that are given; the first window always is. A corpus that holds clearly more
            gives windows from evenly spread places, and is read there only; of separate texts come the first.
        max_positions: what the model can take, where less than ``length``.
        vocabulary: rows of the model's embedding; an id beyond them is an error here, not a crash there.

    Raises:
        CalibrationError: nothing left, not UTF-8 (with the byte offset), no such file, id out of range.
        ConfigError: ``length`` leaves no room beside the special tokens.
    """
    specials = Specials.of(tokenizer)
    room = _window_length(length, tokenizer, max_positions) - specials.count
    if room < 2:
        raise ConfigError(f"windows of {length} tokens", where=f"{specials}", fix="use a greater length")
    if isinstance(texts, Path):
        require_file(texts)
    dropped: Counter[str] = Counter()
    bodies: Iterable[list[int]]
    if isinstance(texts, str | Path):
        bodies = _spread(texts, tokenizer, room, (limit_tokens or 0) // (room + specials.count))
        bodies = bodies or _cut_corpus(_pieces(texts), tokenizer, room)
    else:
        bodies = _cut_texts(texts, tokenizer, room, dropped)
    rows = _limited((_checked(specials.wrap(ids), vocabulary) for ids in bodies), limit_tokens)
    pad = getattr(tokenizer, "pad_token_id", None)
    return Windows(rows, batch_size, 0 if pad is None else int(pad), dropped)


def read_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces; without BOM and NUL, every line end a newline.

    Raises:
        CalibrationError: a byte that is not UTF-8, with its offset, or a file that cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    with _reading(path) as file:
        for block in chain(iter(lambda: file.read(READ_BYTES), b""), [b""]):
            offset += len(block)
            with _named_bytes(path, offset, from_end=True):
                text = decoder.decode(block, final=not block)
            yield _clean(newlines.decode(text, final=not block))


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CalibrationError(
            f"cannot read the text: {error.strerror}", where=path.name, fix="check the file and its rights"
        ) from error


@contextmanager
def _named_bytes(path: Path, offset: int, *, from_end: bool = False) -> Iterator[None]:
    """Says which byte of the file is not UTF-8; what is decoded begins at ``offset``, or ends there."""
    try:
        yield
    except UnicodeDecodeError as error:
        place = (offset - len(error.object) if from_end else offset) + error.start
        raise CalibrationError(
            f"byte {place} is not UTF-8", where=path.name, fix="give a text file, converted to UTF-8"
        ) from error


def _clean(text: str) -> str:
    """Without BOM and NUL, every line end a newline."""
    return text.replace("\ufeff", "").replace("\0", "").replace("\r\n", "\n").replace("\r", "\n")


def python_text() -> tuple[str, str]:
    """English that every Python has, in two parts: topics of its manual, alternating, none in both.

    A paragraph that stands in topics of both parts is left out of the second.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    ordered = [topics[name] for name in sorted(topics)]
    first, second = "\n\n".join(ordered[::2]), "\n\n".join(ordered[1::2])
    known = set(first.split("\n\n"))
    return first, "\n\n".join(part for part in second.split("\n\n") if part not in known)


def _window_length(length: int, tokenizer: Any, max_positions: int | None) -> int:
    limits = [getattr(tokenizer, "model_max_length", None), max_positions]
    shortest = min([length, *(int(limit) for limit in limits if limit)])
    if shortest < length:
        logger.warning("windows cut from %d to %d tokens, the most that the model takes", length, shortest)
    return shortest


def require_file(path: Path) -> None:
    """Raises CalibrationError unless ``path`` is a file."""
    if not path.is_file():
        fix = "give the path of a text file" if path.exists() else "check the path"
        raise CalibrationError("no such text file", where=path.name, fix=fix)


def _spread(texts: str | Path, tokenizer: Any, room: int, count: int) -> list[list[int]]:
    """``count`` whole windows from evenly spread places; none where the corpus may not hold so many.

    The first texts of a corpus show only their own topics.
    """
    if count < 2:
        return []
    total = texts.stat().st_size if isinstance(texts, Path) else len(texts)
    apart = total // count
    found = []
    for start in range(0, count * apart, max(1, apart)):
        place = _place(texts, start, min(apart, room * PLACE_CHARACTERS))
        ids = _ids(tokenizer, place)[:room]
        if len(ids) < room:
            logger.info("windows follow one another: %d places of the text hold less than one", count)
            return []
        found.append(ids)
    return found


def _place(texts: str | Path, start: int, size: int) -> str:
    """What stands from ``start`` on, from the next word on where one is near; places in a file are bytes."""
    if isinstance(texts, str):
        place = _clean(texts[start : start + size])
    else:
        with _reading(texts) as file:
            file.seek(start)
            block = file.read(size)
        inside = len(block) - len(block.lstrip(CONTINUATION)) if start else 0
        with _named_bytes(texts, start + inside):
            place = _clean(codecs.getincrementaldecoder("utf-8")().decode(block[inside:]))
    return place[place.find(" ", 0, WORD_CHARACTERS) + 1 :] if start else place


def _blocks(texts: str | Path) -> Iterator[str]:
    """The corpus in parts of a size, clean."""
    if isinstance(texts, Path):
        return read_text(texts)
    text = _clean(texts)
    return (text[start : start + READ_BYTES] for start in range(0, len(text), READ_BYTES))


def _pieces(texts: str | Path) -> Iterator[str]:
    """The corpus in pieces that end with a line, where lines are not endless."""
    rest = ""
    for block in _blocks(texts):
        rest += block
        while len(rest) >= PIECE_CHARACTERS:
            end = rest.rfind("\n", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS
            yield rest[:end]
            rest = rest[end:]
    yield rest


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _cut_corpus(pieces: Iterable[str], tokenizer: Any, room: int) -> Iterator[list[int]]:
    ids: list[int] = []
    whole = False
    for piece in pieces:
        if not piece.strip():
            continue
        ids += _ids(tokenizer, piece)
        while len(ids) >= room:
            whole = True
            yield ids[:room]
            ids = ids[room:]
    if not whole and len(ids) >= 2:
        yield ids


def _cut_texts(texts: Iterable[str], tokenizer: Any, room: int, dropped: Counter[str]) -> Iterator[list[int]]:
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise CalibrationError(f"text {position} is {type(text).__name__}, not a string")
        ids = _ids(tokenizer, text) if text.strip() else []
        reason = _why_dropped(text, ids, special)
        if reason:
            dropped[reason] += 1
            continue
        for start in range(0, len(ids), room):
            if len(ids) - start >= 2:
                yield ids[start : start + room]


def _why_dropped(text: str, ids: list[int], special: set[int]) -> str:
    if not text.strip():
        return "empty"
    if len(ids) < 2:
        return "shorter than 2 tokens"
    return "special tokens only" if special.issuperset(ids) else ""


def _checked(ids: list[int], vocabulary: int | None) -> list[int]:
    if vocabulary is not None and max(ids) >= vocabulary:
        raise CalibrationError(
            f"token id {max(ids)} is outside the model's vocabulary of {vocabulary}",
            fix="use the tokenizer that belongs to the model",
        )
    return ids


def _limited(rows: Iterable[list[int]], limit: int | None) -> Iterator[list[int]]:
    total = 0
    for row in rows:
        if limit is not None and total and total + len(row) > limit:
            return
        total += len(row)
        yield row


def _batch(rows: list[list[int]], pad: int) -> Batch:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for position, row in enumerate(rows):
        ids[position, : len(row)] = torch.tensor(row)
        mask[position, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def batches_of(
    data: Any, tokenizer: Any, names: Sequence[str], what: str, max_positions: int | None = None
) -> list[Batch]:
    """Batches of what a user passes as data: none, text with a tokenizer, or what `collect` reads.

    ``max_positions`` is what the model can take; windows of text are no longer than that.

    Raises:
        CalibrationError: nothing usable comes out.
        ConfigError: it is text, and there is no tokenizer.
    """
    if data is None:
        return []
    texts = isinstance(data, (str, Path)) or (
        isinstance(data, (list, tuple)) and data and isinstance(data[0], str)
    )
    if not texts:
        return collect(data, names, what)
    if tokenizer is None:
        raise ConfigError(f"{what} is text", fix="pass tokenizer=")
    cut = windows(data, tokenizer, length=WINDOW_TOKENS, batch_size=2, max_positions=max_positions)
    return list(cut)
