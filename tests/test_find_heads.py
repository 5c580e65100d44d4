"""Heads are read off the graph: cuts of a linear's outputs, joins before its input, nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.nn import functional

from geofx.passes.canonicalize import Canonicalize
from geofx.passes.contract import run_passes
from geofx.passes.find_sites import find_sites
from geofx.trace import trace


def heads_of(model: nn.Module, example: object) -> dict[str, int]:
    program = trace(model, example).clone()
    run_passes(program, [Canonicalize()])
    return {site.weight: site.heads for site in find_sites(program)[0]}


LLAMA = {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": -4}
BERT = {"query": 4, "key": 4, "value": 4, "attention.output.dense": -4}
EXPECTED = {
    "llama": LLAMA,
    "mixtral": LLAMA,
    "qwen3": LLAMA,
    "gemma3": LLAMA | {"k_proj": 1, "v_proj": 1},
    "gpt2": {"c_attn": 12, "attn.c_proj": -4},
    "bert": BERT,
    "bert_masked": BERT,
    "vit": {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": -4},
    "mlp": {},
}


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_heads_of_every_architecture(name: str) -> None:
    found = heads_of(tiny_models.build(name), tiny_models.example(name))
    for weight, heads in found.items():
        wanted = [count for part, count in EXPECTED[name].items() if f"{part}.weight" in weight]
        assert [heads] == (wanted or [0]), weight
    assert sum(heads != 0 for heads in found.values()) == 2 * len(EXPECTED[name])


class Attention(nn.Module):
    """Twelve channels through ``inner`` linear first, then what ``mix`` makes of them, then linear last."""

    def __init__(self, inner: int, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, inner), nn.Linear(12, 12)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)))


def _vision(x: Tensor) -> Tensor:
    q, k, v = x.reshape(*x.shape[:2], 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _interleaved(x: Tensor) -> Tensor:
    q, k, v = x.view(*x.shape[:2], 4, 9).transpose(1, 2).chunk(3, dim=-1)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], 12)


def _einsum(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 6)) * 0.5
    scores = torch.einsum("bqhd,bkhd->bhqk", q, q).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", scores, q).flatten(-2)


def _normed(x: Tensor) -> Tensor:
    heads = functional.layer_norm(functional.layer_norm(x, (12,)).view(*x.shape[:2], 4, 3), (3,))
    mixed = heads.permute(0, 2, 1, 3)
    return mixed.softmax(-2).permute(0, 2, 1, 3).reshape(*x.shape[:2], 12)


def _grouped(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 4, 3).softmax(-1).flatten(2)


def _two_sizes(x: Tensor) -> Tensor:
    wide, narrow = x.split([12, 6], dim=-1)
    wide = wide.view(*x.shape[:2], 2, 6).transpose(1, 2)
    narrow = narrow.reshape(*x.shape[:2], 2, 3).transpose(1, 2)
    return (wide * narrow.sum(-1, keepdim=True)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("inner", "mix", "first", "last"),
    [
        (36, _vision, 12, -4),
        (36, _interleaved, 4, -4),
        (12, _einsum, 2, -2),
        (12, _normed, 4, -4),
        (12, _grouped, 0, 0),
        (12, torch.relu, 0, 0),
        (18, _two_sizes, 0, -2),
    ],
)
def test_heads_of_other_ways_to_write_attention(
    inner: int, mix: Callable[[Tensor], Tensor], first: int, last: int
) -> None:
    found = heads_of(Attention(inner, mix).eval(), torch.randn(2, 5, 12))
    assert found == {"first.weight": first, "last.weight": last}
