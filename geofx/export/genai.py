"""What onnxruntime-genai reads beside an ONNX decoder: ``genai_config.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from geofx.batches import longest_sequence
from geofx.errors import ExportError
from geofx.export.decoder import CacheShape
from geofx.export.decoder_session import PAST, PRESENT

FILE = "genai_config.json"
SEARCHED = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""Settings of `transformers.GenerationConfig` that are called alike there."""


def genai_config(model: Any, filename: str, inputs: Sequence[str], cache: CacheShape) -> dict[str, Any]:
    """Of a decoder of transformers whose file has these ``inputs``, with its own settings for generating.

    Raises:
        ExportError: keys and values differ in shape, which onnxruntime-genai cannot be told.
    """
    if len(set(cache.sizes)) > 1:
        what = f"keys and values of the layers differ in shape: {sorted(set(cache.sizes))}"
        raise ExportError(what, fix="export it without the past")
    config = model.config.get_text_config()
    (heads, width), longest = cache.sizes[0], longest_sequence(config.to_dict()) or 2048
    taken = ("input_ids", "attention_mask", "position_ids")
    past = {"past_key_names": f"{PAST}%d.key", "past_value_names": f"{PAST}%d.value"}
    present = {"present_key_names": f"{PRESENT}%d.key", "present_value_names": f"{PRESENT}%d.value"}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": width,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": cache.layers,
        "num_key_value_heads": heads,
        "inputs": {name: name for name in taken if name in inputs} | past,
        "outputs": {"logits": "logits"} | present,
    }
    own = {name: getattr(model.generation_config, name, None) for name in SEARCHED}
    search = {name: value for name, value in own.items() if value is not None}
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": longest,
            "decoder": decoder,
            **_special(model),
        },
        "search": {"max_length": longest, "past_present_share_buffer": False, **search},
    }


def _special(model: Any) -> dict[str, Any]:
    """Ids of the special tokens; rows are padded with one that ends them where there is none for it."""
    parts = (model.generation_config, model.config.get_text_config())
    known = {
        name: next((found for part in parts if (found := getattr(part, name, None)) is not None), None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if known["pad_token_id"] is None:
        ends = known["eos_token_id"]
        known["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return {name: value for name, value in known.items() if value is not None}
