"""Small models run fastest on one thread, and are worth no trial of every format."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from geofx import optimization, screening

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start: more threads than cores wait for one another

TRIED = screening.TRIED
screening.TRIED = ()
optimization.REPORTED = (0.8,)

FUNCTIONS = """
import torch
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.ReLU(), torch.nn.Linear(32, 20))
def model_with_inputs():
    made = model()
    made.dummy_inputs = {"input": torch.ones(2, 24)}
    return made
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 24, generator=generator) for _ in range(4)]
"""


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Default plans try the formats that need a fit, as they do for users: 20 seconds for a small decoder."""
    monkeypatch.setattr(screening, "TRIED", TRIED)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a module of functions that commands are told by name."""
    (tmp_path / "geofx_compared_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "geofx_compared_functions", raising=False)
    return tmp_path
