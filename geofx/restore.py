"""From a saved folder back to the result: graph, plan, report, and the model's own class where known."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geofx import artifact
from geofx.errors import ArtifactMismatchError
from geofx.factorizations import Factorization, Factors
from geofx.model import OptimizedModel
from geofx.passes.lower import factor_name
from geofx.plan import Plan
from geofx.program import Program
from geofx.report import Report
from geofx.sources import module_from_config
from geofx.verify import Fidelity


def load(path: str | Path, *, module: nn.Module | None = None) -> OptimizedModel:
    """What `OptimizedModel.save` wrote, every byte checked; runs without the model's own code.

    Args:
        path: the folder.
        module: the original model, for `to_module` and TorchScript; Hugging Face models are rebuilt
            from their configuration when it is left out.

    Raises:
        ArtifactError: damaged, incomplete, newer, or not a geofx folder; nothing partial is returned.
    """
    saved = artifact.load(path)
    plan = Plan.from_json(saved.plan_json)
    rewrites = rewrites_of(saved.program, plan)
    if module is None and saved.config is not None:
        module = _rebuilt(saved.config, saved.program, rewrites)
    report = Report.from_json(saved.report_json)
    return OptimizedModel(
        program=saved.program,
        plan=plan,
        report=report,
        fidelity=_fidelity(report),
        rewrites=rewrites,
        module=module,
        config=saved.config,
        files=saved.files,
    )


def rewrites_of(program: Program, plan: Plan) -> dict[str, tuple[Factorization, Factors]]:
    """The factors of every rewritten region, out of the graph's own tensors.

    Raises:
        ArtifactMismatchError: the graph does not hold what the plan says.
    """
    found: dict[str, tuple[Factorization, Factors]] = {}
    for choice in plan.rewritten:
        shapes = choice.factorization.factor_shapes(choice.as_region())
        try:
            factors = {name: program.weight(factor_name(choice.region, name)) for name in shapes}
        except KeyError as error:
            raise ArtifactMismatchError(
                "the graph lacks a factor of the plan", where=str(error), fix="save again"
            ) from error
        wrong = next((name for name, shape in shapes.items() if tuple(factors[name].shape) != shape), None)
        if wrong is not None:
            raise ArtifactMismatchError(
                f"factor {wrong!r} is {tuple(factors[wrong].shape)}, the plan says {shapes[wrong]}",
                where=choice.region,
            )
        found[choice.region] = (choice.factorization, factors)
    return found


def _rebuilt(
    config: Mapping[str, Any], program: Program, rewrites: Mapping[str, tuple[Factorization, Factors]]
) -> nn.Module | None:
    """The Hugging Face model of this configuration with the graph's weights; None unless every one is known.

    Weights that were rewritten are left as they come: `to_module` replaces their layers.
    """
    model = module_from_config(config)
    if model is None:
        return None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            with suppress(KeyError):
                parameter.copy_(program.weight(name))
                continue
            if program.aliases.get(name, name) not in rewrites:
                return None
    return model.eval()


def _fidelity(report: Report) -> Fidelity | None:
    values = dict(report.fidelity)
    if not values:
        return None
    if values.get("sqnr_db") is None:
        values["sqnr_db"] = float("inf")
    unit = report.calibration.unit if report.calibration is not None else ""
    return Fidelity(**values, unit=unit)  # type: ignore[arg-type]
