"""ONNX export of a decoder with its past: published after it has written what the model writes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geofx.batches import longest_sequence
from geofx.errors import ArtifactError, VerificationError
from geofx.export.cases import RELATIVE
from geofx.export.decoder import trace_decoder
from geofx.export.decoder_session import DecoderSession, left_padded
from geofx.export.genai import FILE as GENAI
from geofx.export.genai import genai_config
from geofx.export.onnx_file import OnnxReport, published
from geofx.export.onnx_graph import require_exportable
from geofx.export.onnx_runtime import require_onnx
from geofx.export.staging import target_file
from geofx.generated_text import generating_by
from geofx.trace import evaluating

STEPS = 32
"""Tokens that the file has to write as the model does."""
PROMPTS = "The history of the city begins in the", "def fibonacci(n):\n    if n < 2:\n        return n\n"
PROMPT_TOKENS = 24, 16
"""Of prompts where there is no tokenizer."""


def to_onnx_decoder(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    beside: Mapping[str, bytes] | None = None,
    rtol: float | None = None,
) -> OnnxReport:
    """Publish a decoder as one graph for prompts and single tokens, with what runtimes look for beside it.

    Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` where the model takes them, and
    ``past_key_values.N.key`` and ``.value``, (batch, heads, tokens, width), empty at first; outputs are
    ``logits`` and ``present.N.key`` and ``.value``. Batch, sequence and past may have any size. It is
    published after ONNX Runtime, from an empty past, has written the same tokens as ``model.generate`` does.

    Args:
        model: of transformers, on the CPU.
        path: ``.onnx``, in a folder of its own.
        tokenizer: of the prompts that are written on; without one they are of tokens by chance.
        beside: further files for the folder, such as ``config.json`` and the tokenizer's.
        rtol: largest difference of logits as a share of the largest; None: by their type.

    Raises:
        MissingDependencyError: the ``onnx`` extra is not installed.
        ArtifactError: the folder holds files of the same names that are not of such an export.
        ExportError: the model is no such decoder, or has no standard ONNX form.
        VerificationError: the file writes something else, or weighs more; nothing is published.
    """
    require_onnx()
    start = time.perf_counter()
    target = target_file(path, ".onnx")
    files = dict(beside or {})
    _require_own_folder(target.parent, files)
    program, cache = trace_decoder(model)
    require_exportable(program)
    files[GENAI] = json.dumps(genai_config(model, target.name, program.input_names, cache), indent=1).encode()
    prompts = _prompts(model, tokenizer)
    return published(
        program, target, lambda file: require_same_tokens(model, file, prompts, rtol), start, files
    )


def require_same_tokens(
    model: nn.Module, file: Path, prompts: Sequence[Sequence[int]], rtol: float | None = None
) -> dict[str, float]:
    """The largest difference of logits while ``file``, in ONNX Runtime, writes what ``model.generate`` does.

    Greedily, in all rows at once. Where two tokens of the model are as near to one another as logits may
    differ, either may come.

    Raises:
        VerificationError: another token, or logits that differ by more.
    """
    ids, mask = map(torch.from_numpy, left_padded(prompts))
    written, expected = _written(model, ids, mask)
    bound = (RELATIVE.get(expected.dtype, 2e-2) if rtol is None else rtol) * float(expected.abs().max())
    session, differences = DecoderSession(file), list[float]()
    logits = session.start(ids.numpy(), mask.numpy())
    for step, (wanted, like) in enumerate(zip(written.unbind(1), expected.float().unbind(1), strict=True)):
        found = torch.from_numpy(logits)
        differences.append(float((found - like).abs().max()))
        lead = like.gather(1, wanted[:, None]) - like.gather(1, found.argmax(1, keepdim=True))
        if not (differences[-1] <= bound and float(lead.max()) <= 2 * bound):
            what = f"logits differ by {differences[-1]:.3g}, allowed is {bound:.3g}"
            fix = "nothing was published; raise rtol if this is acceptable"
            raise VerificationError(what, where=f"token {step} that ONNX Runtime writes", fix=fix)
        logits = session.step(wanted.numpy())
    return {
        f"{len(ids)} prompts of {ids.shape[1]} tokens": differences[0],
        f"{len(differences)} tokens written": max(differences),
    }


@torch.no_grad()
def _written(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the model goes on with, (rows, steps), and the logits it came of, (rows, steps, vocabulary)."""
    from transformers import GenerationConfig  # there where a model of it is

    longest = longest_sequence(model.config.get_text_config().to_dict()) or ids.shape[1] + STEPS
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=max(1, min(STEPS, longest - ids.shape[1])), pad_token_id=0
    )
    with evaluating(model), generating_by(model, settings):
        found = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, 1)


def _prompts(model: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts of unlike length."""
    if tokenizer is not None:
        return [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    vocabulary, chance = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (tokens,), generator=chance).tolist() for tokens in PROMPT_TOKENS]


def _require_own_folder(folder: Path, names: Iterable[str]) -> None:
    """Raises ArtifactError where an export would replace files of something else."""
    there = [name for name in names if (folder / name).exists()]
    if there and not (folder / GENAI).is_file():
        what = f"the folder holds {there[0]} of something else"
        raise ArtifactError(what, where=folder.name, fix="export to a folder of its own")
