"""How far a long piece of work has come, told to whoever wants to show it."""

from __future__ import annotations

import logging
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Called as work goes on: ``done`` of ``total`` steps of ``stage``; ``done == total`` ends the stage.

    The first call of a stage has ``done == 0``, unless it goes on where it was stopped; ``total == 0`` says
    that there is nothing to do.
    """

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note; must be cheap, and must not raise."""
        ...


def log_progress(stage: str, done: int, total: int) -> None:
    """The library's default: one line at the start and one at the end of a stage, in the log."""
    if total == 0:
        return
    if done == 0:
        logger.info("%s: started", stage)
    elif done == total:
        logger.info("%s: done", stage)
