"""The quality ladder: plain SVD to planned gauge-fixed low rank, predicted and measured, at equal size.

    python benchmarks/quality.py --model smollm2 --text wikitext-2-raw-valid.txt

Calibrates on the first part of the text, measures on the last. ``--model`` takes what
``geofx optimize`` takes.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
from pathlib import Path

import geofx
from geofx.factorizations import Dense, GaugeFixed, LowRank
from geofx.region import TABLES
from geofx.sources import load_source
from geofx.text import windows

logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
CALIBRATION_RATIO, HOLDOUT_RATIO = 0.6, 0.15


def main() -> None:
    arguments = parse()
    started = time.perf_counter()
    source = load_source(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")
    calibration, holdout = batches(source, text, arguments)
    say(started, f"{len(calibration)} calibration and {len(holdout)} held-out batches")
    analysis = geofx.analyze(source.model, calibration, holdout=holdout, seed=0)
    for stage in analysis.stages.done:
        say(started, f"{stage.name}: {stage.seconds:.1f} s, peak {stage.peak_memory_bytes / 1e9:.2f} GB")
    rows = []
    for keep in arguments.keep:
        for name in arguments.rungs:
            begun = time.perf_counter()
            result = analysis.apply(plan_of(analysis, name, keep))
            rows.append(row_of(name, keep, result, time.perf_counter() - begun))
            say(started, json.dumps(rows[-1]))
    print_table(rows)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=list(RUNGS))
    parser.add_argument("--calibration-tokens", type=int, default=48 * 512)
    parser.add_argument("--holdout-tokens", type=int, default=16 * 1024)
    parser.add_argument("--json", help="write the rows to this file too")
    return parser.parse_args()


def batches(source, text: str, arguments: argparse.Namespace) -> tuple[list, list]:
    first = text[: int(len(text) * CALIBRATION_RATIO)]
    last = text[-int(len(text) * HOLDOUT_RATIO) :]
    calibration = windows(
        first, source.tokenizer, length=512, batch_size=2, limit_tokens=arguments.calibration_tokens
    )
    holdout = windows(
        last, source.tokenizer, length=1024, batch_size=1, limit_tokens=arguments.holdout_tokens
    )
    return list(calibration), list(holdout)


def uniform(weighting: str):
    """The same share of every matrix, as truncated SVD and SVD-LLM do."""

    def plan(analysis: geofx.Analysis, keep: float) -> geofx.Plan:
        dense = analysis.plan(geofx.Budget(parameters=1.0, scope="factorizable"), ignore=tables(analysis))
        ranks = {}
        for choice in dense.choices:
            if choice.kind in TABLES:
                continue
            rows, columns = choice.shapes[0]
            ranks[choice.region] = LowRank(max(1, int(keep * rows * columns / (rows + columns))), weighting)
        return dense.edit(ranks)

    return plan


def tables(analysis: geofx.Analysis) -> list[str]:
    """Embeddings stay dense: the shares are of the blocks."""
    return [name for name, item in analysis.regions.items() if item.region.kind in TABLES]


def planned(*formats):
    """Formats and ranks by the exact planner, dense among them."""

    def plan(analysis: geofx.Analysis, keep: float) -> geofx.Plan:
        budget = geofx.Budget(parameters=keep, scope="factorizable")
        return analysis.plan(budget, formats=formats, ignore=tables(analysis))

    return plan


RUNGS = {
    "plain SVD, uniform": uniform("none"),
    "whitened SVD, uniform": uniform("input"),
    "two-sided SVD, uniform": uniform("two_sided"),
    "two-sided SVD, planned": planned(Dense, LowRank),
    "gauge-fixed, planned": planned(Dense, LowRank, GaugeFixed),
}


def plan_of(analysis: geofx.Analysis, name: str, keep: float) -> geofx.Plan:
    return RUNGS[name](analysis, keep)


def row_of(name: str, keep: float, result: geofx.OptimizedModel, seconds: float) -> dict[str, object]:
    report, fidelity = result.report, result.fidelity
    return {
        "rung": name,
        "keep": keep,
        "kept": report.optimized.linear_parameters / report.original.linear_parameters,
        "bytes": report.optimized.size_bytes,
        "parameters": report.optimized.parameters,
        "linear_parameters": report.optimized.linear_parameters,
        "flops_per_token": report.optimized.flops_per_token,
        "perplexity_dense": report.original.perplexity,
        "perplexity": report.optimized.perplexity,
        "loss_increase": fidelity.loss_increase,
        "predicted": result.plan.loss,
        "kl": fidelity.kl,
        "top1": fidelity.top1_agreement,
        "gap": result.plan.solver.gap,
        "seconds": seconds,
    }


def print_table(rows: list[dict[str, object]]) -> None:
    print("| method | keep | kept | MB | ppl | Δ ln ppl | predicted | KL | top-1 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        perplexity = f"{row['perplexity']:.4g}" if row["perplexity"] else "-"
        print(
            f"| {row['rung']} | {row['keep']} | {row['kept']:.4f} | {row['bytes'] / 1e6:.1f} | "
            f"{perplexity} | {row['loss_increase']:.4f} | {row['predicted']:.4f} | {row['kl']:.4f} | "
            f"{row['top1']:.3f} |"
        )


def say(started: float, text: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"[{time.perf_counter() - started:7.1f} s, {peak:.2f} GB] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
