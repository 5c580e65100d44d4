"""Run alone: load a TorchScript file or an exported program, run it on given inputs, write its outputs.

Called as ``python -I probe.py MODEL INPUTS OUTPUTS [ROOT]``; tensors are named ``case/position``. ROOT is the
folder that holds geofx; without it geofx cannot be imported.
"""

import importlib
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from safetensors.torch import load_file, save_file


def main(model: str, inputs: str, outputs: str, root: str | None = None) -> None:
    """Answer every case."""
    if root is None:
        sys.modules["geofx"] = None  # type: ignore[assignment]  # importing it fails, as where there is none
    else:
        sys.path.append(root)
        importlib.import_module("geofx.ops")
    load: Callable[[str], Any] = torch.jit.load if model.endswith(".pt") else _exported
    module = load(model)
    cases: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for name, value in load_file(inputs).items():
        case, position = name.split("/")
        cases[case][int(position)] = value
    answers: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for case, values in cases.items():
            result = module(*(values[position] for position in sorted(values)))
            results = result if isinstance(result, tuple) else (result,)
            answers |= {f"{case}/{position}": value.contiguous() for position, value in enumerate(results)}
    save_file(answers, Path(outputs))


def _exported(model: str) -> Any:
    with zipfile.ZipFile(model) as archive:
        compiled = any(name.endswith(".so") for name in archive.namelist())
    return torch._inductor.aoti_load_package(model) if compiled else torch.export.load(model).module()


if __name__ == "__main__":
    main(*sys.argv[1:])
