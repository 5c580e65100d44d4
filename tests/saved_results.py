"""A small saved result, and ways to look at it and to tamper with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geofx import artifact
from geofx.program import Program
from geofx.trace import trace

FILES = ["graph.json", "plan.json", "report.json", "config.json", "tokenizer.json", "geofx.safetensors"]
CONFIG = {"model_type": "llama", "hidden_size": 3, "_name_or_path": "/home/someone/model"}


def make_program(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)).eval()
    return trace(layers, {"input": torch.arange(6.0).view(2, 3)})


OLD, NEW = make_program(0), make_program(1)


def save_to(path: Path, program: Program = OLD, plan: str = '{"is": "old"}\n', **options: Any) -> Path:
    extra = {"tokenizer.json": b"\x00not checked by geofx\n"}
    return artifact.save(path, program, plan, {"loss": 1.5}, extra=extra, config=CONFIG, **options)


def contents(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


def assert_is(path: Path, program: Program, plan: str) -> None:
    loaded = artifact.load(path)
    assert loaded.plan_json == plan
    inputs = loaded.program.example
    assert torch.equal(loaded.program(**inputs), program(**inputs))
    assert set(contents(path)) == {*FILES, "geofx.json"}


def reseal(path: Path, *names: str) -> None:
    """Make the manifest agree with files that a test has changed."""
    manifest = json.loads((path / "geofx.json").read_bytes())
    for name in names:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (path / "geofx.json").write_text(json.dumps(manifest))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))
