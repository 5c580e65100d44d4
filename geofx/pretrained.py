"""The door to transformers, opened only where it is loaded: geofx works without it."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import wrapt
from torch import nn

_BRIDGE = "geofx.huggingface"


def register() -> None:
    """Let `from_pretrained` load factorized models, from when transformers is imported."""
    wrapt.register_post_import_hook(lambda _: import_module(_BRIDGE), "transformers.quantizers.auto")


def make_saveable(model: nn.Module) -> None:
    """Let ``model``, where it is one of transformers, save itself for `from_pretrained`."""
    models: Any = sys.modules.get("transformers.modeling_utils")
    if models is not None and isinstance(model, models.PreTrainedModel):
        import_module(_BRIDGE).attach(model)
