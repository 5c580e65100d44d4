"""Check and time the fused operations on a GPU, in one run; ends with an error where a check fails.

    python benchmarks/gpu.py --json gpu.json

Checks: torch's own of an operation, numbers against float64, gradients, no graph break, and pieces with every
chain fused. Times: dense, chain and kernel in turns, medians as shares of dense; docs/gpu.md has what is
computed of the same. ``--device cpu`` runs it without kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from geofx.factorizations import Factorization, GaugeFixed, LowRank, Monarch
from geofx.latency import interleaved_medians
from geofx.ops import (
    BLOCK_DIAGONAL_LINEAR,
    FUSED_OPS,
    GAUGE_FIXED_LINEAR,
    LOW_RANK_LINEAR,
    TENSOR_TRAIN_LOOKUP,
    TOKEN_MPS_LOOKUP,
    FusedOp,
)
from geofx.passes.cleanup import Cleanup
from geofx.passes.contract import run_passes
from geofx.passes.fuse import Fuse
from geofx.piece import Piece
from geofx.piece_latency import repeated

TOLERANCES = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of the root mean square error over that of the result."""
SHAPES = {"7B q, o": (4096, 4096), "7B gate, up": (4096, 11008), "7B down": (11008, 4096)}
RANKS = (16, 64, 256, 1024)
TOKENS = (1, 16, 128, 2048)
ROUNDS = 21


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="float32 and small shapes alone")
    parser.add_argument("--json", help="write all rows to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --device cpu runs the checks without kernels")
    torch.manual_seed(0)
    done = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "checks": checks(arguments.device, quick=arguments.quick),
        "times": times(arguments.device, quick=arguments.quick),
        "failures": {op.name: op.failure for op in FUSED_OPS if op.failure},
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    wrong, failures = [row for row in done["checks"] if not row["holds"]], done["failures"]
    say(f"{len(done['checks'])} checks, {len(wrong)} failed; kernels that failed: {failures}")
    if wrong or failures:
        sys.exit(json.dumps(wrong, indent=1))


def checks(device: str, *, quick: bool) -> list[dict[str, Any]]:
    """Every operation in every dtype over odd shapes, and programs with their chains fused."""
    rows = []
    for op, label, arguments in cases(device, quick=quick):
        wide = pytree.tree_map(lambda part: part.double() if floating(part) else part, arguments)
        dtype = next(part.dtype for part in pytree.tree_leaves(arguments) if floating(part))
        error, allowed = distance(op(*arguments), op.chain(*wide)), TOLERANCES[dtype]
        rows.append({"op": op.name, "case": label, "error": error, "holds": error <= allowed})
        given = pytree.tree_map(lambda part: leaf(part, False), arguments)
        results = torch.library.opcheck(op.overload, tuple(given), raise_exception=False)
        rows.append(
            {"op": op.name, "case": f"{label}, opcheck", "holds": set(results.values()) == {"SUCCESS"}}
        )
        error = gradient_error(op, arguments)
        rows.append({"op": op.name, "case": f"{label}, gradients", "error": error, "holds": error <= allowed})
        torch._dynamo.reset()
        compiled = torch.compile(lambda *parts, op=op: op(*parts), backend="aot_eager", fullgraph=True)
        error = distance(compiled(*arguments), op.chain(*wide))
        rows.append({"op": op.name, "case": f"{label}, compiled", "error": error, "holds": error <= allowed})
    for form in (LowRank(5), GaugeFixed(5, start=3), GaugeFixed(5, "pivoted"), Monarch(4, 2)):
        rows.append(fused_piece(form, device))
    for row in rows:
        if not row["holds"]:
            say(f"FAILED {row}")
    return rows


def gradient_error(op: FusedOp, arguments: list[Any]) -> float:
    """Of all gradients of the sum of squares, against those of the chain in float64."""
    found = []
    for run, wide in ((op, False), (op.chain, True)):
        given = pytree.tree_map(lambda part, wide=wide: leaf(part, wide), arguments)
        leaves = [part for part in pytree.tree_leaves(given) if floating(part)]
        y = run(*given)
        found.append(torch.autograd.grad((y.double() ** 2).sum(), leaves))
    return max(distance(one, other) for one, other in zip(*found, strict=True))


def leaf(part: Any, wide: bool) -> Any:
    if not floating(part):
        return part
    return (part.detach().double() if wide else part.detach().clone()).requires_grad_()


def cases(device: str, *, quick: bool) -> list[tuple[FusedOp, str, list[Any]]]:
    found = []
    for dtype in (torch.float32,) if quick else TOLERANCES:
        make = partial(noise, dtype=dtype, device=device)
        for tokens, inputs, outputs, rank in (
            (1, 1, 2, 1),
            (17, 67, 131, 33),
            (130, 200, 300, 70),
            (0, 8, 8, 2),
        ):
            label = f"{dtype}, {tokens} x {inputs} -> {outputs}, rank {rank}"
            x, right, left, bias = (
                make(tokens, inputs),
                make(rank, inputs),
                make(outputs, rank),
                make(outputs),
            )
            found.append((LOW_RANK_LINEAR, label, [x, left, right, bias]))
            across = [make(inputs, tokens).T, make(rank, outputs).T, right, None]
            found.append((LOW_RANK_LINEAR, f"{label}, strided", across))
            mix, places = make(outputs - rank, rank), torch.randperm(outputs, device=device).int()
            found.append(
                (
                    GAUGE_FIXED_LINEAR,
                    f"{label}, window",
                    [x, right, mix, bias, None, 1 if rank < outputs - 1 else 0],
                )
            )
            found.append((GAUGE_FIXED_LINEAR, f"{label}, places", [x, right, mix, bias, places, 0]))
        for tokens, m1, m2, n1, n2, rank in ((3, 5, 4, 4, 6, 1), (40, 33, 2, 3, 40, 37)):
            blocks = [make(tokens, n1 * n2), make(m2, m1, n1 * rank), make(n1, m2 * rank, n2), make(m1 * m2)]
            found.append((BLOCK_DIAGONAL_LINEAR, f"{dtype}, {tokens} x {n1}·{n2}, rank {rank}", blocks))
        ids = torch.arange(60, device=device).reshape(4, 15)
        cores = [make(1, 3, 2, 3), make(3, 4, 3, 4), make(4, 5, 4, 1)]
        found.append((TENSOR_TRAIN_LOOKUP, f"{dtype}, 3 cores", [ids, cores]))
        table = make(60, 4 * 3 + 3 * 4)
        found.append((TOKEN_MPS_LOOKUP, f"{dtype}, rank 3", [ids, table, [1, 3, 1], [4, 4], 14]))
    return found


def fused_piece(form: Factorization, device: str) -> dict[str, Any]:
    program = repeated(Piece(form, "single", (((96, 64), False),), "float32"), 33, 2).moved(device)
    clone = program.clone()
    changed = run_passes(clone, [Fuse(lambda *_: True), Cleanup()])
    given = {name: value.to(device) for name, value in program.example.items()}
    pairs = zip(clone(**given), program(**given), strict=True)
    error = max(distance(one, other.double()) for one, other in pairs)
    return {"op": "fuse", "case": str(form), "error": error, "holds": changed and error < 4e-6}


@torch.no_grad()
def times(device: str, *, quick: bool) -> list[dict[str, Any]]:
    """Dense, chain and kernel in turns, in bfloat16 on a GPU."""
    rows = []
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = {"small": (128, 96)} if quick else SHAPES
    for name, (inputs, outputs) in shapes.items():
        for tokens in (1, 16) if quick else TOKENS:
            for rank in (8,) if quick else RANKS:
                make = partial(noise, dtype=dtype, device=device)
                x, weight, right = make(tokens, inputs), make(outputs, inputs), make(rank, inputs)
                calls: dict[str, Any] = {"dense": lambda x=x, weight=weight: functional.linear(x, weight)}
                side = 16 if quick else 16 * 16
                inner = max(1, rank * 16 // side)
                blocks = make(16, outputs // 16, 16 * inner), make(16, 16 * inner, inputs // 16)
                for op, factors in (
                    (LOW_RANK_LINEAR, (make(outputs, rank), right)),
                    (GAUGE_FIXED_LINEAR, (right, make(outputs - rank, rank))),
                    (BLOCK_DIAGONAL_LINEAR, blocks),
                ):
                    calls[f"{op.name} chain"] = partial(op.chain, x, *factors)
                    calls[f"{op.name} kernel"] = partial(op, x, *factors)
                waiting = {key: partial(waited, call, device) for key, call in calls.items()}
                seconds = interleaved_medians(waiting, ROUNDS, lambda *_: None)
                ratios = {key: taken / seconds["dense"] for key, taken in seconds.items()}
                rows.append(
                    {
                        "matmul": name,
                        "tokens": tokens,
                        "rank": rank,
                        "dense_s": seconds["dense"],
                        "ratios": ratios,
                    }
                )
                said = ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items() if key != "dense")
                say(f"{name}, {tokens} tokens, rank {rank}: dense {1e6 * seconds['dense']:.1f} us; {said}")
    return rows


def waited(call: Any, device: str) -> None:
    call()
    if device == "cuda":
        torch.cuda.synchronize()


def noise(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return (torch.randn(*shape, device=device) / max(1, shape[-1]) ** 0.5).to(dtype)


def floating(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


def distance(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of the wanted."""
    if found.shape != wanted.shape:
        return float("inf")
    return (
        float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300)) if wanted.numel() else 0.0
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
