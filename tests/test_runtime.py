"""Texts that an exported decoder writes: their pieces, their speed, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import tokenizers
import transformers
from exported_tiny import export_tiny
from tiny_models import letters

from geofx.errors import ConfigError, NumericsError
from geofx.export.decoder_session import DecoderSession
from geofx.runtime import Generator, text_pieces
from geofx.sampling import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("decoder"))


BYTES = (*range(0x41, 0x61), *range(0x80, 0xC0), *range(0xE0, 0xF0))
WORDS = [f"▁{letter}" for letter in "abcdefghijkl"]
A, B, S = 115, 116, 127


def bytes_and_words() -> Any:
    """A tokenizer of bytes and words, as those of SentencePiece with byte fallback, for 128 tokens."""
    words = ["</s>", "<s>", "<unk>", *(f"<0x{byte:02X}>" for byte in BYTES), *WORDS, "s"]
    known = {word: place for place, word in enumerate(words)}
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=known, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    parts = tokenizers.decoders
    inner.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    made: Any = transformers.PreTrainedTokenizerFast
    return made(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def decoded(ids: Sequence[int]) -> str:
    return str(bytes_and_words().decode(list(ids), skip_special_tokens=True))


def of_bytes(content: bytes) -> list[int]:
    return [3 + BYTES.index(byte) for byte in content]


def test_a_character_of_several_tokens_is_held_back() -> None:
    ids = [A, B, S, *of_bytes("中二".encode()), 0, B, -1, -1]
    pieces = list(text_pieces(decoded, ids))
    assert pieces == ["a", " b", "s", "中", "二", " b"]
    assert "".join(pieces) == decoded(ids[:-2])


def test_text_that_ends_within_a_character_keeps_what_stands_before() -> None:
    assert list(text_pieces(decoded, of_bytes("A中".encode()[:-1]))) == ["A", "\ufffd\ufffd"]
    assert list(text_pieces(decoded, [*of_bytes(b"A\xe4"), S, B])) == ["A", "\ufffds", " b"]
    assert list(text_pieces(decoded, [0, -1])) == []


@pytest.mark.parametrize("tokenizer", [letters(), bytes_and_words()], ids=["letters", "bytes"])
def test_the_pieces_of_a_stream_are_the_text(folder: Path, tokenizer: Any) -> None:
    generator, counts = Generator(folder, tokenizer=tokenizer), []
    for seed in range(8):
        sampling = Sampling(temperature=2.0, seed=seed)
        pieces = list(generator.stream("AB", max_new_tokens=24, sampling=sampling))
        assert all(pieces)
        assert "".join(pieces) == generator.generate(["AB"], max_new_tokens=24, sampling=sampling)[0]
        counts.append(len(pieces))
    assert max(counts) > 5


def test_spaces_that_a_tokenizer_would_clean_up_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = letters()
    tokenizer.clean_up_tokenization_spaces = True
    written = tokenizer("ab . cd , ef")["input_ids"]
    assert tokenizer.decode(written) == "ab. cd, ef"
    generator = Generator(folder, tokenizer=tokenizer)
    monkeypatch.setattr(generator, "tokens", lambda *_: (np.array([token]) for token in written))
    assert "".join(generator.stream("x")) == generator._decode(written) == "ab . cd , ef"
    assert generator.generate(["x"]) == ["ab . cd , ef"]


def test_texts_are_written_side_by_side(folder: Path) -> None:
    generator = Generator(folder)
    alone = [list(generator.tokens([ids], 12)) for ids in ([5, 9, 30], [70])]
    pairs = zip_longest(*(generator.tokens([ids], 12) for ids in ([5, 9, 30], [70])))
    for found, wanted in zip(zip(*pairs, strict=True), alone, strict=True):
        assert [int(token) for (token,) in found] == [int(token) for (token,) in wanted]


def test_the_time_between_tokens_is_the_callers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def passing(seconds: float, read: Any) -> Any:
        def reading(*given: Any) -> Any:
            now[0] += seconds
            return read(*given)

        return reading

    generator = Generator(folder)
    monkeypatch.setattr("geofx.runtime.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(DecoderSession, "start", passing(3.0, DecoderSession.start))
    monkeypatch.setattr(DecoderSession, "step", passing(0.5, DecoderSession.step))
    count = 0
    for _ in generator.tokens([[5, 9, 30]], 6):
        now[0] += 100.0
        count += 1
    speed = generator.speed
    assert speed is not None
    assert (speed.prompt_tokens, speed.first_s) == (3, 3.0)
    assert (speed.later_tokens, speed.later_s) == (count - 1, 0.5 * (count - 1))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], [5, 128]], r"id 128 is outside the model's vocabulary of 128 \(prompt 1\); use the tokenizer"),
        ([[-1]], r"id -1 is outside.*\(prompt 0\)"),
        ([[1.5]], r"no token ids.*\(prompt 0\); give a list of ids"),
        ([1, 2], r"no token ids.*\(prompt 0\)"),
        ("ab", r"no token ids.*\(prompt 0\)"),
    ],
)
def test_ids_are_of_the_vocabulary(folder: Path, prompts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        next(Generator(folder).tokens(prompts, 4))


def test_prompts_are_texts(folder: Path) -> None:
    generator, several = Generator(folder), cast("Any", ["abc"])
    with pytest.raises(ConfigError, match=r"prompts are one text \(generate\); give a list"):
        generator.generate("abc")
    with pytest.raises(ConfigError, match=r"a prompt is list \(prompt\); give text"):
        generator.stream(several)
    for chat in (False, True):
        with pytest.raises(ConfigError, match=r"character 1 is a lone surrogate \(prompt\); give text"):
            generator.stream("a\ud800", chat=chat)


@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{% if %}", "{{ 1 + 'a' }}"])
def test_a_chat_template_that_fails(folder: Path, template: str) -> None:
    generator = Generator(folder)
    generator.tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"the chat template raised .*\(tokenizer\); leave chat out"):
        generator.generate(["a"], chat=True)


def test_steps_follow_a_start_of_as_many_rows(folder: Path) -> None:
    session = Generator(folder).session
    with pytest.raises(ConfigError, match=r"0 rows were started; start with prompts"):
        session.step(np.array([5]))
    session.start(np.array([[5, 6], [7, 8]]))
    for wrong in (np.array([5]), np.array([[5], [6]])):
        with pytest.raises(ConfigError, match="2 rows were started"):
            session.step(wrong)
    assert session.step(np.array([5, 6])).shape == (2, 128)
    with pytest.raises(ConfigError, match="0 rows were started"):
        session.fresh().step(np.array([5, 6]))


def test_logits_that_are_not_finite_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecoderSession, "start", lambda *_: np.full((1, 128), np.nan, np.float32))
    with pytest.raises(NumericsError, match="logits"):
        Generator(folder).generate(["ab"])


def test_the_size_is_of_the_files_that_the_export_names(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "renamed"
    shutil.copytree(folder, place)
    (place / "model.onnx").rename(place / "model[1].onnx")
    config = place / "genai_config.json"
    config.write_text(config.read_text().replace('"model.onnx"', '"model[1].onnx"'))
    (place / "model[1].onnx.old.data").write_bytes(bytes(10))
    assert json.loads(config.read_text())["model"]["decoder"]["filename"] == "model[1].onnx"
    (data,) = folder.glob("*.data")
    model = onnx.load(place / "model[1].onnx", load_external_data=False)
    assert any(tensor.external_data for tensor in model.graph.initializer)
    wanted = (folder / "model.onnx").stat().st_size + data.stat().st_size
    assert Generator(place).size_bytes == Generator(folder).size_bytes == wanted
