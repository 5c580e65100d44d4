"""The contract of a pass, and the runner that holds passes to it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

from geofx.annotations import Key
from geofx.errors import GeofxError, PassError
from geofx.program import Program

logger = logging.getLogger(__name__)


class Pass(Protocol):
    """A frozen dataclass whose ``run`` changes or annotates a graph in place."""

    name: ClassVar[str]
    reads: ClassVar[tuple[Key[Any], ...]]
    writes: ClassVar[tuple[Key[Any], ...]]

    def run(self, program: Program) -> bool:
        """Do the work; True exactly when the graph changed."""
        ...


def run_passes(program: Program, passes: Iterable[Pass], written: Iterable[Key[Any]] = ()) -> bool:
    """Run ``passes`` in order, check the graph after each; True when any changed it.

    ``written`` are the keys that earlier runs left on the graph.

    Raises:
        PassError: a key is read that nothing wrote, or a pass failed; names it and those already run.
    """
    sequence = tuple(passes)
    _require_written(sequence, written)
    changed = False
    done: list[str] = []
    for item in sequence:
        try:
            changed |= item.run(program)
            program.check()
        except GeofxError as error:
            error.add_note(f"in pass {item.name!r}, after {', '.join(done) or 'none'}")
            raise
        except Exception as error:
            already = ", ".join(done) or "none"
            raise PassError(
                f"pass {item.name!r} failed: {error}", where=f"passes already run: {already}"
            ) from error
        done.append(item.name)
    return changed


def _require_written(sequence: tuple[Pass, ...], written: Iterable[Key[Any]]) -> None:
    available = {key.name for key in written}
    for item in sequence:
        missing = next((key for key in item.reads if key.name not in available), None)
        if missing is not None:
            raise PassError(
                f"pass {item.name!r} reads {missing.name}", fix=f"run {missing.writer!r} before it"
            )
        available |= {key.name for key in item.writes}
