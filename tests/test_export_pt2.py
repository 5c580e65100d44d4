"""Archives of torch.export: the graph's numbers at unseen shapes, with and without geofx in the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build, example

import geofx
from geofx.errors import ArtifactError, ConfigError, ExportError, VerificationError
from geofx.export import pt2
from geofx.export.pt2 import to_pt2
from geofx.factorizations import LowRank
from geofx.model import OptimizedModel

IDS = "[torch.ones(3, 9).long()] * 2"
LOAD = f"import sys, torch; print(torch.export.load(sys.argv[1]).module()(*{IDS})[0].shape)"
FEW = geofx.Target(device="h100-sxm", tokens=1)


@pytest.fixture(scope="module")
def result() -> OptimizedModel:
    analysis = geofx.analyze(build("llama"), example("llama"))
    plan = analysis.plan(geofx.Budget(parameters=1.0))
    forms = {item.region: LowRank(5) for item in plan.choices if "mlp" in item.region}
    return analysis.apply(plan.edit(forms))


def opened(file: Path, *first: str) -> subprocess.CompletedProcess[str]:
    code = "; ".join((*first, LOAD))
    command = [sys.executable, "-c", code, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_standard_operations_open_without_geofx(result: OptimizedModel, tmp_path: Path) -> None:
    report = result.to_pt2(tmp_path / "model.pt2")
    assert report.operations == ()
    assert report.max_difference < 1e-4
    assert {"batch=1, sequence=16", "batch=5, sequence=33"} <= report.differences.keys()
    assert report.size_bytes == report.path.stat().st_size
    done = opened(report.path, "import sys", "sys.modules['geofx'] = None")
    assert "torch.Size([3, 9, 128])" in done.stdout, done.stderr[-2000:]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.pt2"]


def test_custom_operations_open_with_geofx_alone(result: OptimizedModel, tmp_path: Path) -> None:
    report = result.to_pt2(tmp_path / "model.pt2", lower="custom", target=FEW)
    assert report.operations == ("geofx.low_rank_linear.default",)
    assert report.max_difference < 1e-4
    root = str(Path(geofx.__file__).parents[1])
    known = opened(report.path, "import sys", f"sys.path.append({root!r})", "import geofx.ops")
    assert "torch.Size([3, 9, 128])" in known.stdout, known.stderr[-2000:]
    unknown = opened(report.path, "import sys", "sys.modules['geofx'] = None")
    assert unknown.returncode
    assert "geofx" in unknown.stderr


@pytest.mark.parametrize(("lower", "target"), [("custom", None), ("standard", FEW), ("other", None)])
def test_lowering_that_cannot_be(result: OptimizedModel, tmp_path: Path, lower: str, target: object) -> None:
    with pytest.raises(ConfigError, match="lower="):
        result.to_pt2(tmp_path / "model.pt2", lower=lower, target=target)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_gives_other_numbers_is_not_published(
    result: OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pt2.captured

    def wrong(program: geofx.Program) -> torch.export.ExportedProgram:
        clone = program.clone()
        name = "model.norm.weight"
        clone.set_tensor(name, 2.0 * clone.weight(name).detach(), trainable=False)
        return real(clone)

    monkeypatch.setattr(pt2, "captured", wrong)
    with pytest.raises(VerificationError):
        to_pt2(result.program, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_targets_and_inputs_are_checked_first(result: OptimizedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not end in \.pt2"):
        result.to_pt2(tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="folder does not exist"):
        result.to_pt2(tmp_path / "none" / "model.pt2")
    program = geofx.trace(build("mlp"), example("mlp"))
    odd = geofx.Program(program.graph_module, ("x",), {"x": 3}, {}, {})
    with pytest.raises(ExportError, match="'x' is a int"):
        to_pt2(odd, tmp_path / "model.pt2")
