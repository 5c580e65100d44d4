"""An exported decoder for tests that do not look at the export."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import build, letters

from geofx.export.onnx_decoder import to_onnx_decoder
from geofx.sources import tokenizer_files


def export_tiny(folder: Path) -> Path:
    """``folder``, with a decoder whose logits are far apart and the tokenizer of letters."""
    model = build("qwen3")
    model.generation_config.eos_token_id = 0
    with torch.no_grad():
        model.model.norm.weight.mul_(6.0)
    to_onnx_decoder(model, folder / "model.onnx", beside=tokenizer_files(letters()))
    return folder
