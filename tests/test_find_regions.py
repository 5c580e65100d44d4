"""Regions by graph pattern: alone, of one input, across layers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny_models
import torch

from geofx.api import _canonical
from geofx.passes.find_regions import find_regions, joint_name
from geofx.passes.find_sites import sites_of
from geofx.trace import trace


def regions_of(name: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    model = tiny_models.build(name)
    program = _canonical(trace(model, tiny_models.example(name)))
    return {region.name: (region.kind, region.weights) for region in find_regions(program, sites_of(program))}


def test_regions_of_a_llama() -> None:
    found = regions_of("llama")
    attention = "model.layers.0.self_attn.{q_proj,k_proj,v_proj}.weight"
    assert found[attention][0] == "shared_input"
    assert len(found[attention][1]) == 3
    assert found["model.layers.1.mlp.{gate_proj,up_proj}.weight"][0] == "shared_input"
    for role in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        kind, weights = found[f"model.layers.{{0,1}}.{role}.weight"]
        assert kind == "stack"
        assert weights == (f"model.layers.0.{role}.weight", f"model.layers.1.{role}.weight")


def test_roles_are_told_apart_where_shapes_are_not() -> None:
    """q and k of BERT have one shape, as have gate and up of a Llama: no stack mixes them."""
    for name in ("bert", "llama"):
        for kind, weights in regions_of(name).values():
            if kind == "stack":
                assert len({weight.split(".")[-2] for weight in weights}) == 1


@pytest.mark.parametrize(
    ("names", "joint"),
    [
        (["a.q.weight", "a.k.weight"], "a.{q,k}.weight"),
        (["h.0.w", "h.1.w"], "h.{0,1}.w"),
        ([f"h.{i}.w" for i in range(4)], "h.{0..3}.w"),
        (["h.1.w", "h.3.w", "h.5.w"], "h.{1,3,5}.w"),
        (["one", "two"], "{one,two}"),
        (["a.b.c", "d.e"], "{a.b.c,d.e}"),
    ],
)
def test_joint_names(names: list[str], joint: str) -> None:
    assert joint_name(names) == joint


def test_sites_that_run_twice_are_left_alone() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) + self.second(x) + self.first(x + 1)

    program = _canonical(trace(Twice(), torch.randn(4, 8)))
    assert {region.kind for region in find_regions(program, sites_of(program))} == {"single"}


def test_an_mlp_of_equal_layers_is_one_region_of_each_kind() -> None:
    """The second and third map make a stack, and an MLP of hidden units between them: two names."""
    widths = (32, 64, 64, 64, 10)
    parts = [part for a, b in pairwise(widths) for part in (torch.nn.Linear(a, b), torch.nn.ReLU())]
    program = _canonical(trace(torch.nn.Sequential(*parts[:-1]), {"input": torch.randn(4, 32)}))
    regions = find_regions(program, sites_of(program))
    both = {region.kind: region.name for region in regions if region.weights == ("2.weight", "4.weight")}
    assert both == {"gated_mlp": "{2,4}.weight", "stack": "{2,4}.weight (stack)"}
    assert len({region.name for region in regions}) == len(regions)
