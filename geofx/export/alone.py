"""A published file is run by a process of its own, as whoever gets it will run it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from geofx.errors import VerificationError
from geofx.export.cases import Case, require_equal

PROBE = Path(__file__).with_name("probe.py")
PROBE_TIMEOUT_S = 600


def run_alone(
    file: Path, cases: Sequence[Case], rtol: float | None, *, with_geofx: bool = False
) -> dict[str, float]:
    """Largest difference of ``file`` for every case, run by a fresh process.

    Args:
        file: TorchScript (``.pt``) or an exported program (``.pt2``).
        cases: inputs and what is expected.
        rtol: as of `require_equal`.
        with_geofx: whether the process imports geofx's operations; without, it cannot import geofx.

    Raises:
        VerificationError: it does not run there, or gives something else.
    """
    inputs, outputs = file.with_name("inputs.safetensors"), file.with_name("outputs.safetensors")
    save_file(_numbered([tuple(case.inputs.values()) for case in cases]), inputs)
    root = [str(Path(__file__).parents[2])] if with_geofx else []
    command = [sys.executable, "-I", str(PROBE), str(file), str(inputs), str(outputs), *root]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=PROBE_TIMEOUT_S, cwd=file.parent)  # noqa: S603
    except subprocess.SubprocessError as error:
        last = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip().splitlines()[-1:]
        where = "of its own" if with_geofx else "without geofx"
        what = f"the file does not run in a process {where}: {''.join(last)[:300] or error}"
        raise VerificationError(what, where=file.name, fix="nothing was published") from error
    answers = load_file(outputs)
    return {
        case.label: require_equal(case, _of_case(answers, index), rtol) for index, case in enumerate(cases)
    }


def _numbered(groups: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    return {
        f"{case}/{place}": value.clone()
        for case, group in enumerate(groups)
        for place, value in enumerate(group)
    }


def _of_case(answers: Mapping[str, Tensor], case: int) -> list[Tensor]:
    places = sum(name.startswith(f"{case}/") for name in answers)
    return [answers[f"{case}/{place}"] for place in range(places)]
