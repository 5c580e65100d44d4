"""Budgets of latency: asked, predicted and measured, for several runtimes and numbers of tokens.

    python benchmarks/latency.py --model smollm2 --text wikitext-2-raw-valid.txt --json latency.json

``--model wide`` is two decoder blocks of width 2048 (8192 inside) with random weights and random tokens. The
share of the ideal is byte ratio over time ratio of the pieces that were timed: 1 where a form that stores
half takes half the time. For matrices that are multiplied once per token the ratio of flops is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

import geofx
from geofx.cost_models import Measured
from geofx.errors import BudgetInfeasibleError
from geofx.factorizations import Dense
from geofx.optimization import optimize_analysis
from geofx.piece import Piece
from geofx.sources import load_source
from geofx.text import windows
from geofx.workload import measure


def main() -> None:
    arguments = parse()
    model, calibration, holdout = wide() if arguments.model == "wide" else given(arguments)
    analysis = geofx.analyze(model, calibration, holdout=holdout, seed=0, progress=lambda *_: None)
    rows, shares = [], []
    for runtime, tokens in product(arguments.runtimes, arguments.tokens):
        target = geofx.Target(runtime, tokens=tokens)
        begun = time.perf_counter()
        analysis.plan(geofx.Budget(latency=0.99), target=target)
        priced = time.perf_counter() - begun
        for budget in arguments.budgets:
            rows.append(row_of(analysis, budget, target, priced))
            say(json.dumps(rows[-1]))
        shares += shares_of(analysis, target)
        if arguments.json:
            text = json.dumps({"rows": rows, "shares": shares}, indent=1)
            Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    print_tables(rows, shares)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", help="to calibrate and measure on; not for the wide model")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "eager"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128, 512])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--calibration-tokens", type=int, default=8 * 1024)
    parser.add_argument("--holdout-tokens", type=int, default=4 * 1024)
    parser.add_argument("--json", help="write the rows to this file too, after each target")
    return parser.parse_args()


def given(arguments: argparse.Namespace) -> tuple[Any, list, list]:
    """A model and batches of a text: the last ones are measured on."""
    source = load_source(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")
    limit = arguments.calibration_tokens + arguments.holdout_tokens
    settings = {"length": 512, "batch_size": 2, "max_positions": source.max_positions}
    batches = list(windows(text, tokenizer=source.tokenizer, limit_tokens=limit, **settings))
    held = max(1, arguments.holdout_tokens // 1024)
    return source.model, batches[:-held], batches[-held:]


def wide() -> tuple[Any, list, list]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(1, 1024, (2, 256))} for _ in range(5)]
    return model, batches[:4], batches[4:]


def row_of(analysis: geofx.Analysis, budget: float, target: geofx.Target, priced: float) -> dict[str, object]:
    begun, missed = time.perf_counter(), False
    try:
        result = optimize_analysis(analysis, geofx.Budget(latency=budget), target=target)
    except BudgetInfeasibleError as error:
        missed = True
        if error.result is None:
            return {"target": str(target), "asked": budget, "missed": True, "why": str(error)}
        result = error.result
    report = result.report
    (timing,) = report.timings or (None,)
    return {
        "target": str(target),
        "asked": budget,
        "predicted": report.predicted_latency_ratio,
        "measured": timing.ratio if timing else None,
        "original_s": timing.original_s if timing else None,
        "rounds": timing.rounds if timing else 0,
        "missed": missed,
        "loss_increase": result.fidelity.loss_increase if result.fidelity else None,
        "predicted_loss": result.plan.loss,
        "bytes": report.optimized.size_bytes / report.original.size_bytes,
        "linear_parameters": report.optimized.linear_parameters / report.original.linear_parameters,
        "flops": report.optimized.flops_per_token / report.original.flops_per_token,
        "formats": sorted({choice.factorization.name for choice in result.plan.rewritten}),
        "pricing_s": priced,
        "seconds": time.perf_counter() - begun,
    }


def shares_of(analysis: geofx.Analysis, target: geofx.Target) -> list[dict[str, object]]:
    """Of each format and shape, between the settings that were timed: median byte ratio over time ratio."""
    model = analysis.clock(target).models[target]
    assert isinstance(model, Measured)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (piece, form, _), curve in model.curves.items():
        whole = measure(Dense(), piece.region).weight_bytes
        for size, ratio in zip(curve.bytes, curve.ratios, strict=True):
            if 0.25 <= size / whole <= 0.9:
                found[form.name, named(piece)].append(size / whole / ratio)
    return [
        {"target": str(target), "format": form, "matmul": shape, "share": statistics.median(ratios)}
        for (form, shape), ratios in sorted(found.items())
    ]


def named(piece: Piece) -> str:
    sides = " + ".join(f"{rows}x{columns}" for (rows, columns), _ in piece.maps)
    return f"{piece.kind} {sides}"


def print_tables(rows: list[dict[str, Any]], shares: list[dict[str, Any]]) -> None:
    print("| target | asked | predicted | measured | rounds | Δ loss | bytes | flops | formats | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        if row.get("measured") is None:
            print(f"| {row['target']} | {row['asked']} | missed: {row.get('why')} |")
            continue
        print(
            f"| {row['target']} | {row['asked']} | {row['predicted']:.3f} | {row['measured']:.3f}"
            f"{' missed' if row['missed'] else ''} | {row['rounds']} | {row['loss_increase']:.3f} | "
            f"{row['bytes']:.3f} | {row['flops']:.3f} | {', '.join(row['formats'])} | {row['seconds']:.0f} |"
        )
    print("\n| target | format | matmul | share of the ideal |\n|---|---|---|---|")
    for share in shares:
        print(f"| {share['target']} | {share['format']} | {share['matmul']} | {share['share']:.2f} |")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
