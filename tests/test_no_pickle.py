"""Promise: geofx loads no pickle and runs no text as code (row 113); held against the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("geofx", "passes", "cost_models")
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "__import__"}
ATTRIBUTES = {
    "torch.load",
    "torch.jit.load",
    "torch.export.load",
    "torch.package.PackageImporter",
    "torch.serialization.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.hub.load",
}
PROBES = {"geofx/export/probe.py": ["torch.jit.load", "torch.export.load"]}
"""A script that a clean process runs to check the file that geofx has just written itself."""


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def names_of_imports(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it was imported as, so that no alias hides a call."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                found[name.asname or name.name.split(".")[0]] = (
                    name.name if name.asname else name.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return found


def offences(source: str) -> list[str]:
    tree = ast.parse(source)
    imported = names_of_imports(tree)
    found = [name for name in imported.values() if name.split(".")[0] in MODULES or name in ATTRIBUTES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            full = f"{imported.get(first, first)}.{rest}"
            found += [full] if full in ATTRIBUTES else []
        elif isinstance(node, ast.Call):
            first, _, rest = dotted(node.func).partition(".")
            full = f"{imported.get(first, first)}.{rest}".rstrip(".")
            pickled = any(
                word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords
            )
            unsafe_numpy = full == "numpy.load" and all(word.arg != "allow_pickle" for word in node.keywords)
            found += (
                [full]
                if full in CALLS or full.removeprefix("builtins.") in CALLS or pickled or unsafe_numpy
                else []
            )
    return found


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_row_113_no_source_loads_a_pickle_or_runs_text(path: Path) -> None:
    allowed = PROBES.get(str(path.relative_to(ROOT)), [])
    assert offences(path.read_text(encoding="utf-8")) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import pickle as p",
        "import a, dill",
        "from joblib import load as safe",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "from torch import jit\njit.load('x')",
        "import torch.jit\ntorch.jit.load('x')",
        "import torch.export as e\ne.load('x')",
        "load = __import__('torch').load",
        "import yaml\nyaml.load('x', Loader=None)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x')",
        "f('x', allow_pickle=flag)",
        "eval('1')",
        "exec('1')",
        "import builtins\nbuiltins.eval('1')",
        "def f():\n    from torch.serialization import load\n",
    ],
)
def test_the_check_finds_what_it_must(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import json\njson.load(file)",
        "from geofx import artifact\nartifact.load(path)",
        "from safetensors.torch import load_file",
    ],
)
def test_the_check_lets_the_rest_be(source: str) -> None:
    assert not offences(source)


def test_every_source_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in sources()} == set(FOLDERS)
