"""Every snippet of the README, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_models
from documented import blocks, commands, require_command

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("out").mkdir()
    names: dict[str, object] = {
        "model": tiny_models.build("qwen3"),
        "batches": [tiny_models.example("qwen3", 4, 16, seed) for seed in range(4)],
        "other_batches": [tiny_models.example("qwen3", 4, 16, 9)],
        "ids": tiny_models.example("qwen3")["input_ids"],
        "tokenizer": tiny_models.letters(),
    }
    snippets = blocks(TEXT, "python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert Path("out/model/geofx.json").is_file()
    assert Path("out/model.onnx").is_file()
    assert Path("out/decoder/genai_config.json").is_file()


@pytest.mark.parametrize("line", commands(TEXT))
def test_commands_and_their_options_exist(line: str) -> None:
    require_command(line)


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks(TEXT)), re.MULTILINE)
    assert "demo" in targets
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", rules, re.MULTILINE) for target in targets)
