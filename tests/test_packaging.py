"""The wheel, in an empty folder: what a stranger installs is whole, and imports from nowhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SMOKE = """
import pathlib, sys
import torch, geofx, geofx.passes.lower, geofx.cost_models.roofline
site = pathlib.Path(sys.argv[1])
for module in (geofx, geofx.passes, geofx.cost_models):
    assert site in pathlib.Path(module.__file__).parents, module.__file__
for name in ("transformers", "onnx", "onnxruntime", "matplotlib"):
    assert name not in sys.modules, name
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
batches = [torch.randn(64, 32) for _ in range(4)]
result = geofx.optimize(model, geofx.Budget(size=0.7, scope="factorizable"), calibration=batches)
result.save("out")
assert torch.equal(geofx.load("out")(batches[0]), result(batches[0]))
print("bytes", result.program.size_bytes())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("geofx", "passes", "cost_models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_generic(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"geofx", next(name for name in top if name.endswith(".dist-info"))}
    expected = {f"geofx/{path.relative_to(ROOT / 'geofx')}" for path in (ROOT / "geofx").rglob("*.py")}
    expected |= {
        f"geofx/{path.relative_to(ROOT)}"
        for part in ("passes", "cost_models")
        for path in (ROOT / part).glob("*.py")
    }
    expected |= {"geofx/py.typed", "geofx/report.html.j2"}
    assert expected <= set(names)


def test_the_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Also that importing geofx loads none of the optional packages."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", SMOKE, str(site)],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bytes ")


def test_the_checkout_works_without_an_install() -> None:
    """Run in the repository's root, passes/ and cost_models/ are found beside geofx/."""
    code = "import geofx.passes.lower, geofx.cost_models; print(geofx.passes.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == ROOT / "passes" / "__init__.py"
