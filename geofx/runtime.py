"""Text that an exported decoder writes in ONNX Runtime, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofx.errors import ConfigError
from geofx.export.decoder_session import DecoderSession, left_padded
from geofx.exported_decoder import ExportedDecoder
from geofx.sampling import Sampling
from geofx.sources import load_tokenizer

GREEDY = Sampling()
UNFINISHED = "\ufffd"
"""What a tokenizer gives for the first bytes of a character."""


@dataclass(frozen=True)
class Speed:
    """What one call took.

    Attributes:
        prompt_tokens: read before anything was written, in all rows.
        first_s: seconds until the first token of each row.
        later_tokens: written after it, in all rows.
        later_s: seconds of these.
    """

    prompt_tokens: int
    first_s: float
    later_tokens: int
    later_s: float

    @property
    def prefill_per_s(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.first_s

    @property
    def decode_per_s(self) -> float | None:
        """Tokens per second once the prompt is read; None where there was one only."""
        return self.later_tokens / self.later_s if self.later_tokens else None


class Generator:
    """The decoder that ``geofx export OUT --onnx FOLDER/model.onnx --with-past`` wrote, and its tokenizer.

    Texts may be written side by side: each call of `stream` or `tokens` keeps what it has read to itself.

    Args:
        folder: of the export.
        threads: threads per operator; 0 leaves the choice to ONNX Runtime.
        tokenizer: in place of the folder's.

    Attributes:
        decoder: what the folder says of it.
        session: the loaded file.
        speed: of the last call that has come to its end.

    Raises:
        ArtifactError: it is not the folder of such an export.
        MissingDependencyError: ONNX Runtime or transformers is not installed.
    """

    def __init__(self, folder: str | Path, *, threads: int = 0, tokenizer: Any = None) -> None:
        place = Path(folder).expanduser()
        self.decoder = ExportedDecoder.of(place)
        self.tokenizer: Any = load_tokenizer(place) if tokenizer is None else tokenizer
        self.session = DecoderSession(self.decoder.file, threads=threads)
        self.speed: Speed | None = None

    @property
    def size_bytes(self) -> int:
        """Of the ONNX file and its data."""
        return self.decoder.size_bytes

    def stream(
        self, prompt: str, *, max_new_tokens: int = 128, sampling: Sampling = GREEDY, chat: bool = False
    ) -> Iterator[str]:
        """What follows ``prompt``, piece by piece, until the model ends it or ``max_new_tokens`` are there.

        ``chat`` sets it into the template that the tokenizer has for what a user says.

        Raises:
            ConfigError: there is no tokenizer or no template, or the prompt is no text, empty or too long.
            NumericsError: the decoder gives no finite logits.
        """
        steps = self.tokens([self.ids_of(prompt, chat)], max_new_tokens, sampling)
        return text_pieces(self._decode, (int(token) for (token,) in steps))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        chat: bool = False,
    ) -> list[str]:
        """What follows each of ``prompts``, which are written on together; as `stream`."""
        if isinstance(prompts, str):
            raise ConfigError("prompts are one text", where="generate", fix="give a list of texts")
        rows = [self.ids_of(prompt, chat) for prompt in prompts]
        steps = list(self.tokens(rows, max_new_tokens, sampling))
        return ["".join(text_pieces(self._decode, column)) for column in np.stack(steps, 1).tolist()]

    def tokens(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[NDArray[np.int64]]:
        """One token of each row at a time, (rows,), until all rows have ended; -1 where one has.

        Raises:
            ConfigError: a prompt is empty, not of ids of the vocabulary, or longer than the model reads.
            NumericsError: the decoder gives no finite logits.
        """
        given = self.decoder.rows_of(prompts)
        if not given or not all(given) or max_new_tokens < 1:
            what = f"prompts of {[len(row) for row in given]} tokens, {max_new_tokens} to write"
            raise ConfigError(what, fix="give 1 or more of each")
        longest, prompt_tokens = max(map(len, given)), sum(map(len, given))
        self.decoder.require_room(longest, 1)
        session, rows = self.session.fresh(), _Rows(given, self.decoder.ends, sampling)
        start = time.perf_counter()
        token = rows.add(session.start(*left_padded(given)))
        first_s, later, later_s = time.perf_counter() - start, 0, 0.0
        yield token
        for _ in range(min(max_new_tokens, self.decoder.longest - longest) - 1):
            if rows.ended.all():
                break
            later += int((~rows.ended).sum())
            start = time.perf_counter()
            token = rows.add(session.step(rows.last))
            later_s += time.perf_counter() - start
            yield token
        self.speed = Speed(prompt_tokens, first_s, later, later_s)

    def ids_of(self, prompt: str, chat: bool = False) -> list[int]:
        """The tokens of a prompt.

        Raises:
            ConfigError: it is no text, there is no tokenizer, or its template for what a user says is
                missing or fails.
        """
        if self.tokenizer is None:
            raise ConfigError("no tokenizer lies beside the export", fix="pass tokenizer=")
        _require_text(prompt)
        if not chat:
            return list(self.tokenizer(prompt)["input_ids"])
        return list(self.tokenizer(self._in_template(prompt), add_special_tokens=False)["input_ids"])

    def _in_template(self, prompt: str) -> str:
        """What the tokenizer's template makes of ``prompt``, said by a user."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("the tokenizer has no chat template", fix="leave chat out")
        said = [{"role": "user", "content": prompt}]
        try:
            return str(self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is a program that came with the model
            what = f"the chat template raised {type(error).__name__}: {str(error)[:300]}"
            raise ConfigError(what, where="tokenizer", fix="leave chat out, or mend the template") from error

    def _decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; spaces are not cleaned up, which would change text that has been given."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def text_pieces(decode: Callable[[Sequence[int]], str], tokens: Iterable[int]) -> Iterator[str]:
    """The text of ``tokens`` in pieces that later tokens do not change; none is empty.

    A piece is what its tokens add to those of the piece before it, on which spaces depend, and bytes. It
    ends with a whole character, unless the tokens are at their end. Ids below 0 stand for nothing.
    """
    ids, known = list[int](), 0
    for token in tokens:
        if token < 0:
            continue
        ids.append(token)
        if not decode(ids).endswith(UNFINISHED) and (piece := _added(decode, ids, known)):
            ids, known = ids[known:], len(ids) - known
            yield piece
    if rest := _added(decode, ids, known):
        yield rest


def _added(decode: Callable[[Sequence[int]], str], ids: Sequence[int], known: int) -> str:
    """What is text of ``ids`` beyond the first ``known`` of them."""
    before, text = decode(ids[:known]), decode(ids)
    return text[len(before) :] if text.startswith(before) else decode(ids[known:])


def _require_text(prompt: str) -> None:
    """Raises ConfigError where it is none that UTF-8 can hold."""
    if not isinstance(prompt, str):
        raise ConfigError(f"a prompt is {type(prompt).__name__}", where="prompt", fix="give text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        what = f"character {error.start} is a lone surrogate"
        raise ConfigError(what, where="prompt", fix="give text that UTF-8 can hold") from error


class _Rows:
    """What is written so far, row by row."""

    def __init__(self, tokens: list[list[int]], ends: Iterable[int], sampling: Sampling) -> None:
        self.tokens, self.ends, self.sampling = tokens, list(ends), sampling
        self.ended = np.zeros(len(tokens), bool)
        self.last = np.zeros(len(tokens), np.int64)
        self._random = np.random.default_rng(sampling.seed)

    def add(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """The next token of each row; -1 where it has ended."""
        self.last = self.sampling.pick(logits, self.tokens, self._random)
        for row, token in zip(self.tokens, self.last, strict=True):
            row.append(int(token))
        self.ended |= np.isin(self.last, self.ends)
        return np.where(self.ended, -1, self.last)
