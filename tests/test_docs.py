"""The documentation: snippets run in order, commands exist, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import yaml
from documented import blocks, commands, require_command

import geofx
from geofx.cost_models import DEVICES

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_snippets_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("out").mkdir()
    monkeypatch.setitem(DEVICES, "my-npu", DEVICES["l4"])  # taken out again at the end
    names: dict[str, object] = {
        "geofx": geofx,
        "model": tiny_models.build("llama"),
        "batches": [tiny_models.example("llama", 4, 16, seed) for seed in range(4)],
        "other_batches": [tiny_models.example("llama", 4, 16, 9)],
        "tokenizer": tiny_models.letters(),
    }
    if page == "deployment":
        names["result"] = tiny_result()
    for snippet in blocks(PAGES[page], "python"):
        exec(compile(snippet, f"{page}.md", "exec"), names)


def tiny_result() -> geofx.OptimizedModel:
    analysis = geofx.analyze(tiny_models.build("llama"), tiny_models.example("llama"))
    budget = geofx.Budget(parameters=0.9, scope="factorizable")
    return analysis.apply(analysis.plan(budget, formats=["low_rank"]))


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str) -> None:
    inline = re.findall(r"`(geofx [^`\n]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    for line in (*commands(PAGES[page]), *inline):
        require_command(line)


def test_pages_are_listed_and_link_to_one_another() -> None:
    listed = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(next(iter(item.values())) for item in listed) == sorted(f"{name}.md" for name in PAGES)
    for text in PAGES.values():
        for target in re.findall(r"\]\(([\w./-]+\.md)\)", text):
            assert (ROOT / "docs" / target).is_file(), target


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="geofx.optimize"' in page
