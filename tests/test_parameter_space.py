"""The parameter vector: every number once, every layer at its coordinates, and the way back from factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn

import geofx
from geofx.errors import ConfigError
from geofx.factorizations import Dense, LowRank
from geofx.parameter_space import ParameterSpace
from geofx.program import flat_tensors
from geofx.trace import trace


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mlp"])
def test_every_number_of_the_graph_once_at_the_coordinates_of_its_layer(name: str) -> None:
    """Eq. 6: layers are disjoint ranges that cover 0 .. n; Llama's and GPT-2's tied heads add nothing."""
    model = tiny_models.build(name)
    program = trace(model, tiny_models.example(name))
    space = ParameterSpace.of(program)
    assert space.dim == program.parameter_count()
    covered = [coordinate for layer in space.idx.values() for coordinate in layer]
    assert covered == list(range(space.dim))
    vector = space.vector()
    for layer, tensor in program.tensors():
        if tensor.is_floating_point():
            where = space.idx[layer]
            assert torch.equal(vector[where.start : where.stop], tensor.detach().reshape(-1))
            assert torch.equal(space.slice(layer), tensor.detach().reshape(-1))


def test_a_module_has_its_parameters_and_buffers_tied_ones_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3, bias=False), "n": nn.BatchNorm1d(3)})
    model["b"].weight = model["a"].weight
    space = ParameterSpace.of(model)
    assert list(space.idx) == ["a.weight", "a.bias", "n.weight", "n.bias", "n.running_mean", "n.running_var"]
    assert space.idx["a.bias"] == range(12, 15)
    assert space.dim == 12 + 3 + 4 * 3


def test_large_layers_are_read_in_chunks() -> None:
    space = ParameterSpace.of(nn.Linear(7, 5))
    pieces = list(space.chunks(10))
    assert [len(piece) for piece in pieces] == [10, 10, 10, 5, 5]
    assert torch.equal(torch.cat(pieces), space.vector())
    assert space.vector(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_reconstructed_parameters_are_the_factors_multiplied_out(name: str, tmp_path: Path) -> None:
    """At the original's coordinates and in its layout: GPT-2 stores weights as (in, out), square ones too."""
    analysis = geofx.analyze(
        tiny_models.build(name), [tiny_models.example(name, 4, 24, seed) for seed in range(3)]
    )
    result = analysis.apply(analysis.plan(geofx.Budget(size=0.8, scope="factorizable")))
    original, rebuilt = ParameterSpace.of(analysis.original), result.parameter_space()
    assert rebuilt.idx == original.idx
    rewritten = {weight for factored in result.rewrites.values() for weight in factored.weights}
    for layer in original.idx:
        before, after = original.slice(layer), rebuilt.slice(layer)
        assert torch.equal(before, after) == (layer not in rewritten)
    for factored in result.rewrites.values():
        for site, weight in enumerate(factored.weights):
            dense = factored.factorization.to_dense(factored.factors, site).detach()
            stored = dense.T if name == "gpt2" else dense
            assert torch.equal(rebuilt.slice(weight), stored.reshape(-1))
            pair = torch.stack([rebuilt.slice(weight), original.slice(weight)])
            assert torch.corrcoef(pair)[0, 1] > 0.1, "a wrong layout correlates with nothing"
    result.save(tmp_path / "out")
    loaded = geofx.load(tmp_path / "out", module=analysis.module)
    assert torch.equal(loaded.parameter_space().vector(), rebuilt.vector())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp"])
def test_the_original_with_reconstructed_weights_computes_what_the_factors_do(name: str) -> None:
    batches = [tiny_models.example(name, 4, 24, seed) for seed in range(3)]
    analysis = geofx.analyze(tiny_models.build(name), batches)
    plan = analysis.plan(geofx.Budget(size=0.85), include="*", formats=["kronecker", "low_rank"])
    result = analysis.apply(plan)
    names = [weight for choice in result.plan.rewritten for weight in choice.weights]
    assert names
    dense = result.parameter_space().applied_to(analysis.original, names)
    with torch.no_grad():
        one, other = (flat_tensors(model(**batches[0])) for model in (result.program, dense))
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert dense.parameter_count() == analysis.original.parameter_count()


def test_what_the_graph_holds_now_counts_not_what_was_fitted() -> None:
    analysis = geofx.analyze(tiny_models.build("mlp"), [tiny_models.example("mlp", 8, seed=0)])
    result = analysis.apply(analysis.plan(geofx.Budget(size=0.7)))
    (region, factored), *_ = result.rewrites.items()
    assert not isinstance(factored.factorization, Dense)
    for attribute in factored.attributes.values():
        if result.program.weight(attribute).is_floating_point():
            zero = torch.zeros_like(result.program.weight(attribute))
            result.program.set_tensor(attribute, zero, trainable=False)
    assert float(result.parameter_space().slice(factored.weights[0]).abs().sum()) == 0.0, region


def test_another_model_is_refused_by_name_and_by_shape() -> None:
    analysis = geofx.analyze(tiny_models.build("mlp"), [tiny_models.example("mlp", 8, seed=0)])
    plan = analysis.plan(geofx.Budget(size=0.9), formats=[LowRank])
    result = analysis.apply(plan)
    other = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10))
    with pytest.raises(ConfigError, match=r"not \("):
        result.parameter_space(other).vector()
    with pytest.raises(ConfigError, match=r"holds no '7\.weight'"):
        ParameterSpace({"7.weight": (1, 1)}, torch.zeros).reconstructed(result.program, {}).slice("7.weight")
    with pytest.raises(ConfigError, match="no parameter 'x'"):
        ParameterSpace.of(other).slice("x")
