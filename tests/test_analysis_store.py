"""A saved analysis: the same back, flags in its batches too, or a plain error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import geofx
from geofx.analysis_store import _Meta, read_analysis
from geofx.errors import ArtifactCorruptError, ArtifactError, ArtifactVersionError


@pytest.fixture(scope="module")
def analysis() -> geofx.Analysis:
    batches = [tiny_models.example("mlp", 32, seed=seed) for seed in range(4)]
    held = [{**batches[3], "weight": 0.5, "tags": ("a", None, 3), "infinite": float("inf")}]
    return geofx.analyze(tiny_models.build("mlp"), batches[:3], holdout=held)


@pytest.fixture
def saved(analysis: geofx.Analysis, tmp_path: Path) -> Path:
    return analysis.save(tmp_path / "analysis")


def test_batches_come_back_with_what_is_no_tensor(analysis: geofx.Analysis, saved: Path) -> None:
    stored = read_analysis(saved)
    (held,) = stored.holdout
    (before,) = analysis.holdout
    assert {name: value for name, value in held.items() if name != "input"} == {
        "weight": 0.5,
        "tags": ("a", None, 3),
        "infinite": float("inf"),
    }
    assert torch.equal(held["input"], before["input"])
    assert stored.example.keys() == analysis.original.example.keys()
    assert stored.moments.tokens == analysis.moments.tokens
    assert not stored.holdout_is_calibration


def test_what_is_no_data_is_refused_by_name(analysis: geofx.Analysis, tmp_path: Path) -> None:
    held = analysis.holdout
    analysis.holdout = [{**held[0], "source": object()}]
    try:
        with pytest.raises(ArtifactError, match=r"object cannot be saved.*holdout/0/source"):
            analysis.save(tmp_path / "analysis")
    finally:
        analysis.holdout = held


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    manifest = json.loads((path / "geofx.json").read_text())
    change(manifest)
    (path / "geofx.json").write_text(json.dumps(manifest))


KEYS = [field.name for field in dataclasses.fields(_Meta)]
DAMAGE: dict[str, Callable[[Any], Any]] = {
    **{f"no {key}": lambda meta, key=key: meta.pop(key) for key in KEYS},
    **{f"{key} of another type": lambda meta, key=key: meta.update({key: [1]}) for key in KEYS},
    "more": lambda meta: meta.update(more=1),
    "mode": lambda meta: meta.update(mode="sideways"),
    "no hash": lambda meta: meta.update(files={}),
    "constant": lambda meta: meta["constants"].update({"holdout/0/weight": {"node": "x"}}),
    "index": lambda meta: meta["constants"].update({"holdout/x/weight": 1}),
    "example": lambda meta: meta["constants"].update({"example/1/weight": 1}),
    "moments": lambda meta: meta["tokens"].update(absent=3),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_row_103_a_manifest_that_disagrees(case: str, saved: Path) -> None:
    edit(saved, DAMAGE[case])
    with pytest.raises(ArtifactCorruptError):
        read_analysis(saved)


@pytest.mark.parametrize("prefix", ["example/", "input/"])
def test_row_104_tensors_that_are_missing(prefix: str, saved: Path) -> None:
    file = saved / "analysis.safetensors"
    kept = {name: value for name, value in load_file(file).items() if not name.startswith(prefix)}
    save_file(kept, file)
    digest = sha256(file.read_bytes()).hexdigest()
    edit(saved, lambda meta: meta["files"]["analysis.safetensors"].update(sha256=digest))
    edit(saved, lambda meta: [meta["tensors"].pop(name) for name in set(meta["tensors"]) - set(kept)])
    with pytest.raises(ArtifactCorruptError, match="not a saved analysis"):
        read_analysis(saved)


def test_row_105_newer_missing_and_other_folders(saved: Path, tmp_path: Path) -> None:
    (saved / "analysis.safetensors").rename(tmp_path / "away")
    with pytest.raises(ArtifactCorruptError, match="not a saved analysis"):
        read_analysis(saved)
    edit(saved, lambda meta: meta.update(schema_version=2, more=1))
    with pytest.raises(ArtifactVersionError, match="schema 2; this geofx reads up to 1"):
        read_analysis(saved)
    (saved / "geofx.json").unlink()
    with pytest.raises(ArtifactCorruptError):
        read_analysis(saved)
