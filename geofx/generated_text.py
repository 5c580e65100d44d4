"""Further calibration text, which the model writes itself."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from geofx.batches import Batch, token_mask, vocabularies
from geofx.errors import out_of_memory
from geofx.objective import NextToken, Objective, token_input
from geofx.program import Program
from geofx.progress import Progress, log_progress
from geofx.trace import evaluating

logger = logging.getLogger(__name__)

PROMPT_RATIO = 1 / 16
"""Share of a window that is given to the model as the beginning of what it writes."""
ROWS = 128
"""Windows that are written at once at most: matmuls with fewer rows than 64 are slow."""
CACHE_LIMIT = 4 * 2**30
"""Bytes of keys and values of the windows that are written at once."""
REPLACED_RATIO = 0.3
"""Share of the tokens that are drawn anew where nothing can be written."""


def generated_text(
    module: nn.Module | None,
    program: Program,
    batches: list[Batch],
    objective: Objective,
    rounds: int,
    seed: int = 0,
    progress: Progress = log_progress,
) -> list[Batch]:
    """``rounds`` further windows for each given: the model's own writing, or else with tokens replaced.

    What a factorization loses on unseen text is mostly what its moments did not see. There are none where
    the model takes no rows of tokens. All batches of a round come before those of the next.
    """
    ids = token_input(program)
    if ids is None or any(batch[ids].dim() != 2 for batch in batches):
        return []
    writes = isinstance(objective, NextToken) and _generates(module)
    if writes and {"input_ids"} <= set(program.input_names) <= {"input_ids", "attention_mask"}:
        try:
            return written_text(module, batches, rounds, seed, progress)
        except Exception as error:  # the user's model at work, in whatever way it generates
            if out_of_memory(error):
                raise
            logger.warning("the model writes no text, tokens are replaced instead: %s", error)
    return replaced_tokens(batches, rounds, ids, vocabularies(program)[ids], seed)


def replaced_tokens(
    batches: list[Batch], rounds: int, ids: str, vocabulary: int, seed: int = 0
) -> list[Batch]:
    """The batches with `REPLACED_RATIO` of their tokens, but for the first and the last of a row, drawn anew.

    They are drawn evenly from the ``vocabulary``: rare ones are what text of any length shows too little of.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in batches * rounds:
        known = batch[ids]
        drawn = torch.randint(vocabulary, known.shape, generator=generator).to(known)
        free = (torch.rand(known.shape, generator=generator) < REPLACED_RATIO).to(known.device)
        found.append({**batch, ids: torch.where(free & _inner(known, batch), drawn, known)})
    return found


def _inner(ids: Tensor, batch: Batch) -> Tensor:
    """Where a token stands between two others that are not padding."""
    mask = token_mask(batch)
    held = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    inner = torch.zeros_like(held)
    inner[:, 1:-1] = held[:, :-2] & held[:, 1:-1] & held[:, 2:]
    return inner


def written_text(
    module: Any, batches: list[Batch], rounds: int, seed: int = 0, progress: Progress = log_progress
) -> list[Batch]:
    """x_{t+1} ~ p(· | x_1 .. x_t), ancestral sampling at temperature 1 from ``rounds`` parts of each window.

    Samples are unlimited: they lie where the model's own distribution does, and their next tokens are those
    of the true Fisher information (Williams, Chrysostomou and Aletras, 2025; Liu et al., 2023). Windows have
    the lengths of those given, padded ones that of the next lower power of two, and begin as these do.
    Batches hold ``input_ids`` and ``attention_mask``, (batch, length) int64.
    """
    windows = [rows for batch in batches for rows in _unpadded(batch)]
    prompts, written_of = list(_prompts(module, windows, rounds)), defaultdict[int, list[Tensor]](list)
    size = max((len(batch["input_ids"]) for batch in batches), default=1)
    written, wanted = 0, sum(max(0, length - rows.shape[1]) for rows, length in prompts)

    def one_more() -> None:
        nonlocal written
        written += 1
        progress("write text", written, wanted)

    progress("write text", 0, wanted)
    for number, (rows, length) in enumerate(prompts):
        with torch.random.fork_rng(), evaluating(module):
            torch.manual_seed(seed + number)
            written_of[length].append(_written(module, rows, length, one_more))
    by_round = zip(*(torch.chunk(torch.cat(parts), rounds) for parts in written_of.values()), strict=True)
    parts = [part for whole in by_round for alike in whole for part in torch.split(alike, size)]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]


def _unpadded(batch: Batch) -> Iterator[Tensor]:
    """The batch, or each row of a padded one, (n, length); rows are cut so that many have one length."""
    ids, mask = batch["input_ids"].cpu(), token_mask(batch)
    if mask is None:
        yield ids
        return
    for row, held in zip(ids, mask.cpu(), strict=True):
        known = row[held]
        if len(known) > 1:
            yield known[: 1 << (len(known).bit_length() - 1)][None]


def _generates(module: nn.Module | None) -> bool:
    can = getattr(module, "can_generate", None)
    return can is not None and bool(can())


def _of_one_length(windows: list[Tensor]) -> list[Tensor]:
    """(n, length) of each length."""
    lengths = sorted({rows.shape[1] for rows in windows})
    return [torch.cat([rows for rows in windows if rows.shape[1] == length]) for length in lengths]


def _prompts(module: Any, windows: list[Tensor], rounds: int) -> Iterator[tuple[Tensor, int]]:
    """(prompts, length of the window to write); each round begins at another place of the windows."""
    start = _common_start(windows) if windows else 0
    for whole in _of_one_length(windows):
        length = whole.shape[1]
        size = max(1, round(PROMPT_RATIO * length))
        places = [start + turn * max(0, length - start - size) // rounds for turn in range(rounds)]
        prompts = torch.cat(
            [torch.cat([whole[:, :start], whole[:, place : place + size]], 1) for place in places]
        )
        most = min(ROWS, max(1, CACHE_LIMIT // (length * _cache_bytes(module))))
        for rows in torch.tensor_split(prompts, -(-len(prompts) // most)):
            yield rows, length


def _cache_bytes(module: Any) -> int:
    """Of the keys and values of one token in float32, as the configuration tells."""
    config = module.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 8 * int(config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width)


def _common_start(windows: list[Tensor]) -> int:
    """How many tokens all windows begin with alike, such as BOS."""
    first = windows[0][0]
    shortest = min(rows.shape[1] for rows in windows)
    for place in range(shortest // 2):
        if any(bool((rows[:, place] != first[place]).any()) for rows in windows):
            return place
    return 0


@contextmanager
def generating_by(module: Any, settings: Any) -> Iterator[None]:
    """`generate` by ``settings``, and not by the model's own where these leave something open."""
    own, module.generation_config = module.generation_config, settings
    try:
        yield
    finally:
        module.generation_config = own


@torch.no_grad()
def _written(module: Any, prompts: Tensor, length: int, each: Callable[[], None]) -> Tensor:
    """(n, length): the prompts and what the model goes on with, ``each`` called at each token.

    It does not end before.
    """
    from transformers import GenerationConfig, LogitsProcessorList  # there where a module can generate

    more = length - prompts.shape[1]
    if more < 1:
        return prompts[:, :length]
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=more,
        min_new_tokens=more,
        pad_token_id=int(prompts[0, 0]),
        eos_token_id=module.generation_config.eos_token_id,
    )

    def told(_: Tensor, scores: Tensor) -> Tensor:
        each()
        return scores

    given = prompts.to(next(module.parameters()).device)
    mask = torch.ones_like(given)
    with generating_by(module, settings):
        written: Tensor = module.generate(
            given, attention_mask=mask, logits_processor=LogitsProcessorList([told])
        )
    return written.cpu()
