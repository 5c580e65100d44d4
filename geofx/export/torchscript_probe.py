"""Run alone in a process without geofx: load a TorchScript file, run it on given inputs, write its outputs.

Called as ``python -I torchscript_probe.py MODEL INPUTS OUTPUTS``; tensors are named ``case/position``.
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(model: str, inputs: str, outputs: str) -> None:
    """Answer every case."""
    sys.modules["geofx"] = None  # type: ignore[assignment]  # importing it fails, as on a machine without it
    module = torch.jit.load(model)  # type: ignore[no-untyped-call]
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


if __name__ == "__main__":
    main(*sys.argv[1:])
