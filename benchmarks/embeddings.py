"""Tables like TensorGPT's: an embedding in token_mps beside low_rank and group_reduce at equal bytes.

    python benchmarks/embeddings.py --model smollm2 --text wikitext-2-raw-valid.txt
    python benchmarks/embeddings.py --growth

Every reconstruction is put in the place of the table, and of the head where the two are tied; the loss is
that of the last part of the text, frequencies and gradients are of the first. ``--growth`` times
`add_tokens`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from geofx.annotations import SITE
from geofx.factorizations import GroupReduce, LowRank, TokenMPS
from geofx.objective import NextToken
from geofx.passes.calibrate import calibrate
from geofx.passes.canonicalize import Canonicalize
from geofx.passes.contract import run_passes
from geofx.passes.find_sites import find_sites
from geofx.region import Region
from geofx.region_analysis import MomentMetrics, RegionAnalysis
from geofx.sources import load_source
from geofx.text import windows
from geofx.trace import trace
from geofx.workload import measure

FIRST, LAST = 0.6, 0.15
"""Shares of the text that are calibrated and measured on."""

HEADER = (
    "| rank | method | MB | compression | as stored in the paper | MAE | norm. MAE | loss | Δ loss | fit s |"
)


def main() -> None:
    arguments = parse()
    if arguments.growth:
        return print_growth(arguments)
    source = load_source(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")
    calibration, held = (
        list(windows(part, source.tokenizer, length=512, batch_size=2, limit_tokens=tokens))
        for part, tokens in (
            (text[: int(len(text) * FIRST)], arguments.calibration_tokens),
            (text[-int(len(text) * LAST) :], arguments.holdout_tokens),
        )
    )
    analysis = analysis_of(source.model, calibration)
    say(f"calibrated on {arguments.calibration_tokens} tokens")
    table = source.model.get_input_embeddings().weight
    dense, original = loss_of(source.model, held), table.detach().clone()
    print(
        f"dense: {original.numel() * 4 / 1e6:.1f} MB, loss {dense:.4f} on {arguments.holdout_tokens} tokens\n"
    )
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    rows = []
    for rank, name, form in forms(analysis, arguments.ranks):
        if arguments.methods and name not in arguments.methods:
            continue
        begun = time.perf_counter()
        fitted, factors = form.fit(analysis.weights, analysis)
        seconds = time.perf_counter() - begun
        with torch.no_grad():
            table.copy_(fitted.to_dense(factors))
            error = float((table - original).abs().double().mean())
        row = {
            "rank": rank,
            "method": name,
            "bytes": measure(form, analysis.region).weight_bytes,
            "numbers": paper_numbers(form) if isinstance(form, TokenMPS) else None,
            "mae": error,
            "normalised_mae": error / float(original.abs().double().mean()),
            "loss": loss_of(source.model, held),
            "seconds": seconds,
        }
        rows.append(row)
        print_row(row, original, dense)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"dense": dense, "rows": rows}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--methods", nargs="+", help="of those in the table; by default all")
    parser.add_argument("--calibration-tokens", type=int, default=24 * 1024)
    parser.add_argument("--holdout-tokens", type=int, default=16 * 1024)
    parser.add_argument("--json", help="write the rows to this file too")
    parser.add_argument("--growth", action="store_true", help="time add_tokens instead")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if not arguments.growth and not arguments.text:
        parser.error("--text is needed")
    return arguments


def analysis_of(model: torch.nn.Module, calibration: list[dict[str, Tensor]]) -> RegionAnalysis:
    """The table's own moments, of both uses: no other site is annotated, so none is squared."""
    program = trace(model, calibration[0])
    run_passes(program, [Canonicalize()])
    site = max(
        (site for site in find_sites(program)[0] if site.kind != "linear"), key=lambda site: site.numel
    )
    for node in program.graph.nodes:
        if node.name in site.nodes:
            SITE.set(node, site)
    weights = {site.weight: program.weight(site.weight).detach().clone()}
    moments = calibrate(program, calibration, NextToken())
    metrics = dict(MomentMetrics(weights, moments))
    return RegionAnalysis(Region(site.weight, "embedding", (site,)), weights, metrics)


def forms(
    analysis: RegionAnalysis, ranks: list[int]
) -> Iterator[tuple[int, str, TokenMPS | LowRank | GroupReduce]]:
    """Per rank the states, plain and in the metric, and what else fits into their bytes."""
    region = analysis.region
    rows, columns = region.shape
    blocks = [(measure(form, region).weight_bytes, form) for form in GroupReduce.candidates(region, analysis)]
    for rank in ranks:
        if rank > 2 ** ((columns - 1).bit_length() // 2):
            return
        plain = TokenMPS(columns, rank, "none")
        yield rank, "token_mps, as TensorGPT", plain
        yield rank, "token_mps", TokenMPS(columns, rank)
        room = plain.numbers * rows // (rows + columns)
        if room >= min(rows, columns) * rows // (rows + columns):
            continue
        yield rank, "low_rank, unweighted", LowRank(room, "none")
        yield rank, "low_rank", LowRank(room)
        budget = rows * plain.numbers * next(iter(analysis.weights.values())).element_size()
        fitting = [form for size, form in blocks if size <= budget]
        if fitting:
            yield rank, "group_reduce", fitting[-1]


def paper_numbers(form: TokenMPS) -> int:
    """Numbers of a row whose cores all have modes of 2."""
    bits = (form.columns - 1).bit_length()
    bonds = [min(form.rank, 2**place, 2 ** (bits - place)) for place in range(bits + 1)]
    return sum(2 * left * right for left, right in pairwise(bonds))


def loss_of(model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Nats per token."""
    total, terms = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            loss, count = NextToken().gradient_seed(model(**batch, use_cache=False), batch)
            total, terms = total + float(loss), terms + count
    return total / terms


def print_row(row: dict[str, object], original: Tensor, dense: float) -> None:
    compression = original.numel() * original.element_size() / row["bytes"]
    paper = f"{original.shape[1] / row['numbers']:.2f}" if row["numbers"] else ""
    figures = (
        f"{row['bytes'] / 1e6:.1f} | {compression:.2f} | {paper} | {row['mae']:.5f} | "
        f"{row['normalised_mae']:.3f} | {row['loss']:.4f} | {row['loss'] - dense:.4f} | {row['seconds']:.1f}"
    )
    print(f"| {row['rank']} | {row['method']} | {figures} |", flush=True)


def print_growth(arguments: argparse.Namespace) -> None:
    """1,000 new tokens of 576 numbers at rank 4, both vocabularies in turn."""
    form, generator = TokenMPS(576, 4), torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 576, generator=generator)
    tables = {
        size: {"cores": torch.randn(size, form.numbers, generator=generator)} for size in (50_000, 250_000)
    }
    times: dict[int, list[float]] = {size: [] for size in tables}
    for repeat in range(arguments.repeats + 1):
        for size, factors in tables.items():
            begun = time.perf_counter()
            form.add_tokens(factors, rows)
            if repeat > 0:  # the first warms up
                times[size].append(1e3 * (time.perf_counter() - begun))
    for size, found in times.items():
        spread = f"{min(found):.1f} to {max(found):.1f}, {len(found)} runs"
        print(f"1,000 tokens more at {size:,}: median {statistics.median(found):.1f} ms ({spread})")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
