"""The result: callable like the model, with its graph, plan and report; saves and exports."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from geofx import artifact
from geofx.batches import Batch, inputs_of, longest_sequence, split, spread, warn_of_shared_rows
from geofx.compression import Certificate, certify, parameter_mae
from geofx.errors import CalibrationError, ConfigError
from geofx.export.onnx import to_onnx
from geofx.export.onnx_decoder import to_onnx_decoder
from geofx.export.onnx_file import OnnxReport
from geofx.export.onnx_variants import Measure, OnnxModel, Variant
from geofx.export.pt2 import Pt2Report, to_pt2
from geofx.export.torchscript import TorchScriptReport, to_torchscript
from geofx.factorizations import Factored
from geofx.factorized_module import factorize_module
from geofx.fusion import fused, rows_of
from geofx.objective import UserLoss, choose_objective
from geofx.parameter_space import ParameterSpace
from geofx.plan import Plan
from geofx.pretrained import make_saveable
from geofx.program import Program
from geofx.progress import Progress, log_progress
from geofx.recovery import Recovery
from geofx.report import Report
from geofx.sources import tokenizer_of
from geofx.target import Target
from geofx.text import batches_of
from geofx.trace import constants_of, in_type, trace
from geofx.training import Training
from geofx.verify import VALIDATION, Fidelity, verify


@dataclass(frozen=True, eq=False)
class OptimizedModel:
    """What `optimize`, `Analysis.apply` and `load` return.

    Attributes:
        program: the rewritten graph; ``program.graph_module`` is the fx.GraphModule.
        plan: what was chosen for every region and why.
        report: original against optimized, as figures.
        fidelity: measured on held-out data; None where there was none.
        rewrites: region name -> the format as fitted, its factors and its weights.
        module: the user's own module, never changed, and sharing with the graph what is not rewritten;
            None after `load`.
        config: the Hugging Face configuration, if the model had one.
        files: further files that `save` keeps, such as the tokenizer's.
        rebuild: makes ``module`` anew where it is None; None where geofx does not know its class.
        original: the graph that was optimized; None after `load`.
    """

    program: Program
    plan: Plan
    report: Report
    fidelity: Fidelity | None
    rewrites: Mapping[str, Factored]
    module: nn.Module | None = None
    config: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    rebuild: Callable[[], nn.Module] | None = None
    original: Program | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten graph; takes what the model took and returns what it returned."""
        return self.program(*args, **kwargs)

    def eval(self) -> OptimizedModel:
        """Itself: the graph was traced in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> OptimizedModel:
        """Itself for ``mode=False``.

        Raises:
            ConfigError: the graph has no training mode; `to_module` has.
        """
        if mode:
            raise ConfigError(
                "a traced graph has no training mode", fix="train the module that to_module() returns"
            )
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that the graph reads, by name."""
        return dict(self.program.tensors())

    def certify(
        self,
        delta1: float,
        delta2: float,
        eta: float,
        *,
        original: nn.Module | Program | None = None,
        holdout: Iterable[Batch] | None = None,
        loss: UserLoss | None = None,
    ) -> Certificate:
        """Whether this is a (δ₁, δ₂, η)-compression: FDL < δ₁, ACC < δ₂ and CR > η (`geofx.compression`).

        FDL and CR are taken from the tensors, now; ACC is the mean loss that was measured on held-out data.

        Args:
            original: the model as it was; needed after `load`, unless ``module`` was passed there.
            holdout: batches to measure ACC on anew.
            loss: the loss of these, where the model was optimized for one of its own.

        Raises:
            ConfigError: the original is not known, or is of another model.
            VerificationError: the loss was not measured, and ``holdout`` is not given.
        """
        known, fidelity = self._original(original), self.fidelity
        if holdout is not None:
            held = list(holdout)
            fidelity = (
                verify(known, self.program, held, choose_objective(known, held[0], loss)) if held else None
            )
        return certify(known, self.program, self.rewrites, fidelity, (delta1, delta2, eta))

    def parameter_space(self, original: nn.Module | Program | None = None) -> ParameterSpace:
        """The reconstructed parameters v̂, at the coordinates of the original's."""
        return ParameterSpace.of(self._original(original)).reconstructed(self.program, self.rewrites)

    def recover(
        self,
        data: Any,
        *,
        teacher: nn.Module | None = None,
        validation: Any = None,
        holdout: Any = None,
        tokenizer: Any = None,
        loss: UserLoss | None = None,
        progress: Progress = log_progress,
        **training: Any,
    ) -> OptimizedModel:
        """The same model with factors, norms and biases trained to give the original's outputs again.

        Ranks, graph and size stay. The state with the least of the loss that is trained for, which ``labels``
        changes, is kept: in it the result is not worse than this on ``validation``, which nothing is trained
        on.

        Args:
            data: what to train on, as for `analyze`; the original's outputs are the targets.
            teacher: the original; needed after `load`, unless ``module`` was passed there.
            validation: data to choose the best state on; by default an eighth of ``data``: what `analyze`
                keeps apart of these, so that a model that was refined on them has not seen it.
            holdout: data to measure the result on; by default those of ``validation``.
            tokenizer: cuts text into windows.
            loss: the loss to measure in, where the model was optimized for one of its own.
            progress: is told the steps.
            training: settings of `geofx.training.Training`: ``steps``, ``learning_rate``, ``accumulate``,
                ``optimizer``, ``schedule``, ``checkpoint``, ``seed``, ``device`` and so on.

        Raises:
            ConfigError: a setting is not known, or the original is not.
            CalibrationError: the data cannot be used.
            NumericsError: the loss is no longer finite.
        """
        settings, original = Training.of(training), self._original(teacher)
        here = replace(self, program=self.program.on_cpu())
        names, longest = self.program.input_names, longest_sequence(self.config)
        batches = batches_of(data, tokenizer, names, "training data", longest)
        unseen = batches_of(validation, tokenizer, names, "validation data", longest)
        if not unseen and len(batches) == 1:
            raise CalibrationError("one batch cannot be both trained and validated on", fix="pass more")
        held = batches_of(holdout, tokenizer, names, "held-out data", longest)
        if not unseen:
            batches, unseen = spread(batches) if held else split(batches)
        warn_of_shared_rows(batches, [*unseen, *held])
        objective, student = choose_objective(original, batches[0], loss), _trainable(here)
        recovery = Recovery(
            student=student,
            teacher=teacher or self.module or original,
            objective=objective,
            training=settings,
            inputs=lambda model, batch: {**_constants(model, batch), **inputs_of(original, batch)},
            rewrites=self.rewrites,
            whole=dict(original.tensors()),
            progress=progress,
        )
        run = recovery.run(batches, unseen)
        result = _with_parameters(here, student.cpu())
        mae = parameter_mae(ParameterSpace.of(original), result.parameter_space(original))
        fidelity = verify(original, result.program, held or unseen, objective, mae, progress)
        if not held:
            fidelity = replace(fidelity, data=VALIDATION)
        return replace(result, fidelity=fidelity, report=self.report.after_recovery(fidelity, run.history))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder that `geofx.load` reads: JSON and safetensors, hashed, all or nothing."""
        return artifact.save(
            Path(path),
            self.program,
            self.plan.to_json(),
            self.report.to_json(),
            extra=self.files,
            config=None if self.config is None else dict(self.config),
            overwrite=overwrite,
        )

    def to_module(self) -> nn.Module:
        """A copy of the user's own module with factorized layers in place of the rewritten ones.

        A model of transformers stays one: `generate`, `save_pretrained` and, where geofx is imported,
        `from_pretrained` of its class work on it.

        Raises:
            ConfigError: a weight's owner is not a linear layer, or the module is not known or cannot be made.
        """
        module = self.rebuild() if self.module is None and self.rebuild is not None else self.module
        if module is None:
            raise ConfigError(
                "the model's own class is not known here", fix="geofx.load(path, module=your_model)"
            )
        copied = factorize_module(module, self.rewrites.values(), self.program.aliases)
        self._set_trained(copied)
        make_saveable(copied)
        return copied

    @torch.no_grad()
    def _set_trained(self, module: nn.Module) -> None:
        """Give ``module`` the graph's values of what was not rewritten: `recover` trains norms and biases."""
        for name, part in module.named_parameters():
            known = self.program.aliases.get(name, name)
            if self.program.holds(known) and self.program.weight(known).shape == part.shape:
                part.copy_(self.program.weight(known))

    def fused(self, target: Target) -> Program:
        """The graph as ``target`` runs it best: with operations of `geofx.ops` where their kernels pay.

        To be run, not kept: `save` and, by default, exports hold the standard operations of ``program``.

        Raises:
            ConfigError: there is no such device.
        """
        return fused(self.program, target, rows_of(self.program, target))

    def to_onnx(
        self,
        path: str | Path,
        *,
        with_past: bool = False,
        rtol: float | None = None,
        dtype: Literal["float16"] | None = None,
        int8: bool = False,
        holdout: Any = None,
    ) -> OnnxReport:
        """Export with standard operators, checked in ONNX Runtime before it is published.

        Args:
            path: where to publish, ``.onnx``; with the past in a folder of its own.
            with_past: write the decoder as one graph for prompts and single tokens, whose keys and values are
                inputs and outputs, with the files beside it that `geofx.runtime.Generator`, onnxruntime-genai
                and others look for; published after it has written the same tokens as the model.
            rtol: largest difference from the original as a share of its largest output; None: by its type.
            dtype: of weights and activations; None keeps the model's own.
            int8: hold the weights of matmuls in 8 bits, by ONNX Runtime's own quantizer and for it alone.
            holdout: data that what the file loses to this model is measured on; needed for ``int8``.

        Raises:
            ConfigError: the model's own class is not known, which the past and ``dtype`` are a matter of; or
                there is nothing to measure 8 bits on.
            ExportError, VerificationError: it cannot be exported, or does something else.
        """
        if int8 and holdout is None:
            raise ConfigError("what 8 bits lose has to be measured", where="int8", fix="pass holdout=")
        if dtype not in (None, "float16"):
            what = f"exports of {dtype} cannot be checked: ONNX Runtime's CPU kernels do not multiply it"
            raise ConfigError(what, where="dtype", fix="use float16, or leave it out")
        variant = Variant(int8, None if holdout is None else self._measure_on(holdout))
        if not (with_past or dtype):
            return to_onnx(self.program, Path(path), rtol=rtol, variant=variant)
        module = self.to_module().cpu().eval().to(None if dtype is None else getattr(torch, dtype))
        if not with_past:
            program = trace(module, in_type(self.program.example, module))
            return to_onnx(program, Path(path), rtol=rtol, variant=variant)
        config = (
            {}
            if self.config is None
            else {"config.json": json.dumps(artifact.without_paths(self.config)).encode()}
        )
        beside = {**self.files, **config}
        tokenizer = tokenizer_of(self.files)
        return to_onnx_decoder(module, path, tokenizer=tokenizer, beside=beside, rtol=rtol, variant=variant)

    def _measure_on(self, holdout: Any) -> Measure:
        """What an exported file loses to this model on ``holdout``."""
        names, longest = self.program.input_names, longest_sequence(self.config)
        held = batches_of(holdout, tokenizer_of(self.files), names, "held-out data", longest)
        objective = choose_objective(self.program, held[0], None)
        return lambda file: verify(self.program, OnnxModel(file), held, objective)

    def to_pt2(
        self,
        path: str | Path,
        *,
        lower: Literal["standard", "custom"] = "standard",
        target: Target | None = None,
        rtol: float | None = None,
        compiled: bool = False,
    ) -> Pt2Report:
        """Export the graph with `torch.export`, checked in a process of its own before it is published.

        Args:
            path: where to publish, ``.pt2``.
            lower: ``"standard"`` writes aten operations, which open without geofx; ``"custom"`` keeps those
                of `fused`, for whoever imports ``geofx.ops`` first.
            target: whose prices say which; for ``"custom"``.
            rtol: largest difference from the original as a share of its largest output; None: by its type.
            compiled: write machine code for this kind of computer, by AOTInductor; it needs a C++ compiler.

        Raises:
            ConfigError: ``lower`` is unknown, or lacks its target.
            ExportError, VerificationError: it cannot be exported, or does something else.
        """
        if lower not in ("standard", "custom") or (lower == "custom") != (target is not None):
            fix = "use lower='standard', or lower='custom' with a target"
            raise ConfigError(f"lower={lower!r} with target={target}", fix=fix)
        return to_pt2(
            self.program if target is None else self.fused(target).on_cpu(),
            path,
            rtol=rtol,
            compiled=compiled,
        )

    def to_torchscript(self, path: str | Path, *, rtol: float | None = None) -> TorchScriptReport:
        """Trace `to_module` to TorchScript (legacy), checked in a process without geofx.

        ``rtol`` is the largest difference from the original as a share of its largest output; None: by its
        type.

        Raises:
            ExportError, VerificationError: it cannot be exported, or does something else.
        """
        module, program = self.to_module(), self.program
        return to_torchscript(
            module, program.example, Path(path), dynamic_shapes=program.dynamic_shapes, rtol=rtol
        )

    def _original(self, given: nn.Module | Program | None) -> Program:
        known = self.original if given is None or given is self.module else given
        known = known or self.module
        if known is None:
            raise ConfigError(
                "the original parameters are not known here", fix="geofx.load(path, module=your_model)"
            )
        if isinstance(known, Program):
            return known.on_cpu()
        moved = any(part.device.type != "cpu" for part in (*known.parameters(), *known.buffers()))
        return trace(copy.deepcopy(known).cpu() if moved else known, dict(self.program.example))

    def __reduce__(self) -> NoReturn:
        raise ConfigError("geofx never pickles", fix="use save() and geofx.load()")


def _constants(model: Any, batch: Batch) -> dict[str, Any]:
    """What a module takes besides tensors, which a traced graph has inside."""
    return constants_of(model, batch) if isinstance(model, nn.Module) else {}


def _trainable(result: OptimizedModel) -> nn.Module:
    """The user's own class with factors in it, or the graph where that is not known; copies, both."""
    if result.module is not None or result.rebuild is not None:
        return result.to_module().eval()
    program = result.program.clone()
    for name, tensor in list(program.tensors()):
        if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
            program.set_tensor(name, tensor.detach().clone(), trainable=tensor.requires_grad)
    return program.graph_module


def _with_parameters(result: OptimizedModel, student: nn.Module) -> OptimizedModel:
    """``result`` with the values of the parameters that were trained."""
    program = result.program.clone()
    for name, part in student.named_parameters():
        known = program.aliases.get(name, name)
        if part.requires_grad and program.holds(known):
            value = part.detach().to(program.weight(known), copy=True)
            program.set_tensor(known, value, trainable=program.weight(known).requires_grad)
    rewrites = {
        region: replace(
            factored,
            factors={name: program.weight(stored).detach() for name, stored in factored.attributes.items()},
        )
        for region, factored in result.rewrites.items()
    }
    return replace(result, program=program, rewrites=rewrites)
