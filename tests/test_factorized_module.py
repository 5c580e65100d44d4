"""Factors in the user's own module: same function as a dense copy, nothing else touched."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from factorization_cases import CASES
from test_factorizations import random_analysis
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from geofx.errors import ConfigError, GeofxError
from geofx.factorizations import Dense, Factored, Factorization, Factors, GaugeFixed, LowRank, TokenMPS
from geofx.factorized_module import FactorizedLinear
from geofx.factorized_module import factorize_module as factorize_regions
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site

Choices = dict[str, tuple[Factorization, Factors]]
BOTH = (LowRank(5), GaugeFixed(5), GaugeFixed(5, "pivoted"))


def fit(factorization: Factorization, name: str, weight: Tensor) -> tuple[Factorization, Factors]:
    dense = weight.detach()
    site = Site(name, (dense.shape[0], dense.shape[1]))
    analysis = RegionAnalysis(Region(name, "single", (site,)), {name: dense}, {name: Metric()})
    return factorization.fit({name: dense}, analysis)


def choose(model: nn.Module, names: list[str], *, transposed: bool = False) -> Choices:
    weights = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: fit(BOTH[index % len(BOTH)], name, weights[name].t() if transposed else weights[name])
        for index, name in enumerate(names)
    }


def factorize_module(
    model: nn.Module, choices: Choices, aliases: Mapping[str, str] | None = None
) -> nn.Module:
    """`factorize_regions` for regions of one weight each."""
    regions = [Factored(form, factors, (name,)) for name, (form, factors) in choices.items()]
    return factorize_regions(model, regions, aliases)


def dense_copy(model: nn.Module, choices: Choices, *, transposed: bool = False) -> nn.Module:
    """The oracle: the same model with each weight overwritten by what its factors multiply to."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, (factorization, factors) in choices.items():
            dense = factorization.to_dense(factors)
            result.get_parameter(name).copy_(dense.t() if transposed else dense)
    return result


def linear_names(model: nn.Module, inside: str) -> list[str]:
    return [
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and inside in path
    ]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16, bias=False), nn.Linear(16, 9))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("factorization", BOTH, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_module_is_the_dense_linear_map(factorization: Factorization, bias: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(12, 20, bias=bias)
    fitted, factors = fit(factorization, "weight", dense.weight)
    module = FactorizedLinear(fitted, factors, dense.bias, shape=tuple(dense.weight.shape))
    x = torch.randn(2, 3, 12)
    expected = nn.functional.linear(x, fitted.to_dense(factors), dense.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.weight, fitted.to_dense(factors), rtol=0.0, atol=0.0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("factorization", BOTH, ids=str)
def test_row_112_module_copies_casts_and_traces(factorization: Factorization) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(12, 20)
    module = FactorizedLinear(
        *fit(factorization, "weight", dense.weight), dense.bias, shape=tuple(dense.weight.shape)
    )
    x = torch.randn(4, 12)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    half = copy.deepcopy(module).half()
    assert {part.dtype for part in half.parameters()} == {torch.float16}
    assert half(x.half()).dtype == torch.float16
    assert copy.deepcopy(module).to("meta")(x.to("meta")).shape == (4, 20)
    traced = torch.jit.trace(module, x, check_trace=False)
    wider = torch.randn(7, 12)
    torch.testing.assert_close(traced(wider), module(wider), rtol=0.0, atol=0.0)


def test_index_is_a_buffer_and_factors_are_named_as_in_the_graph() -> None:
    model = mlp()
    choices: Choices = {"0.weight": fit(GaugeFixed(5, "pivoted"), "0.weight", model[0].weight)}
    result = factorize_module(model, choices)
    assert {name for name, _ in result[0].named_parameters()} == {"weight_basis", "weight_mix", "bias"}
    assert {name for name, _ in result[0].named_buffers()} == {"weight_index"}
    assert "0.weight_basis" in result.state_dict()


def test_mlp_equals_dense_copy_and_dense_weights_are_gone() -> None:
    model = mlp()
    before = snapshot(model)
    choices = choose(model, ["0.weight", "2.weight", "3.weight"])
    result = factorize_module(model, choices)
    x = torch.randn(3, 12)
    torch.testing.assert_close(result(x), dense_copy(model, choices)(x), rtol=1e-5, atol=1e-5)
    assert not result.state_dict().keys() & choices.keys()
    assert not {id(part) for part in result.parameters()} & {id(part) for part in model.parameters()}
    assert_untouched(model, before)


def test_dense_choice_leaves_the_module() -> None:
    model = mlp()
    result = factorize_module(model, {"0.weight": (Dense(), {"weight": model[0].weight})})
    assert type(result[0]) is nn.Linear
    x = torch.randn(3, 12)
    assert torch.equal(result(x), model(x))


def test_the_model_may_be_the_linear_layer_itself() -> None:
    model = nn.Linear(12, 20)
    result = factorize_module(model, {"weight": fit(LowRank(3), "weight", model.weight)})
    assert isinstance(result, FactorizedLinear)


def test_row_32_tied_embedding_stays_tied() -> None:
    model = llama()
    choices = choose(model, linear_names(model, "layers"))
    result = factorize_module(model, choices)
    assert result.lm_head.weight is result.model.embed_tokens.weight
    ids = torch.randint(0, 64, (2, 7))
    mask = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        actual = result(input_ids=ids, attention_mask=mask).logits
        expected = dense_copy(model, choices)(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_row_32_a_tied_weight_is_factored_in_both_uses_or_not_at_all() -> None:
    model = llama()
    weight = model.lm_head.weight
    choices: Choices = {"lm_head.weight": fit(LowRank(16), "lm_head.weight", weight)}
    result = factorize_module(model, choices)
    assert result.lm_head.weight_left is result.model.embed_tokens.weight_left
    assert sum(part.numel() for part in result.parameters()) < sum(
        part.numel() for part in model.parameters()
    )
    form, factors = choices["lm_head.weight"]
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.lm_head.weight.copy_(form.to_dense(factors))
        ids = torch.randint(0, 64, (2, 7))
        torch.testing.assert_close(result(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"embed_tokens.*Embedding.*ignore"):
        factorize_module(model, {"lm_head.weight": fit(GaugeFixed(4), "lm_head.weight", weight)})


def test_alias_finds_the_weight() -> None:
    model = mlp()
    choices: Choices = {"safe_name": fit(LowRank(4), "safe_name", model[0].weight)}
    result = factorize_module(model, choices, {"0.weight": "safe_name"})
    assert isinstance(result[0], FactorizedLinear)


def test_row_33_shared_module_is_replaced_everywhere() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.again = self.first
            self.all = nn.ModuleList([self.first, nn.ReLU(), self.again])

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.all[0](self.first(x)))

    torch.manual_seed(0)
    model = Shared()
    choices: Choices = {"first.weight": fit(LowRank(3), "first.weight", model.first.weight)}
    result = factorize_module(model, choices)
    assert isinstance(result.first, FactorizedLinear)
    assert result.first is result.again
    assert result.first is result.all[0]
    x = torch.randn(4, 8)
    torch.testing.assert_close(result(x), dense_copy(model, choices)(x), rtol=1e-5, atol=1e-5)


def test_row_33_two_modules_with_one_weight_keep_their_own_biases() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    choices: Choices = {"0.weight": fit(LowRank(3), "0.weight", model[0].weight)}
    result = factorize_module(model, choices)
    assert all(isinstance(module, FactorizedLinear) for module in result)
    x = torch.randn(4, 8)
    torch.testing.assert_close(result(x), dense_copy(model, choices)(x), rtol=1e-5, atol=1e-5)


def test_row_35_gpt2_conv1d_is_recognised_by_what_it_computes() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).eval()
    names = [name for name, part in model.named_parameters() if ".h." in name and part.dim() == 2]
    assert any(model.get_parameter(name).shape[0] == model.get_parameter(name).shape[1] for name in names)
    choices = choose(model, names, transposed=True)
    result = factorize_module(model, choices)
    assert result.transformer.h[0].attn.c_attn.weight.shape == (24, 72)
    ids = torch.randint(0, 50, (2, 6))
    with torch.no_grad():
        actual, expected = result(ids).logits, dense_copy(model, choices, transposed=True)(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_row_35_strided_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    model[0].weight = nn.Parameter(torch.randn(12, 20).t())
    choices = choose(model, ["0.weight"])
    x = torch.randn(3, 12)
    actual = factorize_module(model, choices)(x)
    torch.testing.assert_close(actual, dense_copy(model, choices)(x), rtol=1e-5, atol=1e-5)


def test_bert_equals_dense_copy() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=50
    )
    model = BertModel(config).eval()
    choices = choose(model, linear_names(model, "layer"))
    result = factorize_module(model, choices)
    ids = torch.randint(0, 50, (2, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        actual = result(input_ids=ids, attention_mask=mask).last_hidden_state
        expected = dense_copy(model, choices)(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_row_37_flags_modes_and_hooks_are_kept() -> None:
    model = mlp().train()
    model[0].weight.requires_grad_(False)
    model[3].eval()
    calls: list[nn.Module] = []
    model[2].register_forward_hook(lambda module, args, output: calls.append(module))
    result = factorize_module(model, choose(model, ["0.weight", "2.weight", "3.weight"]))
    assert not calls, "the probe must not run the user's hooks"
    assert result.training
    assert result[0].training
    assert not result[3].training
    assert {name: part.requires_grad for name, part in result[0].named_parameters()} == {
        "weight_left": False,
        "weight_right": False,
        "bias": True,
    }
    assert all(part.requires_grad for part in result[2].parameters())
    result(torch.randn(2, 12))
    assert calls == [result[2]]


class Adapted(nn.Linear):
    """A low-rank adapter that does nothing yet, as adapters do at first."""

    def __init__(self) -> None:
        super().__init__(12, 20)
        self.down, self.up = nn.Linear(12, 2), nn.Linear(2, 20)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer", [Adapted(), Scaled(12, 20), nn.Embedding(20, 12, max_norm=1.0)], ids=lambda m: type(m).__name__
)
def test_row_28_module_that_is_not_a_plain_linear_map_is_refused(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=rf"'0' of class {type(layer).__name__} .*ignore"):
        factorize_module(model, {"0.weight": fit(LowRank(3), "0.weight", model[0].weight)})
    assert_untouched(model, before)


def test_unknown_weight_is_refused() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match=r"no weight '7\.weight'"):
        factorize_module(model, {"7.weight": fit(LowRank(3), "7.weight", model[0].weight)})


def test_g16_replaced_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    choices = choose(model, ["0.weight", "2.weight"])
    copied: list[int] = []
    original = nn.Parameter.__deepcopy__

    def record(self: nn.Parameter, memo: dict[int, object]) -> nn.Parameter:
        copied.append(id(self))
        return original(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", record)
    factorize_module(model, choices)
    assert id(model[0].weight) not in copied
    assert id(model[3].weight) in copied


def test_global_random_state_is_left_alone() -> None:
    model = mlp()
    choices = choose(model, ["0.weight"])
    state = torch.get_rng_state()
    factorize_module(model, choices)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_of_every_site_is_what_the_region_is_there(name: str) -> None:
    """A layer holds the factors of its own site only; the second of a stack once ran without them."""
    case = CASES[name]
    if not case.applies:
        pytest.skip("only looked up")
    analysis = random_analysis(case)
    fitted, factors = case.large.fit(analysis.weights, analysis)
    for site in range(len(analysis.weights)):
        rows, columns = fitted.to_dense(factors, site).shape
        x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
        layer = FactorizedLinear(fitted, factors, shape=(rows, columns), site=site)
        torch.testing.assert_close(layer(x), fitted.apply(x, factors, site), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.weight, fitted.to_dense(factors, site), rtol=1e-4, atol=1e-4)


def test_a_table_of_rows_on_their_own_grows_and_leaves_what_is_stored_alone() -> None:
    model = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 12))
    result = factorize_module(model, {"0.weight": fit(TokenMPS(12, 4), "0.weight", model[0].weight)})
    table, ids, rows = result[0], torch.tensor([[3, 19], [20, 22]]), torch.randn(3, 12)
    before = {name: (part.data_ptr(), part.clone()) for name, part in table.named_parameters()}
    table.add_tokens(rows)
    for name, (place, value) in before.items():
        assert table.get_parameter(name).data_ptr() == place
        assert torch.equal(table.get_parameter(name), value)
    with torch.no_grad():
        found = table(ids)
        torch.testing.assert_close(found[0], model[0].weight[ids[0]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], rows[[0, 2]], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="cannot grow"):
        factorize_module(model, {"0.weight": fit(LowRank(3), "0.weight", model[0].weight)})[0].add_tokens(
            rows
        )
    for wrong in (rows[:, :5], torch.full((1, 12), float("nan")), torch.ones(1, 12, dtype=torch.int64)):
        with pytest.raises(GeofxError):
            table.add_tokens(wrong)
