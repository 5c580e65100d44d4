"""The original beside a saved result: no other model will do."""

from __future__ import annotations

from geofx.digest import hash_tensors
from geofx.errors import ConfigError
from geofx.model import OptimizedModel
from geofx.program import Program
from geofx.sources import Source
from geofx.trace import trace


def original_of(result: OptimizedModel, source: Source, option: str = "--original") -> Program:
    """The graph of ``source``, which ``result`` was made from, traced as that was; ``option`` named it.

    Raises:
        CaptureError: it does not take the result's inputs.
        ConfigError: its weights are not those that the plan was made for.
    """
    found = trace(source.model, dict(result.program.example))
    if hash_tensors(found.tensors()) != result.plan.model_hash:
        raise ConfigError(
            "the original is not the model that the saved result was made from",
            where=f"{option} {source.description}",
            fix="give the model that geofx optimize was given, with the same weights",
        )
    return found
