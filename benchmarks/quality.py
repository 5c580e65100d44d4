"""The quality ladder: from plain SVD to each level of effort, predicted and measured, at equal size.

    python benchmarks/quality.py --model smollm2 --text wikitext-2-raw-valid.txt

Calibrates on the first part of the text, measures on the last, and on a text of another kind: topics of
Python's manual. ``--model`` takes what ``geofx optimize`` takes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from functools import partial
from pathlib import Path

import geofx
from geofx.factorizations import Dense, GaugeFixed, LowRank
from geofx.optimization import optimize_analysis
from geofx.region import TABLES
from geofx.sources import load_source
from geofx.stages import peak_memory_bytes
from geofx.text import python_text, windows
from geofx.verify import Fidelity, verify

logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
CALIBRATION_RATIO, HOLDOUT_RATIO = 0.6, 0.15


def main() -> None:
    arguments = parse()
    started = time.perf_counter()
    source = load_source(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")
    calibration, holdout, other = batches(source, text, arguments)
    say(started, f"{len(calibration)} calibration, {len(holdout)} held-out and {len(other)} other batches")
    rows = []
    for effort in dict.fromkeys(RUNGS[name][0] for name in arguments.rungs):
        begun = time.perf_counter()
        analysis = geofx.analyze(source.model, calibration, holdout=holdout, seed=0, effort=effort)
        spent = time.perf_counter() - begun
        for stage in analysis.stages.done:
            say(started, f"{stage.name}: {stage.seconds:.1f} s, peak {stage.peak_memory_bytes / 1e9:.2f} GB")
        for keep in arguments.keep:
            for name in (name for name in arguments.rungs if RUNGS[name][0] == effort):
                begun = time.perf_counter()
                result = RUNGS[name][1](analysis, keep)
                seconds = spent + time.perf_counter() - begun
                elsewhere = verify(analysis.original, result.program, other, analysis.objective)
                rows.append(row_of(name, keep, result, elsewhere, seconds))
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
    parser.add_argument("--calibration-tokens", type=int, default=64 * 512)
    parser.add_argument("--holdout-tokens", type=int, default=16 * 1024)
    parser.add_argument("--json", help="write the rows to this file too")
    return parser.parse_args()


def batches(source, text: str, arguments: argparse.Namespace) -> tuple[list, list, list]:
    first = text[: int(len(text) * CALIBRATION_RATIO)]
    last = text[-int(len(text) * HOLDOUT_RATIO) :]
    cut = partial(windows, tokenizer=source.tokenizer, max_positions=source.max_positions)
    held = {"length": 1024, "batch_size": 1, "limit_tokens": arguments.holdout_tokens}
    calibration = cut(first, length=512, batch_size=2, limit_tokens=arguments.calibration_tokens)
    return list(calibration), list(cut(last, **held)), list(cut(python_text()[1], **held))


def uniform(weighting: str):
    """The same share of every matrix, as truncated SVD and SVD-LLM do."""

    def result(analysis: geofx.Analysis, keep: float) -> geofx.OptimizedModel:
        dense = analysis.plan(geofx.Budget(parameters=1.0, scope="factorizable"), ignore=tables(analysis))
        ranks = {}
        for choice in dense.choices:
            if choice.kind in TABLES:
                continue
            rows, columns = choice.shapes[0]
            ranks[choice.region] = LowRank(max(1, int(keep * rows * columns / (rows + columns))), weighting)
        return analysis.apply(dense.edit(ranks))

    return result


def tables(analysis: geofx.Analysis) -> list[str]:
    """Embeddings stay dense: the shares are of the blocks."""
    return [name for name, item in analysis.regions.items() if item.region.kind in TABLES]


def planned(*formats):
    """Formats and ranks by the exact planner, dense among them."""

    def result(analysis: geofx.Analysis, keep: float) -> geofx.OptimizedModel:
        budget = geofx.Budget(parameters=keep, scope="factorizable")
        return analysis.apply(analysis.plan(budget, formats=formats, ignore=tables(analysis)))

    return result


def default(analysis: geofx.Analysis, keep: float) -> geofx.OptimizedModel:
    """What `geofx.optimize` does, at the effort of the analysis."""
    budget = geofx.Budget(parameters=keep, scope="factorizable")
    return optimize_analysis(analysis, budget, ignore=tables(analysis))


RUNGS = {
    "plain SVD, uniform": ("fast", uniform("none")),
    "whitened SVD, uniform": ("fast", uniform("input")),
    "two-sided SVD, uniform": ("fast", uniform("two_sided")),
    "two-sided SVD, planned": ("fast", planned(Dense, LowRank)),
    "gauge-fixed, planned": ("fast", planned(Dense, LowRank, GaugeFixed)),
    "effort fast": ("fast", default),
    "effort balanced": ("balanced", default),
    "effort best": ("best", default),
}
"""Name -> the effort of the analysis, and what is made of it."""


def row_of(
    name: str, keep: float, result: geofx.OptimizedModel, other: Fidelity, seconds: float
) -> dict[str, object]:
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
        "other_loss_increase": other.loss_increase,
        "other_kl": other.kl,
        "gap": result.plan.solver.gap,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def print_table(rows: list[dict[str, object]]) -> None:
    print(
        "| method | keep | kept | MB | ppl | Δ loss | predicted | KL | top-1 | other text: Δ | KL | s | GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        perplexity = f"{row['perplexity']:.4g}" if row["perplexity"] else "-"
        kl, top, elsewhere = (
            "-" if row[name] is None else f"{row[name]:.4f}" for name in ("kl", "top1", "other_kl")
        )
        print(
            f"| {row['rung']} | {row['keep']} | {row['kept']:.4f} | {row['bytes'] / 1e6:.1f} | "
            f"{perplexity} | {row['loss_increase']:.4f} | {row['predicted']:.4f} | {kl} | {top} | "
            f"{row['other_loss_increase']:.4f} | {elsewhere} | {row['seconds']:.0f} | "
            f"{row['peak_memory_bytes'] / 1e9:.1f} |"
        )


def say(started: float, text: str) -> None:
    peak = peak_memory_bytes() / 1e9
    print(f"[{time.perf_counter() - started:7.1f} s, {peak:.2f} GB] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
