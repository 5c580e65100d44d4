"""ONNX export of a decoder with its past: published after it has written what the model writes."""

from __future__ import annotations

import json
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geofx.batches import longest_sequence
from geofx.errors import ArtifactError, GeofxError, VerificationError
from geofx.export.cases import RELATIVE
from geofx.export.decoder import trace_decoder
from geofx.export.decoder_session import DecoderSession, left_padded
from geofx.export.genai import FILE as GENAI
from geofx.export.genai import genai_config
from geofx.export.onnx_file import OnnxReport, data_files, published
from geofx.export.onnx_graph import require_exportable
from geofx.export.onnx_runtime import require_onnx
from geofx.export.onnx_variants import Variant
from geofx.export.staging import target_file
from geofx.generated_text import generating_by
from geofx.trace import evaluating

STEPS = 32
"""Tokens that the file has to write as the model does."""
PROMPTS = "The history of the city begins in the", "def fibonacci(n):\n    if n < 2:\n        return n\n"
PROMPT_TOKENS = 24, 16
"""Of prompts where there is no tokenizer."""
LONGEST = 128
"""Tokens of a check, prompts and what is written; prompts are cut to it."""


def to_onnx_decoder(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    beside: Mapping[str, bytes] | None = None,
    rtol: float | None = None,
    variant: Variant | None = None,
) -> OnnxReport:
    """Publish a decoder as one graph for prompts and single tokens, with what runtimes look for beside it.

    Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` where the model takes them, and
    ``past_key_values.N.key`` and ``.value``, (batch, heads, tokens, width), empty at first; outputs are
    ``logits`` and ``present.N.key`` and ``.value``. Batch, sequence and past may have any size. It is
    published once ONNX Runtime, from an empty past, has followed ``model.generate``: two left-padded prompts
    together, and a single token alone.

    Args:
        model: of transformers, on the CPU.
        path: ``.onnx``, in a folder of its own, which is made where there is none.
        tokenizer: of the prompts that are written on; without one they are of tokens by chance.
        beside: further files for the folder, such as ``config.json`` and the tokenizer's.
        rtol: largest difference of logits as a share of the largest; None: by their type.
        variant: what becomes of the file that was checked.

    Raises:
        MissingDependencyError: the ``onnx`` extra is not installed.
        ArtifactError: the folder holds something else.
        CaptureError, ExportError: the model is no such decoder, or has no standard ONNX form.
        VerificationError: the file writes something else, or weighs more; nothing is published.
    """
    require_onnx()
    start = time.perf_counter()
    target = target_file(path, ".onnx", own_folder=True)
    files = {GENAI: b"", **(beside or {})}
    _require_own_folder(target, files)
    program, cache = trace_decoder(model)
    require_exportable(program)
    files[GENAI] = json.dumps(genai_config(model, target.name, program.input_names, cache), indent=1).encode()
    prompts = _prompts(model, tokenizer)

    def check(file: Path) -> dict[str, float]:
        together = require_same_tokens(model, file, prompts, rtol)
        return together | require_same_tokens(model, file, [prompts[0][:1]], rtol)

    return published(program, target, check, start, variant or Variant(), files)


def require_same_tokens(
    model: nn.Module, file: Path, prompts: Sequence[Sequence[int]], rtol: float | None = None
) -> dict[str, float]:
    """The largest difference of logits while ``file``, in ONNX Runtime, writes what ``model.generate`` does.

    Greedily, in all rows at once, each token that the model wrote read in turn. Logits within the bound make
    the same tokens, but where two of the model's are within twice the bound of one another.

    Raises:
        VerificationError: logits differ by more, or ONNX Runtime fails.
    """
    ids, mask = map(torch.from_numpy, left_padded(prompts))
    written, expected = _written(model, ids, mask)
    dtype = next(parameter.dtype for parameter in model.parameters())
    bound = (RELATIVE.get(dtype, 2e-2) if rtol is None else rtol) * float(expected.abs().max())
    differences = []
    for step, (like, found) in enumerate(
        zip(expected.unbind(1), _follow(file, ids, mask, written), strict=True)
    ):
        differences.append(float((torch.from_numpy(found) - like.float()).abs().max()))
        if not differences[-1] <= bound:
            what = f"logits differ by {differences[-1]:.3g}, allowed is {bound:.3g}"
            fix = "nothing was published; raise rtol if this is acceptable"
            raise VerificationError(what, where=f"token {step} that ONNX Runtime writes", fix=fix)
    what = f"{len(ids)} x {ids.shape[1]} tokens"
    return {what: differences[0], f"{what}, {len(differences)} written": max(differences)}


def _follow(file: Path, ids: Tensor, mask: Tensor, written: Tensor) -> Iterator[NDArray[np.float32]]:
    """What ONNX Runtime gives, (rows, vocabulary), for each of the tokens that were ``written``."""
    try:
        session = DecoderSession(file)
        yield session.start(ids.numpy(), mask.numpy())
        for tokens in written[:, :-1].unbind(1):
            yield session.step(tokens.numpy())
    except GeofxError:
        raise
    except Exception as error:
        what = f"ONNX Runtime fails: {str(error)[:300]}"
        raise VerificationError(what, where=file.name, fix="nothing was published") from error


@torch.no_grad()
def _written(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What the model goes on with, (rows, steps), and the logits it came of, (rows, steps, vocabulary)."""
    from transformers import GenerationConfig  # there where a model of it is

    steps = min(STEPS, _longest(model) - ids.shape[1])
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=steps, pad_token_id=0
    )
    with evaluating(model), generating_by(model, settings):
        found = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, 1)


def _prompts(model: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts of unlike length, with room for more."""
    if tokenizer is not None:
        return [list(tokenizer(prompt)["input_ids"])[: _longest(model) - 1] for prompt in PROMPTS]
    vocabulary, chance = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    lengths = (min(tokens, _longest(model) - 1) for tokens in PROMPT_TOKENS)
    return [torch.randint(vocabulary, (length,), generator=chance).tolist() for length in lengths]


def _longest(model: Any) -> int:
    """Tokens of a prompt and what follows that the model has positions for, as far as they are needed."""
    known = longest_sequence(model.config.get_text_config().to_dict())
    return max(2, min(known or LONGEST, LONGEST))


def _require_own_folder(target: Path, names: Container[str]) -> None:
    """Raises ArtifactError where the folder holds what an export would replace or leave beside it."""
    there = sorted(path.name for path in target.parent.iterdir() if not path.name.startswith("."))
    own = {target.name, *data_files(target)} if GENAI in there else set()
    for name in there:
        if name not in own and not (own and name in names):
            what = f"the folder holds {name} of something else"
            raise ArtifactError(what, where=target.parent.name, fix="export to a folder of its own")
