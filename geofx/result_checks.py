"""What a result must be before anybody gets it: factors as declared, as small as planned, and finite."""

from __future__ import annotations

import logging

import torch

from geofx.errors import NumericsError, PlanError, VerificationError
from geofx.factorizations import Factorization, Factors
from geofx.piece import Piece
from geofx.plan import Plan
from geofx.program import Program, flat_tensors
from geofx.region import Region

logger = logging.getLogger(__name__)

EDITED, CLOSEST = "edited", "closest"
"""Solver status of a plan that was changed by hand, and of the best one where none meets the budget."""


def require_declared(form: Factorization, region: Region, factors: Factors) -> None:
    """Raises PlanError unless ``factors`` are what ``form`` declares, on which its price rests."""
    declared = {name: (*part.shape, part.dtype) for name, part in Piece.of(form, region).factors().items()}
    found = {name: (*part.shape, part.dtype) for name, part in factors.items()}
    for name in declared.keys() | found.keys():
        if declared.get(name) != found.get(name):
            raise PlanError(
                f"{form.name} fitted {name!r} as {found.get(name)}, and declares {declared.get(name)}",
                where=region.name,
                fix="fit in the weight's dtype, and int32 for a name that begins with 'index'",
            )


def require_planned(program: Program, plan: Plan) -> None:
    """The graph stores what the plan said; a plan that was not edited also keeps its budget."""
    stored = {"size": program.size_bytes(), "parameters": program.parameter_count()}
    said = {"size": plan.predicted.bytes, "parameters": plan.predicted.parameters}
    for name, value in stored.items():
        if value != said[name]:
            raise VerificationError(
                f"the result holds {value} ({name}), the plan said {said[name]}", fix="report this as a bug"
            )
    used = plan.used
    over = [name for name in plan.limits if name in stored and (used[name] or 0) > plan.limits[name]]
    if over and plan.solver.status in (EDITED, CLOSEST):
        logger.warning("the plan exceeds its budget in %s", ", ".join(over))
    elif over:
        raise VerificationError(
            f"the result exceeds its budget in {', '.join(over)}", fix="report this as a bug"
        )


def require_finite_output(program: Program) -> None:
    """Raises NumericsError where the program gives NaN on its example."""
    with torch.no_grad(), program.buffers_kept():
        output = flat_tensors(program(**program.example))
    if any(value.isnan().any() for value in output if value.is_floating_point()):
        raise NumericsError("the optimized model gives NaN on its example", fix="raise the budget")
