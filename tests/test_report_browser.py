"""The report in a browser: it renders, nothing complains, nothing is fetched."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from tiny_models import build, example

import geofx
from geofx.report_html import report_html

BROWSER = Path(__file__).with_name("browser.py")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("PyQt6") is None or importlib.util.find_spec("PyQt6.QtWebEngineCore") is None,
    reason="needs PyQt6-WebEngine",
)


def test_a_report_renders_alone(tmp_path: Path) -> None:
    budget = geofx.Budget(parameters=0.7, scope="factorizable")
    analysis = geofx.analyze(build("llama"), [example("llama", seed=seed) for seed in range(3)])
    result = analysis.apply(analysis.plan(budget, formats=["gauge_fixed"]))
    frontier = analysis.frontier(shares=[0.9, 0.7], formats=["gauge_fixed"])
    result = replace(result, report=replace(result.report, frontier=frontier))
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(report_html(result.report), encoding="utf-8")
    command = [sys.executable, str(BROWSER), str(page), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "libGL" in done.stderr or "cannot open shared object" in done.stderr:
        pytest.skip(f"the browser needs a library of the system: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["loaded"]
    assert seen["messages"] == []
    assert set(seen["requests"]) == {"file"}
    shown = seen["page"]
    assert shown["title"].startswith("geofx")
    wanted = ["Original against optimized", "Other sizes", "Before and after: model.layers.", "Regions"]
    for heading in wanted:
        assert any(heading in found for found in shown["headings"]), heading
    assert len(shown["drawings"]) == 5
    assert all(width > 400 and height > 40 for width, height in shown["drawings"])
    assert shown["overflow"] <= 0
    colours = np.unique((imread(picture)[..., :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0)
    assert len(colours) > 100
