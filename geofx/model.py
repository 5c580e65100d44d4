"""The result: callable like the model, with its graph, plan and report; saves and exports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from geofx import artifact
from geofx.batches import Batch
from geofx.compression import Certificate, certify
from geofx.errors import ConfigError
from geofx.export.onnx import OnnxReport, to_onnx
from geofx.export.torchscript import TorchScriptReport, to_torchscript
from geofx.factorizations import Factored
from geofx.factorized_module import factorize_module
from geofx.objective import UserLoss, choose_objective
from geofx.parameter_space import ParameterSpace
from geofx.plan import Plan
from geofx.pretrained import make_saveable
from geofx.program import Program
from geofx.report import Report
from geofx.trace import trace
from geofx.verify import Fidelity, verify


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
        make_saveable(copied)
        return copied

    def to_onnx(self, path: str | Path) -> OnnxReport:
        """Export with standard operators, checked in ONNX Runtime before it is published."""
        return to_onnx(self.program, Path(path))

    def to_torchscript(self, path: str | Path) -> TorchScriptReport:
        """Trace `to_module` to TorchScript (legacy), checked in a process without geofx."""
        module, program = self.to_module(), self.program
        return to_torchscript(module, program.example, Path(path), dynamic_shapes=program.dynamic_shapes)

    def _original(self, given: nn.Module | Program | None) -> Program:
        known = given or self.original or self.module
        if known is None:
            raise ConfigError(
                "the original parameters are not known here", fix="geofx.load(path, module=your_model)"
            )
        return known if isinstance(known, Program) else trace(known, dict(self.program.example))

    def __reduce__(self) -> NoReturn:
        raise ConfigError("geofx never pickles", fix="use save() and geofx.load()")
