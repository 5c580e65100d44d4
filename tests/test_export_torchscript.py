"""TorchScript files equal the eager module at unseen shapes, in a process that has no geofx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from geofx.errors import ArtifactError, ConfigError, ExportError, VerificationError
from geofx.export import torchscript
from geofx.export.torchscript import to_torchscript
from geofx.factorizations import Factored, Factorization, Factors, GaugeFixed, LowRank
from geofx.factorized_module import FactorizedLinear, factorize_module
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site

FORMATS = (LowRank(5), GaugeFixed(5), GaugeFixed(5, "pivoted"))
IDS = torch.tensor([[3, 5, 7, 11, 13, 17, 19], [0, 0, 0, 2, 4, 6, 8]])
TOKENS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


def fit(factorization: Factorization, name: str, weight: Tensor) -> tuple[Factorization, Factors]:
    dense = {name: weight.detach()}
    region = Region(name, "single", (Site(name, (weight.shape[0], weight.shape[1])),))
    return factorization.fit(dense, RegionAnalysis(region, dense, {name: Metric()}))


def factorized(model: nn.Module, inside: str = "", *, transposed: bool = False) -> nn.Module:
    """``model`` with every matrix under ``inside`` factorized, formats taking turns."""
    found = {
        name: part.t() if transposed else part
        for name, part in model.named_parameters()
        if inside in name and part.dim() == 2
    }
    choices = [Factored(*fit(FORMATS[i % 3], n, w), (n,)) for i, (n, w) in enumerate(found.items())]
    result = factorize_module(model, choices)
    assert sum(isinstance(module, FactorizedLinear) for module in result.modules()) == len(found) > 0
    return result


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return factorized(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 9, bias=False)))


def llama() -> nn.Module:
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
    return factorized(LlamaForCausalLM(config), "layers")


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=60, n_positions=32)
    return factorized(GPT2LMHeadModel(config), ".h.", transposed=True)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=60
    )
    return factorized(BertModel(config), "encoder.layer")


def assert_nothing_published(folder: Path) -> None:
    assert not list(folder.iterdir())


@pytest.mark.parametrize("build", [llama, gpt2, bert], ids=lambda build: build.__name__)
def test_row_151_transformers_at_unseen_shapes_without_geofx(build: object, tmp_path: Path) -> None:
    module = build()  # type: ignore[operator]
    report = to_torchscript(module, TOKENS, tmp_path / "model.pt")
    assert list(report.differences) == [
        "batch=2, sequence=7",
        "batch=1, sequence=7",
        "batch=2, sequence=1",
        "batch=5, sequence=15",
    ]
    assert report.max_difference < 1e-5
    assert report.input_names == ("input_ids", "attention_mask")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    assert report.size_bytes == report.path.stat().st_size


def test_row_32_tied_weight_is_stored_once(tmp_path: Path) -> None:
    module = llama()
    report = to_torchscript(module, TOKENS, tmp_path / "model.pt")
    weight = module.get_parameter("model.embed_tokens.weight").detach().numpy().tobytes()
    assert report.path.read_bytes().count(weight) == 1


def test_any_process_can_load_it_without_geofx(tmp_path: Path) -> None:
    report = to_torchscript(mlp(), {"input": torch.randn(3, 12)}, tmp_path / "model.pt")
    script = (
        "import sys; sys.modules['geofx'] = None; import torch;"
        f"print(tuple(torch.jit.load({str(report.path)!r})(torch.ones(6, 12)).shape))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(6, 9)"


def test_modes_are_restored_and_dropout_is_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 20), nn.Dropout(0.5), nn.Linear(20, 9)).train()
    module[2].eval()
    report = to_torchscript(module, {"input": torch.randn(3, 12)}, tmp_path / "model.pt")
    assert report.max_difference < 1e-6
    assert [part.training for part in module.modules()] == [True, True, True, False]


class Unsteady(nn.Module):
    """Control flow on a size, which tracing fixes to the branch of the example."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 3 else x


def test_row_147_difference_at_an_unseen_shape_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"differs .* at batch=7"):
        to_torchscript(Unsteady(), {"x": torch.randn(3, 4)}, tmp_path / "model.pt")
    assert_nothing_published(tmp_path)


def test_row_151_broken_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchscript, "_trace", lambda positional, example, file: file)
    with pytest.raises(VerificationError, match="process without geofx"):
        to_torchscript(mlp(), {"input": torch.randn(3, 12)}, tmp_path / "model.pt")
    assert_nothing_published(tmp_path)


def test_module_that_cannot_be_traced_is_a_typed_error(tmp_path: Path) -> None:
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no tracing here") if torch.jit.is_tracing() else ValueError("eager")

    with pytest.raises(ExportError, match="no tracing here"):
        to_torchscript(Refusing(), {"x": torch.randn(3, 4)}, tmp_path / "model.pt")
    assert_nothing_published(tmp_path)


def test_several_outputs_keep_their_order(tmp_path: Path) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Mapping[str, object]:
            return {"first": x + 1, "second": (x * 2, None), "third": 3}

    report = to_torchscript(Several(), {"x": torch.randn(3, 4)}, tmp_path / "model.pt")
    assert report.max_difference == 0.0


@pytest.mark.parametrize(("name", "kind"), [("model.zip", ConfigError), ("missing/model.pt", ArtifactError)])
def test_row_99_bad_target_is_refused(name: str, kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind):
        to_torchscript(mlp(), {"input": torch.randn(3, 12)}, tmp_path / name)


def test_long_example_is_traced_short(tmp_path: Path) -> None:
    ids = torch.arange(96).reshape(2, 48) % 64
    report = to_torchscript(
        llama(), {"input_ids": ids, "attention_mask": ids.clamp_max(1)}, tmp_path / "m.pt"
    )
    assert list(report.differences)[0::3] == ["batch=2, sequence=16", "batch=5, sequence=33"]
    loaded, mask = torch.jit.load(report.path), torch.ones_like(ids)
    torch.testing.assert_close(loaded(ids, mask), llama()(ids, mask).logits, rtol=1e-4, atol=1e-6)


def test_row_152_python_that_torch_jit_does_not_support_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    to_torchscript(mlp(), {"input": torch.randn(3, 12)}, tmp_path / "model.pt")
    assert not caplog.records
    monkeypatch.setattr(torchscript, "UNSUPPORTED_PYTHON", (3, 0))
    to_torchscript(mlp(), {"input": torch.randn(3, 12)}, tmp_path / "model.pt")
    assert "below 3.14 only" in caplog.text
    assert "export ONNX" in caplog.text


@pytest.mark.filterwarnings("error")
def test_deprecation_of_torch_jit_is_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    to_torchscript(mlp(), {"input": torch.randn(3, 12)}, tmp_path / "model.pt")
    assert capfd.readouterr().out == ""
