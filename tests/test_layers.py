"""The house as drawn: imports go strictly down, packages are mapped, files and functions stay small."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "geofx": ROOT / "geofx",
    "geofx.passes": ROOT / "passes",
    "geofx.cost_models": ROOT / "cost_models",
}

LAYERS = (
    "geofx.__init__ geofx.__main__ geofx.cli geofx.cli_console geofx.cli_options geofx.cli_optimize "
    "geofx.cli_results geofx.cli_analysis geofx.cli_compare geofx.cli_frontier geofx.cli_original "
    "geofx.cli_recover geofx.cli_bench geofx.cli_export geofx.cli_generate geofx.cli_taxonomy geofx.taxonomy "
    "geofx.demo geofx.doctor",
    "geofx.api geofx.restore geofx.compare geofx.optimization geofx.latency_budget geofx.runtime "
    "geofx.decoder_bench geofx.exported_decoder",
    "geofx.analysis",
    "geofx.clock",
    "geofx.analysis_store geofx.summary geofx.compare_run geofx.frontier_run",
    "geofx.model geofx.sources geofx.text geofx.gguf_header geofx.recovery geofx.training geofx.checkpoint",
    "geofx.report geofx.report_rows geofx.report_table geofx.report_figures geofx.report_html geofx.stages "
    "geofx.artifact geofx.stand_in geofx.graph_json geofx.graph_tree geofx.graph_ops geofx.graph_explorer "
    "geofx.tensor_file geofx.bench_inputs geofx.comparison geofx.comparison_table geofx.comparison_figures "
    "geofx.cache geofx.compare_choice geofx.compare_fits geofx.compare_latency geofx.compare_prices "
    "geofx.compare_subjects geofx.piece_latency geofx.charts geofx.frontier geofx.frontier_views "
    "geofx.block_figure",
    "geofx.huggingface geofx.pretrained geofx.calls geofx.fusion geofx.result_checks",
    "geofx.verify geofx.export geofx.factorized_module geofx.compression geofx.parameter_space "
    "geofx.generated_text",
    "geofx.passes",
    "geofx.objective",
    "geofx.batches",
    "geofx.trace",
    "geofx.program geofx.annotations geofx.graph_text geofx.graph_block",
    "geofx.planner geofx.partition geofx.option_table geofx.plan geofx.choice geofx.options geofx.screening "
    "geofx.method geofx.recipes geofx.papers geofx.effort geofx.uniform",
    "geofx.cost_models",
    "geofx.workload",
    "geofx.piece",
    "geofx.factorizations geofx.ops",
    "geofx.region geofx.site geofx.moments geofx.region_analysis geofx.spectrum geofx.geometry "
    "geofx.subspaces",
    "geofx.budget geofx.target geofx.linalg geofx.patterns geofx.progress geofx.environment geofx.latency "
    "geofx.strict_json geofx.record_file geofx.folder geofx.digest geofx.sampling",
    "geofx.errors",
)
"""Top to bottom; a module may import its own row and those below it."""

RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row.split()}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts))] = path
    return found


def layer_of(module: str) -> int:
    name = module.removesuffix(".__init__") if module != "geofx.__init__" else module
    while name not in RANK:
        name, _, rest = name.rpartition(".")
        assert name, f"{module} has no layer"
        assert rest
    return RANK[name]


def imports_of(tree: ast.AST) -> list[str]:
    """Every geofx module that is imported, for type checking too."""
    found: list[str] = []
    known = modules()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("geofx"):
            wholes = [f"{node.module}.{name.name}" for name in node.names]
            found += [whole if whole in known else str(node.module) for whole in wholes]
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.startswith("geofx")]
    return found


@pytest.mark.parametrize(("name", "path"), modules().items(), ids=list(modules()))
def test_imports_go_down(name: str, path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for imported in imports_of(tree):
        target = "geofx.__init__" if imported == "geofx" else imported
        assert layer_of(name) <= layer_of(target), f"{name} imports {imported}, which lies above it"


@pytest.mark.parametrize(("name", "path"), modules().items(), ids=list(modules()))
def test_no_geofx_import_inside_a_function(name: str, path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert not imports_of(node), f"{name}.{node.name}"


def test_a_contract_never_imports_its_members() -> None:
    for name, path in modules().items():
        if name.endswith(".contract"):
            package = name.removesuffix(".contract")
            imported = imports_of(ast.parse(path.read_text(encoding="utf-8")))
            assert not [module for module in imported if module.startswith(package)]


def test_packages_are_all_mapped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {
        ".".join((package, *path.parent.relative_to(folder).parts))
        for package, folder in FOLDERS.items()
        for path in folder.rglob("__init__.py")
    }
    assert set(settings["packages"]) == found


def test_files_and_functions_stay_small() -> None:
    lengths = []
    for path in modules().values():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lengths.append((node.end_lineno or 0) - node.lineno + 1)
    lengths.sort()
    assert lengths[len(lengths) * 9 // 10] <= 30


def test_every_test_file_asserts_something_and_is_small() -> None:
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        assert "assert " in text or "pytest.raises" in text, path


def test_the_library_names_no_model() -> None:
    """No branch on an architecture: such names stand only where a model is fetched or a paper cited."""
    words = ("llama", "gpt2", "gemma", "qwen", "mixtral", "bert", "mistral")
    for name, path in modules().items():
        if name in ("geofx.sources", "geofx.demo", "geofx.recipes", "geofx.papers"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
                assert not [word for word in words if word in node.value.lower()], f"{name}: {node.value}"
