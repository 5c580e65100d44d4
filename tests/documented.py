"""What documents promise of the command line."""

from __future__ import annotations

import shlex

from typer.testing import CliRunner

from geofx.cli import app


def require_command(line: str) -> None:
    """``geofx NAME ...``: the command exists, and every option of the line."""
    words = shlex.split(line)
    shown = CliRunner().invoke(app, [words[1], "--help"], terminal_width=200)
    assert shown.exit_code == 0, f"{line}: {shown.output}"
    for word in words[2:]:
        if word.startswith("-"):
            assert word in shown.output, line
