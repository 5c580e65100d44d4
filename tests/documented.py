"""What documents show: blocks of code, and what they promise of the command line."""

from __future__ import annotations

import re
import shlex

from typer.testing import CliRunner

from geofx.cli import app


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands(text: str) -> list[str]:
    """The lines of shell blocks that call geofx, without what is said of them."""
    lines = "\n".join(blocks(text)).splitlines()
    return [re.split(r"\s{3,}", line)[0] for line in lines if line.startswith("geofx ")]


def require_command(line: str) -> None:
    """``geofx NAME ...``: the command exists, and every option of the line."""
    words = shlex.split(line)
    shown = CliRunner().invoke(app, [words[1], "--help"], terminal_width=200)
    assert shown.exit_code == 0, f"{line}: {shown.output}"
    for word in words[2:]:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", shown.output), line
