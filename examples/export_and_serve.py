"""A decoder compressed, exported with its keys and values, and served by ONNX Runtime.

    python examples/export_and_serve.py

Its weights are random: what it writes means nothing, but both ways of running it must write the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers

import geofx

NEW_TOKENS = 12


def main() -> None:
    """The tokens of ONNX Runtime are those that ``generate`` writes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    original = transformers.LlamaForCausalLM(config).eval()
    batches = [torch.randint(3, 256, (4, 32)) for _ in range(8)]
    budget = geofx.Budget(parameters=0.8, scope="factorizable")
    result = geofx.optimize(original, budget, calibration=batches[:6], holdout=batches[6:])
    prompts = batches[7][:2, :8]
    wanted = result.to_module().generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    with tempfile.TemporaryDirectory() as folder:
        report = result.to_onnx(Path(folder) / "decoder" / "model.onnx", with_past=True)
        generator = geofx.runtime.Generator(Path(folder) / "decoder")
        steps = list(generator.tokens(prompts.tolist(), NEW_TOKENS))
    written = [[int(step[row]) for step in steps] for row in range(len(prompts))]
    print(f"weights: {result.report.original.size_bytes} bytes -> {result.report.optimized.size_bytes}")
    print(f"ONNX: {report.size_bytes} bytes; {generator.speed.decode_per_s:.0f} tokens per second")
    print(f"written: {written[0]}")
    assert len(set(written[0])) > 2
    assert written == wanted[:, prompts.shape[1] :].tolist()


if __name__ == "__main__":
    main()
