"""What the folder of an exported decoder says of it: its file, its vocabulary, how much it reads."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from geofx.errors import ArtifactCorruptError, ArtifactError, ConfigError
from geofx.export.genai import FILE
from geofx.export.onnx_runtime import require_onnx
from geofx.strict_json import loads


@dataclass(frozen=True)
class ExportedDecoder:
    """What ``geofx export OUT --onnx FOLDER/model.onnx --with-past`` wrote.

    Attributes:
        file: the ONNX file.
        ends: ids of tokens that end a text.
        longest: tokens that it reads, prompt and text together.
        vocabulary: ids are below it.
    """

    file: Path
    ends: frozenset[int]
    longest: int
    vocabulary: int

    @classmethod
    def of(cls, folder: str | Path) -> ExportedDecoder:
        """What ``folder`` holds; nothing is loaded.

        Raises:
            ArtifactError: it is not the folder of such an export, or is damaged.
        """
        place = Path(folder).expanduser()
        if not (place / FILE).is_file():
            fix = "make it with geofx export OUT --onnx FOLDER/model.onnx --with-past"
            raise ArtifactError("not the folder of an exported decoder", where=place.name, fix=fix)
        try:
            settings = loads((place / FILE).read_bytes(), FILE)["model"]
            name, ends = settings["decoder"]["filename"], settings.get("eos_token_id")
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no file beside it")
            several = ends if isinstance(ends, list) else [] if ends is None else [ends]
            longest, vocabulary = int(settings["context_length"]), int(settings["vocab_size"])
            return cls(place / name, frozenset(several), longest, vocabulary)
        except (KeyError, TypeError, ValueError) as error:
            what = f"it says nothing of the decoder: {error}"
            raise ArtifactCorruptError(what, where=FILE, fix="export it again") from error

    @property
    def size_bytes(self) -> int:
        """Of the ONNX file and the data files that it names.

        Raises:
            MissingDependencyError: onnx is not installed.
        """
        require_onnx()
        import onnx

        graph = onnx.load(str(self.file), load_external_data=False).graph
        tensors = [*graph.initializer, *(part.t for node in graph.node for part in node.attribute)]
        data = {
            entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"
        }
        folder = self.file.resolve().parent
        return sum(path.stat().st_size for path in (self.file, *(folder / name for name in data)))

    def require_room(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raises ConfigError where these are more than the decoder reads."""
        require_room(self.longest, prompt_tokens, new_tokens)

    def rows_of(self, prompts: Iterable[Iterable[int]]) -> list[list[int]]:
        """``prompts`` as lists of ids.

        Raises:
            ConfigError: one does not consist of ids of the vocabulary.
        """
        rows = []
        for place, prompt in enumerate(prompts):
            where = f"prompt {place}"
            try:
                ids = [operator.index(token) for token in prompt]
            except TypeError as error:
                what = f"no token ids: {error}"
                raise ConfigError(what, where=where, fix="give a list of ids for each prompt") from error
            strange = next((token for token in ids if not 0 <= token < self.vocabulary), None)
            if strange is not None:
                what = f"token id {strange} is outside the model's vocabulary of {self.vocabulary}"
                raise ConfigError(what, where=where, fix="use the tokenizer that belongs to the model")
            rows.append(ids)
        return rows


def require_room(longest: int, prompt_tokens: int, new_tokens: int) -> None:
    """Raises ConfigError where prompt and text are more than the ``longest`` that a decoder reads."""
    if prompt_tokens + new_tokens > longest:
        what = f"{prompt_tokens} tokens of a prompt and {new_tokens} to write"
        raise ConfigError(what, fix=f"give {longest} together at most")
