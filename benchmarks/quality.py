"""The quality ladder: from plain SVD to each level of effort, predicted and measured, at equal size.

    python benchmarks/quality.py --model smollm2 --text wikitext-2-raw-valid.txt

Measures on every fourth article of the text, calibrates on the others; and measures on a text of another
kind: topics of Python's manual. ``--model`` takes what ``geofx optimize`` takes.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

import geofx
from geofx.batches import inputs_of
from geofx.factorizations import Dense, GaugeFixed, LowRank
from geofx.objective import NextToken
from geofx.optimization import optimize_analysis
from geofx.program import flat_tensors
from geofx.region import TABLES
from geofx.sources import load_source
from geofx.stages import peak_memory_bytes
from geofx.text import python_text, windows
from geofx.training import native_autocast
from geofx.verify import verify

logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
HELD_OUT = 4
"""Of so many articles one is held out."""


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
                rows.append(row_of(name, keep, analysis, result, holdout, other, seconds))
                say(started, json.dumps(rows[-1]))
                if arguments.recover:
                    begun = time.perf_counter()
                    result = result.recover(
                        calibration,
                        holdout=holdout,
                        steps=arguments.recover,
                        labels=arguments.labels,
                        autocast=native_autocast(torch.device("cpu")),
                    )
                    seconds = time.perf_counter() - begun
                    name = f"{name}, recovered"
                    rows.append(row_of(name, keep, analysis, result, holdout, other, seconds))
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
    parser.add_argument("--length", type=int, default=512, help="of the windows")
    parser.add_argument("--calibration-tokens", type=int, default=64 * 512)
    parser.add_argument("--holdout-tokens", type=int, default=16 * 1024)
    parser.add_argument("--recover", type=int, default=0, help="steps of recovery after each rung")
    parser.add_argument("--labels", type=float, default=0.0, help="share of the text's tokens in that")
    parser.add_argument("--json", help="write the rows to this file too")
    return parser.parse_args()


def batches(source, text: str, arguments: argparse.Namespace) -> tuple[list, list, list]:
    articles = re.split(r"(?m)^(?= = [^=].* = $)", text)
    if len(articles) < HELD_OUT:
        sys.exit("the text has no articles that begin with ' = Title = '")
    held = articles[HELD_OUT - 1 :: HELD_OUT]
    first, last = "".join(part for part in articles if part not in held), "".join(held)
    length = arguments.length
    settings = {"length": length, "batch_size": max(1, 1024 // length), "max_positions": source.max_positions}
    cut = partial(windows, tokenizer=source.tokenizer, **settings)
    sizes = arguments.calibration_tokens, arguments.holdout_tokens, arguments.holdout_tokens
    texts = first, last, python_text()[1]
    calibration, holdout, other = (
        list(cut(part, limit_tokens=size)) for part, size in zip(texts, sizes, strict=True)
    )
    return calibration, holdout, other


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


@torch.no_grad()
def pooled_cosine(analysis: geofx.Analysis, result: geofx.OptimizedModel, held: list) -> float | None:
    """Mean cosine between the sentence embeddings, outputs averaged over tokens; None of a language model."""
    if isinstance(analysis.objective, NextToken):
        return None
    found = []
    for batch in held:
        given = inputs_of(analysis.original, batch)
        pair = (flat_tensors(program(**given))[0] for program in (analysis.original, result.program))
        found.append(functional.cosine_similarity(*(output.mean(1) for output in pair)))
    return float(torch.cat(found).mean())


def row_of(
    name: str,
    keep: float,
    analysis: geofx.Analysis,
    result: geofx.OptimizedModel,
    holdout: list,
    other: list,
    seconds: float,
) -> dict[str, object]:
    report, fidelity = result.report, result.fidelity
    elsewhere = verify(analysis.original, result.program, other, analysis.objective)
    cosines = [pooled_cosine(analysis, result, part) for part in (holdout, other)]
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
        "other_loss_increase": elsewhere.loss_increase,
        "other_kl": elsewhere.kl,
        "cosine": cosines[0],
        "other_cosine": cosines[1],
        "gap": result.plan.solver.gap,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def print_table(rows: list[dict[str, object]]) -> None:
    print(
        "| method | keep | kept | MB | ppl | Δ loss | predicted | KL | top-1 | cosine "
        "| other text: Δ | KL | cosine | s | GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        perplexity = f"{row['perplexity']:.4g}" if row["perplexity"] else "-"
        names = ("kl", "top1", "cosine", "other_kl", "other_cosine")
        kl, top, cosine, elsewhere, other_cosine = (
            "-" if row[name] is None else f"{row[name]:.4f}" for name in names
        )
        print(
            f"| {row['rung']} | {row['keep']} | {row['kept']:.4f} | {row['bytes'] / 1e6:.1f} | "
            f"{perplexity} | {row['loss_increase']:.4f} | {row['predicted']:.4f} | {kl} | {top} | {cosine} | "
            f"{row['other_loss_increase']:.4f} | {elsewhere} | {other_cosine} | {row['seconds']:.0f} | "
            f"{row['peak_memory_bytes'] / 1e9:.1f} |"
        )


def say(started: float, text: str) -> None:
    peak = peak_memory_bytes() / 1e9
    print(f"[{time.perf_counter() - started:7.1f} s, {peak:.2f} GB] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
