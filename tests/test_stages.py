"""Stages: what is timed, and what another stage holds."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from geofx.stages import Stages, peak_memory_bytes


def names(stages: Stages) -> list[str]:
    return [stage.name for stage in stages.done]


def test_a_stage_that_is_run_again_forgets_what_followed_it() -> None:
    stages = Stages()
    for name in ("plan", "fit", "verify", "fit"):
        with stages(name):
            pass
    assert names(stages) == ["plan", "fit"]


def test_a_stage_within_another_is_a_part_of_it() -> None:
    stages = Stages()
    with stages("fit"):
        pass
    with stages("compare"):
        with stages("fit"):
            pass
        assert names(stages) == ["fit"]
    assert names(stages) == ["fit", "compare"]


def test_a_stage_that_fails_is_not_recorded_and_the_next_one_is() -> None:
    stages = Stages()
    with pytest.raises(ValueError, match="no"), stages("fit"):
        raise ValueError("no")
    with stages("verify"):
        pass
    assert names(stages) == ["verify"]


def test_the_peak_of_a_process_is_not_its_parents() -> None:
    held = np.ones(400_000_000, np.uint8)
    asked = "from geofx.stages import peak_memory_bytes; print(peak_memory_bytes())"
    child = int(subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True).stdout)
    assert 10_000_000 < child < peak_memory_bytes() - held.nbytes // 2
