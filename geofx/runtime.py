"""Text that an exported decoder writes in ONNX Runtime, token by token."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geofx.errors import ArtifactCorruptError, ArtifactError, ConfigError
from geofx.export.decoder_session import DecoderSession, left_padded
from geofx.export.genai import FILE
from geofx.sampling import Sampling
from geofx.sources import load_tokenizer
from geofx.strict_json import loads

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

    Args:
        folder: of the export.
        threads: threads per operator; 0 leaves the choice to ONNX Runtime.
        tokenizer: in place of the folder's.

    Attributes:
        speed: of the last call, once its last token was taken.

    Raises:
        ArtifactError: it is not the folder of such an export.
        MissingDependencyError: ONNX Runtime or transformers is not installed.
    """

    def __init__(self, folder: str | Path, *, threads: int = 0, tokenizer: Any = None) -> None:
        place = Path(folder).expanduser()
        if not (place / FILE).is_file():
            fix = "make it with geofx export OUT --onnx FOLDER/model.onnx --with-past"
            raise ArtifactError("not the folder of an exported decoder", where=place.name, fix=fix)
        self.tokenizer: Any = load_tokenizer(place) if tokenizer is None else tokenizer
        self.speed: Speed | None = None
        try:
            settings = loads((place / FILE).read_bytes(), FILE)["model"]
            name = settings["decoder"]["filename"]
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no file beside it")
            self.file = place / name
            self.session = DecoderSession(self.file, threads=threads)
            ends = settings.get("eos_token_id")
            self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
            self.longest, self.vocabulary = int(settings["context_length"]), int(settings["vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            fix = "export it again"
            raise ArtifactCorruptError(
                f"it says nothing of the decoder: {error}", where=FILE, fix=fix
            ) from error

    def stream(
        self, prompt: str, *, max_new_tokens: int = 128, sampling: Sampling = GREEDY, chat: bool = False
    ) -> Iterator[str]:
        """What follows ``prompt``, piece by piece, until the model ends it or ``max_new_tokens`` are there.

        ``chat`` sets it into the template that the tokenizer has for what a user says.

        Raises:
            ConfigError: there is no tokenizer or no template, or the prompt is empty or too long.
        """
        written: list[int] = []
        shown = ""
        for (token,) in self.tokens([self.ids_of(prompt, chat)], max_new_tokens, sampling):
            written.append(int(token))
            text = self._text(written)
            if text.startswith(shown) and not text.endswith(UNFINISHED):
                yield text[len(shown) :]
                shown = text
        yield self._text(written)[len(shown) :]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        chat: bool = False,
    ) -> list[str]:
        """What follows each of ``prompts``, which are written on together; as `stream`."""
        rows = [self.ids_of(prompt, chat) for prompt in prompts]
        steps = list(self.tokens(rows, max_new_tokens, sampling))
        return [self._text([int(step[row]) for step in steps]) for row in range(len(rows))]

    def tokens(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[NDArray[np.int64]]:
        """One token of each row at a time, (rows,), until all rows have ended; -1 where one has.

        Raises:
            ConfigError: a prompt is empty, or longer than the model reads.
        """
        if not prompts or not all(prompts) or max_new_tokens < 1:
            what = f"prompts of {[len(row) for row in prompts]} tokens, {max_new_tokens} to write"
            raise ConfigError(what, fix="give 1 or more of each")
        longest = max(map(len, prompts))
        self.require_room(longest, 1)
        start = time.perf_counter()
        rows = _Rows([list(row) for row in prompts], self.ends, sampling)
        yield rows.add(self.session.start(*left_padded(prompts)))
        first_s, later = time.perf_counter() - start, 0
        for _ in range(min(max_new_tokens, self.longest - longest) - 1):
            if rows.ended.all():
                break
            later += int((~rows.ended).sum())
            yield rows.add(self.session.step(rows.last))
        later_s = time.perf_counter() - start - first_s
        self.speed = Speed(sum(map(len, prompts)), first_s, later, later_s)

    def require_room(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raises ConfigError where these are more than the model reads."""
        if prompt_tokens + new_tokens > self.longest:
            what = f"{prompt_tokens} tokens of a prompt and {new_tokens} to write"
            raise ConfigError(what, fix=f"give {self.longest} together at most")

    @property
    def size_bytes(self) -> int:
        """Of the ONNX file and its data."""
        data = self.file.parent.glob(f"{self.file.name}.*.data")
        return sum(path.stat().st_size for path in (self.file, *data))

    def ids_of(self, prompt: str, chat: bool = False) -> list[int]:
        """The tokens of a prompt.

        Raises:
            ConfigError: there is no tokenizer, or it has no template for what a user says.
        """
        if self.tokenizer is None:
            raise ConfigError("no tokenizer lies beside the export", fix="pass tokenizer=")
        if not chat:
            return list(self.tokenizer(prompt)["input_ids"])
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("the tokenizer has no chat template", fix="leave chat out")
        said = [{"role": "user", "content": prompt}]
        made = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(made, add_special_tokens=False)["input_ids"])

    def _text(self, ids: Sequence[int]) -> str:
        known = [token for token in ids if token >= 0]
        return str(self.tokenizer.decode(known, skip_special_tokens=True))


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
