"""From a saved folder back to the result: graph, plan, report, and the model's own class where known."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from geofx import artifact
from geofx.errors import ArtifactCorruptError, ArtifactMismatchError, ConfigError
from geofx.factorizations import Factored, factor_name
from geofx.model import OptimizedModel
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
            from their configuration when it is left out, but not before they are asked for.

    Raises:
        ArtifactError: damaged, incomplete, newer, or not a geofx folder; nothing partial is returned.
    """
    saved = artifact.load(path)
    plan = Plan.from_json(saved.plan_json)
    rewrites = rewrites_of(saved.program, plan)
    rebuild = None if saved.config is None else partial(_rebuilt, saved, rewrites)
    report = Report.from_json(saved.report_json)
    return OptimizedModel(
        program=saved.program,
        plan=plan,
        report=report,
        fidelity=_fidelity(report),
        rewrites=rewrites,
        module=module,
        rebuild=rebuild,
        config=saved.config,
        files=saved.files,
    )


def rewrites_of(program: Program, plan: Plan) -> dict[str, Factored]:
    """The factors of every rewritten region, out of the graph's own tensors.

    Raises:
        ArtifactMismatchError: the graph does not hold what the plan says.
    """
    found: dict[str, Factored] = {}
    for choice in plan.rewritten:
        shapes = choice.factorization.factor_shapes(choice.as_region())
        try:
            factors = {name: program.weight(factor_name(choice.weights, name)) for name in shapes}
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
        found[choice.region] = Factored(choice.factorization, factors, choice.weights)
    return found


def _rebuilt(saved: artifact.Artifact, rewrites: Mapping[str, Factored]) -> nn.Module:
    """The Hugging Face model of the saved configuration with the graph's parameters and buffers.

    Weights that were rewritten stay as they come: `to_module` replaces their layers. Buffers that the graph
    does not read are the constructor's, unless the model would store them.

    Raises:
        ConfigError: the model cannot be made, or has a tensor that the graph does not hold.
    """
    assert saved.config is not None
    program, model = saved.program, module_from_config(saved.config, saved.files)
    trained = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = _value(name, tensor, program, rewrites)
        if value is None and name not in trained:
            continue
        if value is None or value.shape != tensor.shape:
            what = f"the graph does not hold {name!r} of shape {tuple(tensor.shape)}"
            raise ConfigError(what, where=type(model).__name__, fix="geofx.load(path, module=your_model)")
        tensor.data = value.detach()
        tensor.requires_grad_(value.requires_grad)
    return model.eval()


def _value(
    name: str,
    tensor: Tensor,
    program: Program,
    rewrites: Mapping[str, Factored],
) -> Tensor | None:
    """The graph's tensor of this name; of a rewritten weight ``tensor`` itself, in its factors' type."""
    try:
        return program.weight(name)
    except KeyError:
        weight = program.aliases.get(name, name)
    rewritten = next((factored for factored in rewrites.values() if weight in factored.weights), None)
    if rewritten is None:
        return None
    like = next(part for part in rewritten.factors.values() if part.is_floating_point())
    return tensor.detach().to(like.dtype).requires_grad_(like.requires_grad)


def _fidelity(report: Report) -> Fidelity | None:
    """The figures of the report as they were measured; what is infinite is null in a report.

    Raises:
        ArtifactCorruptError: they are not those of a Fidelity.
    """
    if not report.fidelity:
        return None
    values: dict[str, Any] = dict(report.fidelity)
    if values.get("sqnr_db") is None:
        values["sqnr_db"] = float("inf")
    try:
        return Fidelity(**values)
    except TypeError as error:
        raise ArtifactCorruptError(
            f"not a fidelity: {error}", where="report.json", fix="save again"
        ) from error
