"""The result: callable like the model, with its graph, plan and report; saves and exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from geofx import artifact
from geofx.errors import ConfigError
from geofx.export.onnx import OnnxReport, to_onnx
from geofx.export.torchscript import TorchScriptReport, to_torchscript
from geofx.factorizations import Factorization, Factors
from geofx.factorized_module import factorize_module
from geofx.plan import Plan
from geofx.program import Program
from geofx.report import Report
from geofx.verify import Fidelity


@dataclass(frozen=True, eq=False)
class OptimizedModel:
    """What `optimize`, `Analysis.apply` and `load` return.

    Attributes:
        program: the rewritten graph; ``program.graph_module`` is the fx.GraphModule.
        plan: what was chosen for every region and why.
        report: original against optimized, as figures.
        fidelity: measured on held-out data; None where there was none.
        rewrites: weight name -> the format as fitted and its factors.
        module: the user's own module, never changed, and sharing with the graph what is not rewritten;
            None after `load`.
        config: the Hugging Face configuration, if the model had one.
        files: further files that `save` keeps, such as the tokenizer's.
        rebuild: makes ``module`` anew where it is None; None where geofx does not know its class.
    """

    program: Program
    plan: Plan
    report: Report
    fidelity: Fidelity | None
    rewrites: Mapping[str, tuple[Factorization, Factors]]
    module: nn.Module | None = None
    config: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    rebuild: Callable[[], nn.Module] | None = None

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

        Raises:
            ConfigError: a weight's owner is not a linear layer, or the module is not known or cannot be made.
        """
        module = self.rebuild() if self.module is None and self.rebuild is not None else self.module
        if module is None:
            raise ConfigError(
                "the model's own class is not known here", fix="geofx.load(path, module=your_model)"
            )
        return factorize_module(module, self.rewrites, self.program.aliases)

    def to_onnx(self, path: str | Path) -> OnnxReport:
        """Export with standard operators, checked in ONNX Runtime before it is published."""
        return to_onnx(self.program, Path(path))

    def to_torchscript(self, path: str | Path) -> TorchScriptReport:
        """Trace `to_module` to TorchScript (legacy), checked in a process without geofx."""
        module, program = self.to_module(), self.program
        return to_torchscript(module, program.example, Path(path), dynamic_shapes=program.dynamic_shapes)

    def __reduce__(self) -> NoReturn:
        raise ConfigError("geofx never pickles", fix="use save() and geofx.load()")
