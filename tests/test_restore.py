"""The model's own class out of a saved folder: every tensor of the graph's, or an error that names one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import nn

import geofx
from geofx import artifact, restore, sources
from geofx.errors import ArtifactCorruptError, ConfigError, GeofxError, MissingDependencyError
from geofx.report import Report
from geofx.sources import module_from_config


def resnet() -> nn.Module:
    """Convolutions with batch norms whose statistics are those of a trained model."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=6)
    model = transformers.ResNetForImageClassification(config)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else 0.0))
    return model.eval()


def images(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def saved(model: nn.Module, batches: list[Any], folder: Path, size: float = 1.0) -> Path:
    budget = geofx.Budget(size=size, scope="factorizable")
    return geofx.optimize(model, budget, calibration=batches).save(folder / "out")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that is optimized once; tests copy it."""
    batches = [tiny_models.example("llama", 4, 24, seed) for seed in range(3)]
    return saved(tiny_models.build("llama"), batches, tmp_path_factory.mktemp("decoder"), 0.8)


def copied(shared: Path, folder: Path) -> Path:
    return Path(shutil.copytree(shared, folder / "out"))


def decoder(folder: Path, size: float = 0.8, dtype: torch.dtype = torch.float32) -> Path:
    batches = [tiny_models.example("llama", 4, 24, seed) for seed in range(3)]
    return saved(tiny_models.build("llama").to(dtype), batches, folder, size)


def test_trained_buffers_come_back(tmp_path: Path) -> None:
    model = resnet()
    module = geofx.load(saved(model, [images(4, seed) for seed in range(3)], tmp_path)).to_module()
    tracked = module.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(tracked[name], value), name
    with torch.no_grad():
        assert torch.equal(module(**images(3, 9)).logits, model(**images(3, 9)).logits)


def test_a_bfloat16_model_comes_back_in_bfloat16(tmp_path: Path) -> None:
    result = geofx.load(decoder(tmp_path, dtype=torch.bfloat16))
    module = result.to_module()
    assert {value.dtype for value in module.parameters()} == {torch.bfloat16}
    inputs = tiny_models.example("llama", 3, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            module(**inputs, use_cache=False).logits, result(**inputs).logits, rtol=0.02, atol=0.02
        )


def test_loading_builds_no_model_and_rebuilding_leaves_the_random_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, built = decoder(tmp_path), []
    real = sources.module_from_config
    monkeypatch.setattr(restore, "module_from_config", lambda *given: built.append(1) or real(*given))
    state = torch.random.get_rng_state()
    result = geofx.load(path)
    assert not built
    frozen = result.to_module()
    assert built == [1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert frozen.lm_head.weight is frozen.model.embed_tokens.weight


def test_frozen_weights_come_back_frozen(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    model.model.layers[0].requires_grad_(False)
    batches = [tiny_models.example("llama", 4, 24, seed) for seed in range(3)]
    module = geofx.load(saved(model, batches, tmp_path, 0.6)).to_module()
    assert not any(value.requires_grad for value in module.model.layers[0].parameters())
    assert all(value.requires_grad for value in module.model.layers[1].parameters())


def with_config(path: Path, **changes: Any) -> geofx.OptimizedModel:
    """The result in ``path`` as if its configuration had been another."""
    loaded = geofx.load(path)
    config = {**(loaded.config or {}), **changes}
    return replace(
        loaded, rebuild=lambda: restore._rebuilt(replace(artifact.load(path), config=config), loaded.rewrites)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"the graph does not hold 'model\.layers\.2\."),
        ({"hidden_size": 32}, "the graph does not hold"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "the graph does not hold|LlamaFor"),
        ({"architectures": ["Nothing"]}, "no Nothing"),
        ({"model_type": "no_such"}, "no_such"),
        ({"hidden_size": "x"}, "cannot load"),
        ({"num_attention_heads": 0}, "cannot load"),
        ({"dtype": "os"}, "cannot load"),
        ({"attn_implementation": "someone/kernel"}, "kernel from the hub"),
    ],
)
def test_a_configuration_that_does_not_fit_is_a_plain_error(
    tmp_path: Path, shared: Path, changes: dict[str, Any], message: str
) -> None:
    result = with_config(copied(shared, tmp_path), **changes)
    with pytest.raises(ConfigError, match=message):
        result.to_module()


def test_kernels_of_inner_configurations_are_refused() -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {**small, "vocab_size": 16},
        "vision_config": small,
        "attn_implementation": {"text_config": "someone/kernel"},
    }
    with pytest.raises(ConfigError, match="someone/kernel"):
        module_from_config(config)


def test_without_transformers_the_graph_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = decoder(tmp_path)
    monkeypatch.setitem(sources.sys.modules, "transformers", None)
    result = geofx.load(path)
    assert torch.isfinite(result(**tiny_models.example("llama")).logits).all()
    with pytest.raises(MissingDependencyError, match="geofx\\[hf\\]"):
        result.to_module()


@pytest.mark.parametrize("mode", ["two_sided", "forward", "data_free"])
def test_fidelity_comes_back_as_it_was_in_every_mode(mode: Any, tmp_path: Path) -> None:
    batches = [tiny_models.example("mlp", 32, seed=seed) for seed in range(4)]
    settings: dict[str, Any] = {"holdout": batches[3:], "example": batches[0]}
    model = tiny_models.build("mlp")
    analysis = geofx.analyze(model, None if mode == "data_free" else batches[:3], mode=mode, **settings)
    result = analysis.apply(analysis.plan(geofx.Budget(size=0.9)))
    result.save(tmp_path / "out")
    assert result.fidelity is not None
    assert geofx.load(tmp_path / "out").fidelity == result.fidelity


def test_figures_that_are_no_fidelity_are_refused(tmp_path: Path) -> None:
    report = Report.from_json(json.dumps(geofx.load(decoder(tmp_path, 1.0)).report.to_json()))
    for figures in ({"kl": 1.0}, {**report.fidelity, "more": 1.0}):
        with pytest.raises(ArtifactCorruptError, match="fidelity"):
            restore._fidelity(replace(report, fidelity=figures))
    assert issubclass(ArtifactCorruptError, GeofxError)
