"""What is said of GPUs where there is none: the computed page is current, and the script for one runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_page_is_what_is_computed() -> None:
    done = run("gpu_paper.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_the_script_checks_and_times_every_operation(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = run("gpu.py", "--device", "cpu", "--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {row["op"] for row in found["checks"]} >= {
        "low_rank_linear",
        "gauge_fixed_linear",
        "block_diagonal_linear",
        "fuse",
    }
    assert all(row["holds"] for row in found["checks"])
    assert {key for row in found["times"] for key in row["ratios"]} >= {"dense", "low_rank_linear kernel"}
