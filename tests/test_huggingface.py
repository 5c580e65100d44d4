"""What `to_module` gives back is a Hugging Face model: it generates, saves, loads, takes adapters."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers
from torch import nn

import geofx
from geofx import Budget
from geofx.errors import ConfigError, GeofxError
from geofx.factorizations import LowRank, SharedBasis, TokenMPS
from geofx.factorized_module import FactorizedLinear

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def optimized(name: str, **options: Any) -> nn.Module:
    batches = [tiny_models.example(name, 4, 24, seed) for seed in range(3)]
    return geofx.optimize(
        tiny_models.build(name), Budget(size=0.75), calibration=batches, **options
    ).to_module()


@pytest.fixture(scope="module")
def decoder() -> Any:
    return optimized("llama")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "bert", "vit"])
def test_what_was_saved_loads_bit_for_bit(name: str, tmp_path: Path) -> None:
    model: Any = optimized(name)
    model.save_pretrained(tmp_path / "saved")
    loaded, info = type(model).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    expected = dict(model.state_dict())
    assert loaded.state_dict().keys() == expected.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]), key
    inputs = tiny_models.example(name, 2, 10)
    with torch.no_grad():
        for one, other in zip(model(**inputs).to_tuple(), loaded(**inputs).to_tuple(), strict=True):
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "saved/config.json").read_text()


def test_it_is_the_users_class_and_generates_with_a_cache(decoder: Any, tmp_path: Path) -> None:
    assert type(decoder) is transformers.LlamaForCausalLM
    assert any(isinstance(module, FactorizedLinear) for module in decoder.modules())
    decoder.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = decoder.generate(IDS, use_cache=True, **options)
    assert cached.shape == (2, 20)
    assert torch.equal(cached, decoder.generate(IDS, use_cache=False, **options))
    assert torch.equal(cached, loaded.generate(IDS, **options))
    for model in (copy.deepcopy(decoder), loaded):
        assert {part.dtype for part in model.half().parameters()} == {torch.float16}
        assert {part.dtype for part in model.float().parameters()} == {torch.float32}


def test_a_table_that_grew_is_saved_as_it_is(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**tiny_models.DECODER, tie_word_embeddings=False)
    batches = [tiny_models.example("llama", 4, 24, seed) for seed in range(3)]
    analysis = geofx.analyze(transformers.LlamaForCausalLM(config), batches)
    table = "model.embed_tokens.weight"
    plan = analysis.plan(Budget(size=0.95), include="*").edit({table: TokenMPS(64, 8)})
    model: Any = analysis.apply(plan).to_module()
    rows = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(0))
    model.model.embed_tokens.add_tokens(rows)
    model.save_pretrained(tmp_path)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    last = torch.arange(config.vocab_size, config.vocab_size + 3)
    assert torch.equal(loaded.model.embed_tokens(last), model.model.embed_tokens(last))


def test_without_geofx_loading_fails(decoder: Any, tmp_path: Path) -> None:
    """transformers would draw the missing weights at random, with no more than a warning."""
    decoder.save_pretrained(tmp_path)
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    alone = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert alone.returncode != 0
    assert "mismatch" in alone.stderr
    before = f"import geofx; {code}"
    after = code.replace("; ", "; import geofx; ", 1)
    for text in (before, after):
        subprocess.run([sys.executable, "-c", text, tmp_path], capture_output=True, check=True)


def test_a_cast_and_ties_survive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches = [tiny_models.example("llama", 4, 24, seed) for seed in range(3)]
    analysis = geofx.analyze(tiny_models.build("llama"), batches)
    stack = next(name for name in analysis.regions if name.endswith("{0,1}.mlp.up_proj.weight"))
    table = "model.embed_tokens.weight"
    plan = analysis.plan(Budget(size=0.9), include="*")
    kinds = [analysis.regions[name].region for name in (stack, table)]
    form = next(iter(SharedBasis.candidates(kinds[0], analysis.regions[stack])))
    plan = plan.edit({stack: form, table: LowRank(24)}, kinds)
    model: Any = analysis.apply(plan).to_module()
    model.save_pretrained(tmp_path)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert sum(part.numel() for part in loaded.parameters()) == sum(
        part.numel() for part in model.parameters()
    )
    assert {part.dtype for part in loaded.parameters()} == {torch.bfloat16}
    assert "fitted for finer numbers than torch.bfloat16" in caplog.text
    first, second = (layer.mlp.up_proj.factors for layer in loaded.model.layers)
    assert sum(first[name] is second[name] for name in first) == 1
    head, table_ = loaded.lm_head.factors, loaded.model.embed_tokens.factors
    assert all(head[name] is table_[name] for name in head)
    with torch.no_grad():
        near = (loaded(IDS).logits.float() - model(IDS).logits).norm() / model(IDS).logits.norm()
    assert near < 0.03


def test_adapters_train_on_it_and_cannot_be_lost_in_it(decoder: Any, tmp_path: Path) -> None:
    decoder.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    targets = [module for module in adapted.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert any(isinstance(module.get_base_layer(), FactorizedLinear) for module in targets)
    optimizer = torch.optim.AdamW([part for part in adapted.parameters() if part.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")(IDS).logits
    torch.testing.assert_close(again, expected)
    with pytest.raises(ConfigError, match="computed from its factors"):
        adapted.merge_and_unload()


def test_the_trainer_of_transformers_accepts_it(decoder: Any) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    validate_quantization_for_training(decoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(schema_version=99), "update geofx"),
        (lambda config: config["layers"][0].update(path="model.layers.9.mlp.up_proj"), "no layer"),
        (lambda config: config["layers"][0]["factorization"].update(name="magic"), "magic"),
        (lambda config: config["layers"][0].update(code="import os"), "does not describe"),
        (lambda config: config.pop("layers"), "layers"),
    ],
)
def test_a_damaged_description_is_a_typed_error(
    decoder: Any, tmp_path: Path, change: Any, message: str
) -> None:
    decoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((GeofxError, TypeError), match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_that_keeps_its_weights_is_saved_as_ever(tmp_path: Path) -> None:
    batches = [tiny_models.example("llama", 4, 24, seed) for seed in range(3)]
    model: Any = geofx.optimize(tiny_models.build("llama"), Budget(size=1.0), calibration=batches).to_module()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_modules_of_other_libraries_are_left_alone() -> None:
    batches = [tiny_models.example("mlp", 64, seed=seed) for seed in range(3)]
    result = geofx.optimize(tiny_models.build("mlp"), Budget(size=0.7), calibration=batches)
    assert not hasattr(result.to_module(), "hf_quantizer")
