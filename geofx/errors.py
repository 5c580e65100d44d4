"""Every error that geofx raises says three things: what happened, where, and what to do about it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class GeofxError(Exception):
    """Base of all geofx errors: ``what``, ``where`` (site, file, line) and ``fix`` (what to do).

    Attributes:
        exit_code: the command line's exit status for this kind of error.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        place = f" ({where})" if where else ""
        advice = f"; {fix}" if fix else ""
        super().__init__(f"{what}{place}{advice}")


class ConfigError(GeofxError):
    """An argument, option or pattern cannot be used as given."""

    exit_code = 2


class BudgetInfeasibleError(GeofxError):
    """No plan meets the budget.

    Attributes:
        smallest: the least value of each limited resource that some plan reaches.
        best: the plan that comes closest.
        result: the model that was made and measured to miss the budget least, where one was.
    """

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        fix: str = "",
        smallest: dict[str, float] | None = None,
        best: Any = None,
        result: Any = None,
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.smallest = smallest or {}
        self.best, self.result = best, result


class CalibrationError(GeofxError):
    """The calibration data cannot be used."""

    exit_code = 4


class NumericsError(GeofxError):
    """A computation gave values that are not finite, or did not converge."""

    exit_code = 5


class CaptureError(GeofxError):
    """The model cannot be traced to a graph."""

    exit_code = 2


class PassError(GeofxError):
    """A graph pass failed or broke its contract; names the pass and the passes already run."""


class PlanError(ConfigError):
    """A plan is not valid, or not for this model."""


class ArtifactError(GeofxError):
    """A saved folder cannot be read or written."""

    exit_code = 6


class ArtifactCorruptError(ArtifactError):
    """A file is damaged: its hash, structure or content is not what the manifest says."""


class ArtifactVersionError(ArtifactError):
    """A folder was written by a newer geofx."""


class ArtifactMismatchError(ArtifactError):
    """A file belongs to another model or run."""


class ExportError(GeofxError):
    """An export could not be made."""

    exit_code = 7


class VerificationError(ExportError):
    """A result was made but does not agree with what it must equal; it is not published."""


class ResourceError(GeofxError):
    """Disk or memory does not suffice; says how much is needed and how much there is."""

    exit_code = 8


class MissingDependencyError(GeofxError):
    """An optional package is not installed; the fix names the install command."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What ``error`` says first, or of what kind it is where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out in ``error`` or in what caused it; torch says so in words only."""
    while error is not None:
        words = str(error)
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if known or (isinstance(error, RuntimeError) and any(text in words for text in OUT_OF_MEMORY)):
            return True
        error = error.__cause__ or error.__context__
    return False


def lasting(error: Exception) -> bool:
    """Whether the same work would fail again: it is its numbers or settings, not the state of the machine."""
    if out_of_memory(error) or isinstance(error, (ArtifactError, MissingDependencyError, ResourceError)):
        return False
    singular = torch.linalg.LinAlgError  # type: ignore[attr-defined]
    return isinstance(error, (GeofxError, ValueError, ArithmeticError, singular))
