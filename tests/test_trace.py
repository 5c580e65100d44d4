"""Capture: one code path for every architecture, shapes it has not seen, and the faults of rows 17 to 46."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from geofx.errors import CaptureError, ConfigError
from geofx.passes.canonicalize import Canonicalize
from geofx.passes.contract import run_passes
from geofx.passes.find_sites import FindSites, find_sites, sites_of
from geofx.program import Program, flat_tensors
from geofx.trace import trace

SITES = {
    "llama": 15,
    "gpt2": 10,
    "qwen3": 16,
    "gemma3": 15,
    "mixtral": 12,
    "bert": 16,
    "bert_masked": 16,
    "vit": 13,
    "mlp": 3,
}


@pytest.fixture(params=tiny_models.MODELS, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def canonical(program: Program) -> Program:
    clone = program.clone()
    run_passes(clone, [Canonicalize(), FindSites()])
    return clone


def test_rows_20_to_23_the_graph_equals_eager_at_every_shape(name: str) -> None:
    """Bit for bit, also after canonicalization; traced from one unpadded row of one example."""
    model = tiny_models.build(name)
    single = {
        key: value for key, value in tiny_models.example(name, batch=1).items() if key != "attention_mask"
    }
    program = trace(model, single)
    graphs = (program, canonical(program))
    for batch, length in ((1, 1), (1, 16), (2, 2), (3, 7), (2, 64)):
        inputs = tiny_models.example(name, batch, length)
        expected = tiny_models.run_eager(model, name, inputs)
        for graph in graphs:
            with torch.no_grad():
                actual = flat_tensors(graph(**inputs))
            assert len(actual) == len(expected)
            assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_row_23_empty_inputs_give_empty_outputs_or_the_models_own_error(shape: tuple[int, int]) -> None:
    model = tiny_models.build("gpt2")
    program = trace(model, tiny_models.example("gpt2"))
    ids = torch.zeros(shape, dtype=torch.long)
    with torch.no_grad():
        try:
            expected = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.shape
        except (RuntimeError, IndexError, ValueError):
            with pytest.raises((RuntimeError, IndexError, ValueError, ConfigError)):
                program(ids)
        else:
            assert program(ids).logits.shape == expected


def test_row_19_a_model_that_caches_by_default_is_traced_without_its_cache() -> None:
    model = tiny_models.build("llama")
    assert model.config.use_cache
    output = trace(model, tiny_models.example("llama"))(**tiny_models.example("llama"))
    assert output.past_key_values is None


def test_sites_are_found_by_what_is_multiplied(name: str) -> None:
    program = canonical(trace(tiny_models.build(name), tiny_models.example(name)))
    sites, skips = find_sites(program)
    assert len(sites) == SITES[name]
    assert tuple(site.weight for site in sites_of(program)) == tuple(site.weight for site in sites)
    for site in sites:
        stored = program.weight(site.weight)
        assert site.shape == tuple(stored.shape[::-1] if site.transposed else stored.shape)
    assert all(skip.reason == "UNSUPPORTED_OP" for skip in skips)


def test_output_type_is_the_models_own(name: str) -> None:
    model = tiny_models.build(name)
    inputs = tiny_models.example(name)
    assert type(trace(model, inputs)(**inputs)) is type(model(**inputs))


def test_row_32_tied_weights_are_one_tensor_under_two_names() -> None:
    model = tiny_models.build("llama")
    program = canonical(trace(model, tiny_models.example("llama")))
    assert program.aliases["lm_head.weight"] == "model.embed_tokens.weight"
    assert program.weight("lm_head.weight") is program.weight("model.embed_tokens.weight")
    stored = sum(value.numel() * 4 for value in model.parameters())
    buffers = sum(value.numel() * value.element_size() for value in model.buffers())
    assert stored <= program.size_bytes() <= stored + buffers + 64


def test_row_35_transposed_weights_keep_their_orientation() -> None:
    program = canonical(trace(tiny_models.build("gpt2"), tiny_models.example("gpt2")))
    sites = {site.weight: site for site in find_sites(program)[0]}
    fused = sites["transformer.h.0.attn.c_attn.weight"]
    assert fused.transposed
    assert fused.shape == (192, 64)


def test_sites_that_read_one_tensor_share_its_moments() -> None:
    sites = find_sites(canonical(trace(tiny_models.build("llama"), tiny_models.example("llama"))))[0]
    by_name = {
        site.weight.removeprefix("model.layers.0."): site.input for site in sites if "layers.0" in site.weight
    }
    attention = {by_name[f"self_attn.{part}_proj.weight"] for part in "qkv"}
    assert len(attention) == 1
    assert by_name["mlp.gate_proj.weight"] == by_name["mlp.up_proj.weight"] not in attention


class Shared(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


def test_row_33_a_shared_module_is_one_site_with_two_nodes() -> None:
    (site,) = find_sites(canonical(trace(Shared(), torch.randn(3, 8))))[0]
    assert len(site.nodes) == 2
    assert site.input.count("+") == 1


class Norm(nn.Module):
    """Uses its weight in a matmul and in a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w / self.w.norm()


class Fused(nn.Module):
    """Slices of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w[:4]) + nn.functional.linear(x, self.w[4:])


@pytest.mark.parametrize("factory", [Norm, Fused])
def test_row_34_a_weight_that_is_used_otherwise_is_left_alone(factory: type[nn.Module]) -> None:
    width = 8 if factory is Norm else 4
    sites, skips = find_sites(canonical(trace(factory(), torch.randn(3, width))))
    assert not sites
    assert [(skip.weight, skip.reason) for skip in skips] == [("w", "NON_LINEAR_USE")]


class Buffered(nn.Module):
    """A constant weight that is a buffer, stored as (in, out) and strided."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.randn(8, 12)[:, ::2])

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def test_rows_35_and_36_a_strided_buffer_is_a_site() -> None:
    program = canonical(trace(Buffered(), torch.randn(3, 8)))
    (site,) = find_sites(program)[0]
    assert (site.weight, site.shape, site.transposed) == ("w", (6, 8), True)


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_row_18_data_dependent_control_flow_quotes_the_line() -> None:
    with pytest.raises(CaptureError, match=r"test_trace\.py:\d+: if x\.sum\(\) > 0:"):
        trace(DataDependent(), torch.randn(3, 4))


def test_row_17_what_cannot_be_traced_is_said() -> None:
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(CaptureError, match="ScriptModule"):
        trace(scripted, torch.randn(2, 4))
    with pytest.raises(CaptureError, match="not a model"):
        trace(object(), torch.randn(2, 4))  # type: ignore[arg-type]


def test_row_17_exported_programs_and_graph_modules_are_taken() -> None:
    model = tiny_models.build("mlp")
    x = torch.randn(3, 32)
    dynamic = {"input": {0: torch.export.Dim.AUTO}}
    exported = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    for source in (exported, exported.module(), torch.fx.symbolic_trace(model)):
        program = trace(source, {"input": x})
        assert torch.equal(program(torch.ones(5, 32)), model(torch.ones(5, 32)))
        assert len(find_sites(canonical(program))[0]) == 3


def test_rows_24_and_137_training_mode_is_restored_also_on_failure(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[0].eval()
    with caplog.at_level(logging.WARNING):
        program = trace(model, torch.randn(3, 4))
    assert "training mode" in caplog.text
    assert [part.training for part in model] == [False, True, True]
    x = torch.randn(5, 4)
    assert torch.equal(program(x), program(x))
    broken = nn.Sequential(nn.Linear(4, 4), DataDependent()).train()
    with pytest.raises(CaptureError):
        trace(broken, torch.randn(3, 4))
    assert all(part.training for part in broken.modules())
    assert torch.is_grad_enabled()


def test_row_26_hooks_keep_their_meaning() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(3, 4)
    assert torch.equal(trace(model, x)(x), model(x))


def test_row_30_parameters_without_data_are_named() -> None:
    with pytest.raises(CaptureError, match=r"meta device.*0\.weight.*load the weights"):
        trace(nn.Sequential(nn.Linear(4, 4, device="meta")), torch.randn(2, 4))


@pytest.mark.parametrize("part", ["class", "lambda"])
def test_row_38_keywords_as_module_names_are_named(part: str) -> None:
    model = nn.ModuleDict({part: nn.Linear(4, 4)})
    model.forward = lambda x: model[part](x)  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match=f"'{part}' is a Python keyword"):
        trace(model, torch.randn(2, 4))


def test_row_38_odd_but_legal_names_are_traced() -> None:
    names = ["größe", "a b", "x" * 300, "<b>"]
    model = nn.Sequential()
    for part in names:
        model.add_module(part, nn.Linear(4, 4))
    x = torch.randn(2, 4)
    program = canonical(trace(model, x))
    assert torch.equal(program(x), model(x))
    assert [site.weight for site in sites_of(program)] == [f"{part}.weight" for part in names]


def test_row_39_tiny_and_odd_weights_get_a_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))
    sites, skips = find_sites(canonical(trace(model, torch.randn(2, 4))))
    assert not sites
    assert {skip.reason for skip in skips} == {"TOO_SMALL"}


@pytest.mark.parametrize(
    ("dtype", "reason"), [(torch.complex64, "UNSUPPORTED_DTYPE"), (torch.int8, "QUANTIZED_WEIGHT")]
)
def test_rows_29_and_45_dtypes_that_cannot_be_factorized(dtype: torch.dtype, reason: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.ones(4, 4).to(dtype))

        def forward(self, x: Tensor) -> Tensor:
            return x.to(dtype) @ self.w

    (skip,) = find_sites(canonical(trace(Odd(), torch.randn(2, 4))))[1]
    assert (skip.weight, skip.reason) == ("w", reason)


def test_a_head_is_a_site_however_many_its_outputs_but_not_its_inputs() -> None:
    """A vocabulary of 20,000 has a diagonal for its gradient; an input of 20,000 would need 3.2 GB."""
    model = nn.Sequential(nn.Embedding(20000, 8), nn.Linear(8, 8), nn.Linear(8, 20000), nn.Linear(20000, 4))
    sites, skips = find_sites(canonical(trace(model, torch.zeros(2, 3, dtype=torch.long))))
    assert [(site.weight, site.kind, site.shape) for site in sites] == [
        ("0.weight", "embedding", (20000, 8)),
        ("1.weight", "linear", (8, 8)),
        ("2.weight", "linear", (20000, 8)),
    ]
    assert [(skip.weight, skip.reason) for skip in skips] == [("3.weight", "TOO_LARGE")]


def test_row_66_a_weight_with_nan_is_skipped() -> None:
    model = tiny_models.build("mlp")
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    sites, skips = find_sites(canonical(trace(model, torch.randn(2, 32))))
    assert len(sites) == 2
    assert [(skip.weight, skip.reason) for skip in skips] == [("2.weight", "NONFINITE_WEIGHT")]


def test_arguments_are_bound_like_the_models() -> None:
    program = trace(tiny_models.build("llama"), tiny_models.example("llama"))
    ids = torch.ones(2, 5, dtype=torch.long)
    whole = program(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(program(ids).logits, whole)
    for call, message in (
        (lambda: program(input_ids=ids, labels=ids), "'labels' is not an input"),
        (lambda: program(attention_mask=ids), "'input_ids' is missing"),
        (lambda: program(ids, ids, ids), "3 positional"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_inputs_are_bound_in_the_order_of_forward_whatever_the_examples() -> None:
    """Tokenizers give token_type_ids before the mask, forward takes them after it."""
    model = tiny_models.build("bert")
    inputs = tiny_models.example("bert")
    kinds = torch.zeros_like(inputs["input_ids"])
    shuffled = {
        "token_type_ids": kinds,
        "attention_mask": inputs["attention_mask"],
        "input_ids": inputs["input_ids"],
    }
    program = trace(model, shuffled)
    assert program.input_names == ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        expected = model(inputs["input_ids"], inputs["attention_mask"], kinds)[0]
        assert torch.equal(program(inputs["input_ids"], inputs["attention_mask"], kinds)[0], expected)


def test_nested_tensors_in_the_example_are_refused_not_baked_in() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
            return x + more[0]

    with pytest.raises(CaptureError, match="'more' is a nest of tensors"):
        trace(Pair(), {"x": torch.ones(2, 2), "more": [torch.ones(2, 2)]})


def test_dropout_that_was_exported_switched_on_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    exported = torch.export.export(model, (torch.randn(3, 4),))
    with pytest.raises(CaptureError, match="dropout is on"):
        trace(exported, torch.randn(3, 4))


def test_the_model_is_not_changed(name: str) -> None:
    model = tiny_models.build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, tiny_models.example(name))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_networkx_carries_annotations() -> None:
    program = canonical(trace(tiny_models.build("mlp"), torch.randn(2, 32)))
    graph = program.to_networkx()
    weights: list[Any] = [data["site.weight"] for _, data in graph.nodes(data=True) if "site.weight" in data]
    assert weights == ["0.weight", "2.weight", "4.weight"]
    assert graph.number_of_edges() > 0
