"""ONNX files do what the program does, weigh what the plan says, and are published whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from geofx.errors import (
    ArtifactError,
    ConfigError,
    ExportError,
    MissingDependencyError,
    ResourceError,
    VerificationError,
)
from geofx.export import onnx_file
from geofx.export.onnx import OnnxReport, to_onnx
from geofx.export.onnx_runtime import OnnxRunner
from geofx.export.staging import staging
from geofx.factorizations import Factored, Factorization, Factors, GaugeFixed, LowRank
from geofx.passes.canonicalize import Canonicalize
from geofx.passes.cleanup import Cleanup
from geofx.passes.contract import run_passes
from geofx.passes.find_sites import FindSites, sites_of
from geofx.passes.lower import Lower
from geofx.program import Program
from geofx.region import Region
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site
from geofx.trace import trace

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FORMATS = (LowRank(5), GaugeFixed(5), GaugeFixed(5, "pivoted"))
IDS = torch.tensor([[3, 5, 7, 11, 13, 17, 19], [0, 0, 0, 2, 4, 6, 8]])
TOKENS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


def fit(factorization: Factorization, site: Site, weight: Tensor) -> tuple[Factorization, Factors]:
    dense = {site.weight: (weight.t() if site.transposed else weight).detach()}
    return factorization.fit(
        dense, RegionAnalysis(Region(site.weight, "single", (site,)), dense, {site.weight: Metric()})
    )


def lowered(model: nn.Module, example: Mapping[str, Tensor], inside: str = "") -> Program:
    """The program of ``model`` with every site under ``inside`` factorized, formats taking turns."""
    program = trace(model.eval(), example)
    passes = [Canonicalize(), FindSites()]
    run_passes(program, passes)
    sites = [site for site in sites_of(program) if inside in site.weight]
    assert sites
    rewrites = {
        s.weight: Factored(*fit(FORMATS[i % 3], s, program.weight(s.weight)), (s.weight,))
        for i, s in enumerate(sites)
    }
    run_passes(program, [Lower(rewrites), Cleanup()], passes[1].writes)
    assert not {site.weight for site in sites} & {name for name, _ in program.tensors()}
    return program


def mlp_program(dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 80), nn.GELU(), nn.Linear(80, 64, bias=False), nn.Linear(64, 17)).to(
        dtype
    )
    return lowered(model, {"input": torch.randn(3, 24, dtype=dtype)})


def llama_program() -> Program:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return lowered(LlamaForCausalLM(config), TOKENS, "layers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, OnnxReport]:
    program = llama_program()
    return program, to_onnx(program, tmp_path_factory.mktemp("llama") / "model.onnx")


@pytest.fixture(scope="module")
def mlp() -> Program:
    return mlp_program()


def assert_report(report: OnnxReport, program: Program, shapes: int) -> None:
    assert report.planned_bytes == program.size_bytes()
    assert report.optimized_bytes <= 1.05 * report.planned_bytes  # row 142
    files = [file for file in report.path.parent.iterdir() if file.name.startswith(report.path.name)]
    assert report.size_bytes == sum(file.stat().st_size for file in files)
    assert len(report.differences) == shapes  # row 146
    assert report.max_difference < 1e-4


def assert_nothing_published(folder: Path) -> None:
    assert not list(folder.iterdir())


def test_llama_with_padded_row_at_all_shapes(llama: tuple[Program, OnnxReport]) -> None:
    program, report = llama
    assert_report(report, program, 4)
    assert list(report.differences)[1:3] == ["batch=1, sequence=7", "batch=2, sequence=1"]
    ids = torch.randint(1, 200, (5, 23))
    expected = program(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    actual = OnnxRunner(report.path)({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    torch.testing.assert_close(actual[0], expected, rtol=1e-4, atol=1e-5)


def test_gpt2_with_conv1d(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=60, n_positions=32))
    program = lowered(model, TOKENS, ".h.")
    assert_report(to_onnx(program, tmp_path / "model.onnx"), program, 4)


def test_bert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=60
    )
    program = lowered(BertModel(config), TOKENS, "layer")
    report = to_onnx(program, tmp_path / "model.onnx")
    assert_report(report, program, 4)
    assert OnnxRunner(report.path).output_names == ("last_hidden_state", "pooler_output")


def test_mlp_and_untouched_model(tmp_path: Path, mlp: Program) -> None:
    assert_report(to_onnx(mlp, tmp_path / "model.onnx"), mlp, 3)
    dense = trace(nn.Linear(24, 40).eval(), {"input": torch.randn(3, 24)})
    assert_report(to_onnx(dense, tmp_path / "dense.onnx"), dense, 3)


def test_rows_32_143_tied_embedding_is_stored_once(llama: tuple[Program, OnnxReport]) -> None:
    program, report = llama
    table = 4 * program.weight("model.embed_tokens.weight").numel()
    graph = onnx.load(str(report.path)).graph
    tables = [tensor for tensor in graph.initializer if 200 in tensor.dims]
    assert [len(tensor.raw_data) for tensor in tables] == [table]
    assert report.optimized_bytes < program.size_bytes() + table // 2


def test_row_35_no_transpose_of_a_weight_is_left(llama: tuple[Program, OnnxReport]) -> None:
    graph = onnx.load(str(llama[1].path)).graph
    weights = {tensor.name for tensor in graph.initializer}
    assert not [node.name for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]


def test_row_144_weights_are_always_external(
    llama: tuple[Program, OnnxReport], mlp: Program, tmp_path: Path
) -> None:
    graph = onnx.load(str(llama[1].path), load_external_data=False).graph
    inline = [tensor for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    assert len(inline) < len(graph.initializer)
    assert all(len(tensor.raw_data) < 1024 for tensor in inline)
    report = to_onnx(mlp, tmp_path / "model.onnx")
    locations = {
        entry.value
        for tensor in onnx.load(str(report.path), load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {file.name for file in tmp_path.iterdir()} - {"model.onnx"}


def test_row_148_only_standard_operators_and_named_axes(llama: tuple[Program, OnnxReport]) -> None:
    model = onnx.load(str(llama[1].path), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]
    assert not model.functions
    axes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input
    }
    assert axes == {name: ["batch", "sequence"] for name in TOKENS}
    (output,) = model.graph.output
    assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == [
        "batch",
        "sequence",
        200,
    ]


def test_row_125_file_tells_nothing_of_this_machine(llama: tuple[Program, OnnxReport]) -> None:
    assert str(Path.cwd()).encode() not in llama[1].path.read_bytes()
    assert b".py" not in llama[1].path.read_bytes()


def test_row_142_folded_factors_are_refused(tmp_path: Path) -> None:
    class Folding(nn.Module):
        """x @ (A @ B): a constant product, which every runtime multiplies out."""

        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.randn(64, 4)), nn.Parameter(torch.randn(4, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.left @ self.right)

    program = trace(Folding().eval(), {"x": torch.randn(3, 64)})
    with pytest.raises(VerificationError, match=r"16384 bytes, planned 2048: folded"):
        to_onnx(program, tmp_path / "model.onnx")
    assert_nothing_published(tmp_path)


def test_row_147_difference_is_an_error(
    tmp_path: Path, mlp: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OnnxRunner.__call__

    def wrong_when_long(self: OnnxRunner, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        outputs = original(self, inputs)
        return [value * (1.001 if len(value) > 2 else 1) for value in outputs]

    monkeypatch.setattr(OnnxRunner, "__call__", wrong_when_long)
    where = (
        r"differs .* allowed is .*output 'output' at batch=5, most at index \[\d, \d+\] of shape \[5, 17\]"
    )
    with pytest.raises(VerificationError, match=where):
        to_onnx(mlp, tmp_path / "model.onnx")
    assert_nothing_published(tmp_path)
    assert to_onnx(mlp, tmp_path / "model.onnx", rtol=1e-2).max_difference > 0


def test_row_97_leftovers_of_a_killed_export_are_removed_and_no_others(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from pathlib import Path; from geofx.export.staging import staging\n"
        "with staging(Path(sys.argv[1]) / 'model.onnx', 1) as folder:\n"
        "    (folder / 'part').write_text('x'); print(folder, flush=True); time.sleep(60)"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        dead, alive = (Path(child.stdout.readline().strip()) for child in children if child.stdout)
        children[0].kill()
        children[0].wait()
        (tmp_path / ".tmp-mine.export").mkdir()
        assert (dead / "part").exists()
        with staging(tmp_path / "other.onnx", 1) as mine:
            assert mine.is_dir()
            assert not dead.exists()
            assert (alive / "part").exists()
        kept = {alive.name, f"{alive.name}.lock", ".tmp-mine.export"}
        assert {entry.name for entry in tmp_path.iterdir()} == kept
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_row_155_export_is_reproducible(tmp_path: Path, mlp: Program) -> None:
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        to_onnx(mlp, tmp_path / name / "model.onnx")
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2


def test_rows_97_100_replacing_an_export_leaves_one_whole_export(tmp_path: Path, mlp: Program) -> None:
    (tmp_path / "model.onnx.notes.data").write_text("mine")
    first = to_onnx(mlp, tmp_path / "model.onnx")
    other = trace(nn.Linear(24, 40).eval(), {"input": torch.randn(3, 24)})
    second = to_onnx(other, tmp_path / "model.onnx")
    assert first.size_bytes != second.size_bytes
    assert len(list(tmp_path.iterdir())) == 3, "the old data is gone, the user's file is not"
    x = torch.randn(2, 24)
    torch.testing.assert_close(OnnxRunner(second.path)({"input": x})[0], other(x), rtol=1e-4, atol=1e-5)


def test_row_97_failure_midway_leaves_the_old_export(
    tmp_path: Path, mlp: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_onnx(mlp, tmp_path / "model.onnx")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = trace(nn.Linear(24, 40).eval(), {"input": torch.randn(3, 24)})

    def fail(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_file, "_require_unfolded", fail)
    with pytest.raises(ResourceError, match="disk is too small"):  # row 98
        to_onnx(other, tmp_path / "model.onnx")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model.bin", ConfigError), ("missing/model.onnx", ArtifactError), ("folder.onnx", ArtifactError)],
)
def test_row_99_bad_target_is_refused_before_any_work(
    tmp_path: Path, name: str, kind: type[Exception], mlp: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.setattr(onnx_file, "to_onnx_model", lambda program: pytest.fail("work was started"))
    with pytest.raises(kind):
        to_onnx(mlp, tmp_path / name)


def test_row_101_link_is_kept(tmp_path: Path, mlp: Program) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "model.onnx")
    report = to_onnx(mlp, tmp_path / "link.onnx")
    assert (tmp_path / "link.onnx").is_symlink()
    assert report.path == tmp_path / "real" / "model.onnx"
    OnnxRunner(tmp_path / "link.onnx")


def test_row_132_stdout_stays_clean(tmp_path: Path, mlp: Program, capfd: pytest.CaptureFixture[str]) -> None:
    to_onnx(mlp, tmp_path / "model.onnx")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_row_133_missing_package(
    package: str, tmp_path: Path, mlp: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf'{package} .*pip install "geofx\[onnx\]"'):
        to_onnx(mlp, tmp_path / "model.onnx")


def test_row_150_float16_runs_and_types_without_kernels_are_refused(tmp_path: Path) -> None:
    half = mlp_program(torch.float16)
    report = to_onnx(half, tmp_path / "half.onnx")
    assert report.optimized_bytes <= 1.05 * report.planned_bytes
    with pytest.raises(ExportError, match=r"Erf.*float32 copy"):
        to_onnx(mlp_program(torch.float64), tmp_path / "double.onnx")
    with pytest.raises(ExportError, match=r"bfloat16.*model\.half\(\)"):
        to_onnx(mlp_program(torch.bfloat16), tmp_path / "model.onnx")


def test_row_153_names_are_made_plain_and_unique(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, größe: Tensor) -> dict[str, Any]:
            y = self.layer(größe)
            return {"a b": y, "a-b": y + 1, "größe": (y * 2, {"x": y * 3}), "n": 3}

    program = trace(Named().eval(), {"größe": torch.randn(3, 6)})
    runner = OnnxRunner(to_onnx(program, tmp_path / "model.onnx").path)
    assert runner.input_names == ("gr__e",)
    assert len(set(runner.output_names)) == 4
    assert all(name.isascii() for name in runner.output_names)


def test_row_154_broken_file_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"cannot load.*CPUExecutionProvider"):
        OnnxRunner(tmp_path / "model.onnx")


def test_program_is_left_alone(tmp_path: Path, mlp: Program) -> None:
    before = str(mlp.graph), mlp.graph_module.code, {name: value.clone() for name, value in mlp.tensors()}
    to_onnx(mlp, tmp_path / "model.onnx")
    assert (str(mlp.graph), mlp.graph_module.code) == before[:2]
    assert all(torch.equal(value, before[2][name]) for name, value in mlp.tensors())
