"""What calibration costs over the bare forward and backward of the same tokens, batch by batch in one run.

    python benchmarks/calibration_cost.py --model smollm2 --text wikitext-2-raw-valid.txt

Two yardsticks: the ordinary backward, which also makes weight gradients, and one through activations only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from geofx.batches import Batch
from geofx.objective import NextToken
from geofx.passes.calibrate import Recorder
from geofx.passes.canonicalize import Canonicalize
from geofx.passes.contract import run_passes
from geofx.passes.find_sites import FindSites
from geofx.sources import load_source
from geofx.text import windows
from geofx.trace import trace


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True)
    parser.add_argument("--batches", type=int, default=9)
    arguments = parser.parse_args()
    source = load_source(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")
    tokens = 1024 * (arguments.batches + 1)
    batches = list(windows(text, source.tokenizer, length=512, batch_size=2, limit_tokens=tokens))
    program = trace(source.model, batches[0])
    run_passes(program, [Canonicalize(), FindSites()])
    recorder = Recorder(program, NextToken(), with_gradients=True)
    times: dict[str, list[float]] = {"calibration": [], "ordinary": [], "activations only": []}
    for index, batch in enumerate(batches):
        measured = {
            "calibration": seconds(lambda batch=batch: recorder.add(batch)),
            "ordinary": seconds(lambda batch=batch: bare(source.model, batch, weights=True)),
            "activations only": seconds(lambda batch=batch: bare(source.model, batch, weights=False)),
        }
        if index > 0:  # the first batch warms up
            for name, value in measured.items():
                times[name].append(value)
    for name in ("ordinary", "activations only"):
        ratios = [one / other for one, other in zip(times["calibration"], times[name], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} batches of 1024 tokens"
        print(f"calibration / {name} forward and backward: median {statistics.median(ratios):.2f} ({spread})")


def bare(model: torch.nn.Module, batch: Batch, *, weights: bool) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(weights)
    if not weights:
        model.get_input_embeddings().weight.requires_grad_(True)
    loss, _ = NextToken().gradient_seed(model(**batch, use_cache=False), batch)
    loss.backward()
    model.zero_grad(set_to_none=True)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
