"""Text into windows: tokens, specials, masks, and what is wrong with files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import geofx
from geofx import text as text_module
from geofx.errors import CalibrationError, ConfigError
from geofx.text import Specials, python_text, read_text, windows

CLS, SEP, EOS = 256, 257, 258


class ByteTokenizer:
    """One token per byte; special ids around a text, as asked for."""

    def __init__(
        self, prefix: tuple[int, ...] = (CLS,), suffix: tuple[int, ...] = (SEP,), **settings: Any
    ) -> None:
        self.prefix, self.suffix = prefix, suffix
        self.all_special_ids = [CLS, SEP, EOS]
        self.pad_token_id: int | None = settings.get("pad")
        self.model_max_length: int = settings.get("limit", 10**30)

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        parts = text.split("<eos>")
        ids = [token for part in parts for token in (*part.encode(), EOS)][:-1]
        return {"input_ids": [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids}


def rows(batches: Any) -> list[list[int]]:
    """Unmasked tokens of every row of every batch."""
    found = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape
        assert ids.dtype == mask.dtype == torch.int64
        found += [ids[row][mask[row].bool()].tolist() for row in range(len(ids))]
    return found


@pytest.mark.parametrize("prefix", [(), (CLS,), (CLS, CLS)])
@pytest.mark.parametrize("suffix", [(), (SEP,)])
def test_specials_are_found(prefix: tuple[int, ...], suffix: tuple[int, ...]) -> None:
    assert Specials.of(ByteTokenizer(prefix, suffix)) == Specials(prefix, suffix)


def test_each_window_of_a_corpus_begins_and_ends_as_a_text_does() -> None:
    got = rows(windows("abcdefghij", ByteTokenizer(), length=5))
    assert got == [[CLS, *b"abc", SEP], [CLS, *b"def", SEP], [CLS, *b"ghi", SEP]]


def test_a_corpus_shorter_than_a_window_is_one_window() -> None:
    assert rows(windows("abc", ByteTokenizer(), length=512)) == [[CLS, *b"abc", SEP]]


def test_separate_texts_are_padded_and_masked() -> None:
    (batch,) = windows(["abc", "abcde"], ByteTokenizer(pad=9), length=16)
    assert batch["input_ids"].tolist() == [[CLS, *b"abc", SEP, 9, 9], [CLS, *b"abcde", SEP]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]


def test_row_51_no_pad_token() -> None:
    (batch,) = windows(["ab", "abc"], ByteTokenizer(pad=None), length=16)
    assert batch["input_ids"][0, -1] == 0
    assert batch["attention_mask"][0, -1] == 0


def test_row_51_an_id_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(CalibrationError, match="token id 257 is outside the model's vocabulary of 200"):
        next(windows("abc", ByteTokenizer(), length=5, vocabulary=200))


def test_row_50_padding_does_not_change_the_tokens_given() -> None:
    texts = ["abc", "abcdef", "ab"]
    together = rows(windows(texts, ByteTokenizer(), length=16, batch_size=3))
    assert together == rows(windows(texts, ByteTokenizer(), length=16, batch_size=1))


@pytest.mark.parametrize(
    "texts", [[], "", " \n", iter(()), ["", "a"]], ids=["list", "str", "blank", "iterator", "short"]
)
def test_row_47_nothing_to_calibrate_on(texts: Any) -> None:
    with pytest.raises(CalibrationError, match="no text is left"):
        next(windows(texts, ByteTokenizer(), length=5))


def test_row_49_useless_texts_are_dropped_and_counted() -> None:
    batches = windows(["", "  ", "x", "<eos><eos>", "good"], ByteTokenizer(), length=16)
    assert rows(batches) == [[CLS, *b"good", SEP]]
    assert batches.dropped == {"empty": 2, "shorter than 2 tokens": 1, "special tokens only": 1}
    assert batches.tokens == 6


@pytest.mark.parametrize(("limit", "positions"), [(7, None), (10**30, 7)], ids=["tokenizer", "model"])
def test_row_52_too_long_is_cut_and_said(
    limit: int, positions: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="geofx.text"):
        got = rows(windows(["abcdefg"], ByteTokenizer(limit=limit), length=512, max_positions=positions))
    assert got == [[CLS, *b"abcde", SEP], [CLS, *b"fg", SEP]]
    assert "from 512 to 7 tokens" in caplog.text


def test_no_room_beside_the_specials() -> None:
    with pytest.raises(ConfigError, match="greater length"):
        windows("abc", ByteTokenizer(), length=3)


@pytest.mark.parametrize(("limit", "expected"), [(None, 4), (12, 2), (10, 2), (9, 1), (1, 1)])
def test_limit_tokens(limit: int | None, expected: int) -> None:
    assert len(rows(windows("abcdefghijkl", ByteTokenizer(), length=5, limit_tokens=limit))) == expected


WORDS = " ".join(f"{number:05d}" for number in range(200))


def starts(batches: Any) -> list[int]:
    """Places in `WORDS` that the windows begin at."""
    return [WORDS.index(bytes(row[1:-1]).decode()) for row in rows(batches)]


def test_windows_of_a_large_corpus_are_spread(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text(WORDS)
    for corpus in (WORDS, file):
        found = starts(windows(corpus, ByteTokenizer(), length=14, limit_tokens=60))
        assert found == [0, 300, 600, 900]  # 4 windows, 1,199 characters; each after the next space


def test_places_of_text_without_spaces_begin_at_whole_characters(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("漢字かな" * 100, encoding="utf-8")  # 3 bytes each
    for corpus in (file, file.read_text(encoding="utf-8")):
        found = rows(windows(corpus, ByteTokenizer(), length=14, limit_tokens=28 + 14))
        assert len(found) == 3
        assert all(bytes(row[1:-1]).decode() in "漢字かな" * 3 for row in found)


def test_only_places_of_a_large_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    corpus = bytearray(b"12345 " * 600)  # places of 12 x 32 bytes, 900 apart
    corpus[500] = 0xFF
    file.write_bytes(corpus)
    assert len(rows(windows(file, ByteTokenizer(), length=14, limit_tokens=60))) == 4
    corpus[910] = 0xFF
    file.write_bytes(corpus)
    with pytest.raises(CalibrationError, match="byte 910 is not UTF-8"):
        windows(file, ByteTokenizer(), length=14, limit_tokens=60)


def test_a_place_of_too_few_tokens_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="geofx.text")

    class Coarse(ByteTokenizer):
        def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
            return super().__call__(text.replace("x", ""), **settings)

    corpus = WORDS[:600] + "x" * 600
    assert starts(windows(corpus, Coarse(), length=14, limit_tokens=60)) == [0, 12, 24, 36]
    assert "follow one another" in caplog.text


@pytest.mark.parametrize("limit", [1400, 5000])
def test_windows_of_a_corpus_that_is_not_larger_follow_one_another(limit: int) -> None:
    found = starts(windows(WORDS, ByteTokenizer(), length=14, limit_tokens=limit))
    assert found == list(range(0, 1200 - 12, 12))


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
def test_row_53_bom_nul_and_line_ends(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "READ_BYTES", block)
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffä\r\nb\0c\rd\n".encode())
    assert "".join(read_text(file)) == "ä\nbc\nd\n"


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("data", "offset"), [(b"abcdefg\xffhij", 7), ("äöü".encode() + b"\xc3", 6), (b"\xff\xfea\0", 0)]
)
def test_row_53_not_utf8_names_the_byte(
    tmp_path: Path, data: bytes, offset: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "READ_BYTES", block)
    file = tmp_path / "text.txt"
    file.write_bytes(data)
    with pytest.raises(CalibrationError, match=f"byte {offset} is not UTF-8") as caught:
        list(windows(file, ByteTokenizer(), length=5))
    assert str(tmp_path) not in str(caught.value)  # row 125


def test_row_53_a_file_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "READ_BYTES", 64)
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 64)
    file = tmp_path / "text.txt"
    file.write_bytes(b"some words on a line\n" * 1000 + b"\xff")
    batches = windows(file, ByteTokenizer(), length=10, batch_size=1)
    assert rows([next(batches)]) == [[CLS, *b"some wor", SEP]]  # the bad byte far behind is not read yet


def test_a_file_and_its_text_give_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "READ_BYTES", 7)
    monkeypatch.setattr(text_module, "PIECE_CHARACTERS", 11)
    text = "one two\nthree four five six seven\neight\n"
    file = tmp_path / "text.txt"
    file.write_text(text)
    got = rows(windows(file, ByteTokenizer(), length=6))
    assert got == rows(windows(text, ByteTokenizer(), length=6))
    assert bytes(token for row in got for token in row[1:-1]) == text.encode()[: len(got) * 4]


@pytest.mark.parametrize(
    ("name", "message"), [("missing.txt", "check the path"), (".", "path of a text file")]
)
def test_row_53_no_such_file(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        windows(tmp_path / name, ByteTokenizer())


def test_texts_that_are_not_strings_are_refused() -> None:
    with pytest.raises(CalibrationError, match="text 1 is int"):
        list(windows(["good", 3], ByteTokenizer()))  # type: ignore[list-item]


def test_python_text_has_two_parts_that_share_nothing() -> None:
    calibration, heldout = python_text()
    assert min(len(calibration), len(heldout)) > 100_000
    assert not set(calibration.split("\n\n")) & set(heldout.split("\n\n"))


def test_row_52_text_is_cut_for_models_of_few_positions() -> None:
    tokenizer = ByteTokenizer(prefix=(), suffix=())
    analysis = geofx.analyze(tiny_models.build("gpt2"), "abcdefgh" * 60, tokenizer=tokenizer)
    assert {batch["input_ids"].shape[1] for batch in analysis.holdout} == {64}
