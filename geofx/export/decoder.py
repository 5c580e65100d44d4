"""A decoder whose keys and values are inputs and outputs: one graph for prompts and for single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from geofx.errors import ExportError
from geofx.export.decoder_session import PAST, PRESENT, positions_of
from geofx.program import Program
from geofx.trace import evaluating, forward_names, require_capturable, trace_call, with_arguments

ROWS, TOKENS, KNOWN = 2, 3, 5
"""Sizes of the example: unequal, and above those that `torch.export` takes for constants."""
BATCH, SEQUENCE, PAST_SEQUENCE, TOTAL_SEQUENCE = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)


@dataclass(frozen=True)
class CacheShape:
    """Keys and values of each layer are (batch, heads, tokens, width).

    Attributes:
        sizes: (heads, width) of keys, values, keys of the next layer, and so on.
        dtype: of all.
    """

    sizes: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    @property
    def layers(self) -> int:
        """How many layers keep keys and values."""
        return len(self.sizes) // 2

    @property
    def names(self) -> tuple[str, ...]:
        """``0.key``, ``0.value``, ``1.key`` and so on."""
        return tuple(f"{layer}.{part}" for layer in range(self.layers) for part in ("key", "value"))

    def noise(self, rows: int, tokens: int) -> list[Tensor]:
        """A past of so many tokens, in the order of `names`."""
        generator = torch.Generator().manual_seed(0)
        made = (torch.randn(rows, heads, tokens, width, generator=generator) for heads, width in self.sizes)
        return [part.to(self.dtype) for part in made]


class _Decoder(nn.Module):
    """(ids, mask, positions, past) -> (logits, present) of ``inner``, every tensor by a name."""

    def __init__(self, model: nn.Module, names: Sequence[str], cache: CacheShape) -> None:
        super().__init__()
        self.inner = model

        def forward(**given: Tensor) -> dict[str, Tensor]:
            past = [given.pop(_argument(name)) for name in cache.names]
            output = model(**given, past_key_values=_cache(past), use_cache=True, return_dict=True)
            present = zip(cache.names, _tensors(output.past_key_values), strict=True)
            return {"logits": output.logits} | {f"{PRESENT}{name}": part for name, part in present}

        self.forward = with_arguments(forward, names)


def trace_decoder(model: nn.Module) -> tuple[Program, CacheShape]:
    """The graph of (ids, mask, positions, past) -> (logits, present) of a decoder of transformers.

    Its inputs are named as exports name them, its axes as well: to be exported, not to be called.

    Raises:
        ExportError: the model does not write tokens, or its cache is not keys and values by layer.
        CaptureError: it cannot be traced.
    """
    require_capturable(model)
    cache = cache_shape(model)
    known = dict(zip(map(_argument, cache.names), cache.noise(ROWS, KNOWN), strict=True))
    inputs = {**_prompt(model, TOKENS, KNOWN), **known}
    program = trace_call(_Decoder(model, tuple(inputs), cache), model, inputs)
    names = dict(zip(known, (f"{PAST}{name}" for name in cache.names), strict=True))
    return _named(program, names), cache


def cache_shape(model: nn.Module) -> CacheShape:
    """What the model keeps of the tokens that it has read.

    Raises:
        ExportError: it does not write tokens, or keeps anything but keys and values by layer.
    """
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    writes = getattr(model, "can_generate", bool)() and not encodes
    if not (writes and "past_key_values" in forward_names(model)):
        what = f"{type(model).__name__} does not write tokens, or from what an encoder read"
        raise ExportError(what, fix="export it without the past")
    with evaluating(model), torch.no_grad():
        output = model(**_prompt(model, TOKENS, 0), use_cache=True, return_dict=True)
    parts = _tensors(getattr(output, "past_key_values", None))
    if not parts or any(part.dim() != 4 or part.shape[2] != TOKENS for part in parts):
        raise _no_keys_and_values(type(model).__name__)
    return CacheShape(tuple((part.shape[1], part.shape[3]) for part in parts), parts[0].dtype)


def _argument(name: str) -> str:
    return f"{PAST}{name}".replace(".", "_")


def _prompt(model: Any, tokens: int, past: int) -> dict[str, Tensor]:
    """Ids, mask with a padded row, and positions where the model takes them."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(ROWS * tokens) % vocabulary).reshape(ROWS, tokens)
    mask = torch.ones(ROWS, past + tokens, dtype=torch.int64)
    mask[0, :2] = 0
    positions = torch.from_numpy(positions_of(mask.numpy(), tokens))
    made = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: value for name, value in made.items() if name in forward_names(model)}


def _cache(parts: Sequence[Tensor]) -> Any:
    from transformers import DynamicCache  # there where a model of it is

    return DynamicCache(list(zip(parts[::2], parts[1::2], strict=True)))


def _tensors(cache: Any) -> list[Tensor]:
    """Keys and values by layer.

    Raises:
        ExportError: there is something else.
    """
    layers = getattr(cache, "layers", None) or ()
    parts = [getattr(layer, part, None) for layer in layers for part in ("keys", "values")]
    if not all(isinstance(part, Tensor) for part in parts):
        raise _no_keys_and_values(type(cache).__name__)
    return [part for part in parts if isinstance(part, Tensor)]


def _no_keys_and_values(where: str) -> ExportError:
    what = "what the model keeps of tokens is not keys and values by layer"
    return ExportError(what, where=where, fix="export it without the past")


def _named(program: Program, names: dict[str, str]) -> Program:
    """``program`` with inputs renamed and axes named as deployments expect.

    Raises:
        ExportError: an axis came out of one size.
    """
    lengths = {"attention_mask": TOTAL_SEQUENCE}
    axes: dict[str, dict[int, str]] = {}
    for name, dims in program.dynamic_shapes.items():
        length = PAST_SEQUENCE if name in names else lengths.get(name, SEQUENCE)
        if set(dims) != {0, 2 if name in names else 1}:
            what = "the graph takes one size of batch or sequence only"
            raise ExportError(what, where=name, fix="export it without the past")
        axes[names.get(name, name)] = {dim: length if dim else BATCH for dim in dims}
    return replace(
        program,
        input_names=tuple(names.get(name, name) for name in program.input_names),
        example={names.get(name, name): value for name, value in program.example.items()},
        dynamic_shapes=axes,
    )
