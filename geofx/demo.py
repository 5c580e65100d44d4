"""The main job on a real language model, from the package index to a measured ONNX file."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from geofx.api import analyze
from geofx.batches import Batch
from geofx.budget import Budget
from geofx.export.onnx import to_onnx
from geofx.export.onnx_runtime import OnnxRunner, require_onnx
from geofx.folder import check_target, write_file
from geofx.latency import interleaved_medians
from geofx.model import OptimizedModel
from geofx.optimization import optimize_analysis
from geofx.program import Program
from geofx.progress import Progress, log_progress
from geofx.report import Report
from geofx.report_html import report_html
from geofx.sources import Source, smollm2, tokenizer_files
from geofx.stages import Stages
from geofx.summary import with_source
from geofx.text import python_text, windows

FOLDER = Path("out/demo")
MODEL, ONNX, REPORT = "model", "model.onnx", "report.html"

BUDGET = Budget(parameters=0.8, scope="factorizable")
CALIBRATION_TOKENS, HELDOUT_TOKENS, WINDOW = 12288, 4096, 512
LATENCY_TOKENS, ROUNDS = 128, 7


def run(
    folder: Path = FOLDER, progress: Progress = log_progress, load: Callable[[], Source] = smollm2
) -> Report:
    """Optimize, export, time and save the model of ``load``; all files go into ``folder``.

    Raises:
        GeofxError: as any of the steps does.
    """
    require_onnx()
    folder.mkdir(parents=True, exist_ok=True)
    check_target(folder / MODEL, overwrite=True)
    stages = Stages()
    progress("load", 0, 1)
    with stages("load"):
        source = load()
        calibration, heldout = (
            _batches(source, text, tokens)
            for text, tokens in zip(python_text(), (CALIBRATION_TOKENS, HELDOUT_TOKENS), strict=True)
        )
    progress("load", 1, 1)
    original, result = _optimized(source, calibration, heldout, progress)
    result = dataclasses.replace(result, report=_measured(original, result, source, folder, stages, progress))
    with stages("save"):
        result.save(folder / MODEL, overwrite=True)
    write_file(folder / REPORT, report_html(result.report))
    return result.report


def _batches(source: Source, text: str, tokens: int) -> list[Batch]:
    return list(windows(text, source.tokenizer, length=WINDOW, batch_size=2, limit_tokens=tokens))


def _optimized(
    source: Source, calibration: list[Batch], heldout: list[Batch], progress: Progress
) -> tuple[Program, OptimizedModel]:
    """The graph as traced and the result; moments and truncations, larger than the model, end here."""
    files = tokenizer_files(source.tokenizer)
    analysis = analyze(source.model, calibration, holdout=heldout, progress=progress, files=files)
    return analysis.original, optimize_analysis(analysis, BUDGET)


def _measured(
    original: Program,
    result: OptimizedModel,
    source: Source,
    folder: Path,
    stages: Stages,
    progress: Progress,
) -> Report:
    """The result's report with what its exports weigh and how long calls take."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file = Path(temporary) / ONNX
        progress("export", 0, 2)
        with stages("export the original"):
            before = to_onnx(original, file)
        progress("export", 1, 2)
        with stages("export"):
            after = result.to_onnx(folder / ONNX)
        progress("export", 2, 2)
        with stages("measure latency"):
            seconds = _latencies((original, result), (OnnxRunner(file), OnnxRunner(folder / ONNX)), progress)
    report = dataclasses.replace(
        result.report, stages=(*stages.done[:1], *result.report.stages, *stages.done[1:])
    )
    return with_source(report, source, original, result.program, folder / MODEL).with_measured(
        original={**seconds["original"], "onnx_bytes": before.size_bytes},
        optimized={**seconds["optimized"], "onnx_bytes": after.size_bytes},
    )


def _latencies(
    models: tuple[Program, OptimizedModel], runners: tuple[OnnxRunner, OnnxRunner], progress: Progress
) -> dict[str, dict[str, float]]:
    """Median seconds of one row of tokens, the four calls in turns."""
    ids = torch.arange(LATENCY_TOKENS).reshape(1, -1) + 3
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (original, optimized), (before, after) = models, runners
    calls: dict[str, Callable[[], object]] = {
        "original": lambda: original(**inputs),
        "optimized": lambda: optimized(**inputs),
        "original in ONNX Runtime": lambda: before(inputs),
        "optimized in ONNX Runtime": lambda: after(inputs),
    }
    with torch.no_grad():
        median = interleaved_medians(calls, ROUNDS, progress)
    return {
        name: {"latency_torch_s": median[name], "latency_onnx_s": median[f"{name} in ONNX Runtime"]}
        for name in ("original", "optimized")
    }
