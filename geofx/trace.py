"""Capture: any nn.Module to a plain aten graph through torch.export, with dynamic batch and sequence."""

from __future__ import annotations

import inspect
import keyword
import linecache
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from geofx.errors import CaptureError
from geofx.program import Program, flat_tensors

logger = logging.getLogger(__name__)

_PREFIX = "inner."
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")


class _Call(nn.Module):
    """The model with its constant arguments bound; ``forward`` has just the traced inputs, by name."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = model

        by_position = isinstance(model, fx.GraphModule) and not _keywords(model)
        taken = forward_names(model)
        if by_position and (constants or taken[: len(names)] != names):
            raise CaptureError("a traced module takes its inputs by position", fix=f"pass {', '.join(taken)}")

        def forward(**inputs: Any) -> Any:
            return model(*inputs.values()) if by_position else model(**inputs, **constants)

        self.forward = with_arguments(forward, names)


def trace(
    model: nn.Module | ExportedProgram, example: Mapping[str, Any] | tuple[Any, ...] | Tensor
) -> Program:
    """The aten graph of ``model`` on inputs like ``example``; weights are shared, the model is not changed.

    Single-row and single-token examples are doubled, so that no size is baked in, and an
    ``attention_mask`` gets a padded row, so that it stays an input.

    Raises:
        CaptureError: the model cannot be traced; quotes the line where its control flow depends on data.
    """
    if isinstance(model, ExportedProgram):
        return _from_exported(model)
    require_capturable(model)
    inputs, constants = example_inputs(model, example)
    if model.training:
        logger.warning("the model is in training mode; it is traced in evaluation mode")
    return trace_call(_Call(model, tuple(inputs), constants), model, inputs)


def trace_call(call: nn.Module, model: nn.Module, inputs: Mapping[str, Tensor]) -> Program:
    """The graph of ``call``, whose ``inner`` is ``model`` and whose forward takes ``inputs`` by name.

    Raises:
        CaptureError: it cannot be traced.
    """
    with evaluating(model), torch.no_grad():
        exported = _export(call, inputs)
    return _finish(exported, model, tuple(inputs), inputs)


def with_arguments(function: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """``function`` of keywords with a signature of these ``names``, as `torch.export` needs it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


def example_inputs(model: nn.Module, example: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensor inputs by argument name, made safe to trace with, and the constant arguments."""
    names = forward_names(model)
    if isinstance(example, Tensor):
        example = (example,)
    if isinstance(example, (tuple, list)):
        if len(example) > len(names):
            raise CaptureError(f"{len(example)} example inputs", where=f"forward takes {', '.join(names)}")
        example = dict(zip(names, example, strict=False))
    given = _given(names, example)
    if not given:
        raise CaptureError(
            f"the example has none of the model's inputs: {', '.join(map(str, example))}",
            where=f"forward takes {', '.join(names)}",
            fix="pass inputs under the names of forward's arguments",
        )
    constants = constants_of(model, given)
    nested = next((name for name, value in constants.items() if flat_tensors(value)), None)
    if nested is not None:
        raise CaptureError(
            f"input {nested!r} is a nest of tensors", fix="pass tensors as arguments of their own"
        )
    tensors = {name: value.detach().clone() for name, value in given.items() if isinstance(value, Tensor)}
    rows = next((value.shape[0] for value in tensors.values() if value.dim()), 0)
    tensors = {name: _at_least_two(value, rows) for name, value in tensors.items()}
    return _with_padding(tensors, names), constants


def constants_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments among ``inputs`` that are no tensors, as a traced graph has inside; no cache."""
    names = forward_names(model)
    constants = {
        name: value for name, value in _given(names, inputs).items() if not isinstance(value, Tensor)
    }
    return constants | ({"use_cache": False} if "use_cache" in names else {})


def _given(names: Iterable[str], inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in names if inputs.get(name) is not None and name != "labels"}


def forward_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that ``model.forward`` takes, in order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(model.forward)
    return tuple(name for name, parameter in signature.parameters.items() if parameter.kind in kinds)


def _keywords(module: fx.GraphModule) -> bool:
    """Whether a traced module takes its inputs by keyword only."""
    info = getattr(module.graph._codegen, "pytree_info", None)
    return info is not None and info.in_spec.num_children == 2 and info.in_spec.child(1).num_leaves > 0


def _at_least_two(value: Tensor, rows: int) -> Tensor:
    """Two rows of a batch of ``rows``, and two tokens; what has no batch dim is left as it is."""
    if value.dim() == 0 or value.shape[0] != rows:
        return value
    dims = (0, 1) if value.dim() == 2 and not value.is_floating_point() else (0,)
    for dim in dims:
        if value.shape[dim] == 1:
            value = torch.cat([value, value], dim)
    return value[:2].clone()


def _with_padding(inputs: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    ids = inputs.get("input_ids")
    if "attention_mask" not in names or ids is None or ids.dim() != 2:
        return inputs
    mask = inputs.get("attention_mask", torch.ones_like(ids)).clone()
    if mask.dim() == 2 and bool(mask.all()):
        mask[-1, -1] = 0
    return {**inputs, "attention_mask": mask}


def in_type(example: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """``example`` with its floating-point tensors of the module's type."""
    dtype = next(parameter.dtype for parameter in module.parameters())
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in example.items()
    }


def require_capturable(model: Any) -> None:
    """Raises CaptureError where ``model`` is none, has no data, or is not on the CPU."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "a ScriptModule cannot be traced", fix="pass the nn.Module that it was scripted from"
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"{type(model).__name__} is not a model", fix="pass a torch.nn.Module or an ExportedProgram"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type not in ("cpu", "meta"):
            raise CaptureError(
                f"the model is on {tensor.device}", where=name, fix="move it to the CPU first: model.cpu()"
            )
        if tensor.is_meta:
            raise CaptureError(
                "the parameter has no data (meta device)", where=name, fix="load the weights first"
            )
        bad = next((part for part in name.split(".") if keyword.iskeyword(part)), None)
        if bad is not None:
            raise CaptureError(
                f"module name {bad!r} is a Python keyword", where=name, fix="rename the module"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, every module's own flag restored, also on failure."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training


def _export(call: nn.Module, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    dynamic = {name: dict.fromkeys(range(value.dim()), Dim.AUTO) for name, value in inputs.items()}
    try:
        return torch.export.export(call, (), dict(inputs), dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot trace the model: {_first_line(error)}",
            where=_user_line(error),
            fix="make control flow depend on shapes only, or use torch.where / torch.cond",
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _user_line(error: BaseException) -> str:
    """The innermost source line outside torch that the error came from, quoted."""
    skipped = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames: list[traceback.FrameSummary] = []
    cause: BaseException | None = error
    while cause is not None and not frames:
        stack = traceback.extract_tb(cause.__traceback__)
        frames = [frame for frame in stack if not frame.filename.startswith((*skipped, "<"))]
        cause = cause.__cause__ or cause.__context__
    if not frames:
        return ""
    last = frames[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return f"{last.filename}:{last.lineno}: {line}"


def _from_exported(exported: ExportedProgram) -> Program:
    names = input_names(exported)
    args, kwargs = exported.example_inputs or ((), {})
    values = (*args, *kwargs.values())
    if len(values) != len(names) or not all(isinstance(value, Tensor) for value in values):
        raise CaptureError(
            "an exported program must take plain tensors and carry its example inputs",
            where=f"inputs {', '.join(names)}",
            fix="export it with tensor arguments, or pass the module itself",
        )
    return _finish(exported, None, names, dict(zip(names, values, strict=True)))


def input_names(model: nn.Module | ExportedProgram) -> tuple[str, ...]:
    """Names of the inputs that batches are matched to, in order."""
    if isinstance(model, ExportedProgram):
        return tuple(str(name) for name in model.graph_signature.user_inputs)
    return forward_names(model)


def _finish(
    exported: ExportedProgram, model: nn.Module | None, names: tuple[str, ...], inputs: Mapping[str, Tensor]
) -> Program:
    lifted = exported.module(check_guards=False)
    graph = lifted.graph
    _inline_grad_mode(lifted)
    for node in list(graph.nodes):
        checks = node.op == "call_function" and getattr(node.target, "__name__", "").split(".")[0] in _CHECKS
        if checks or (node.op == "call_module" and node.target == "_guards_fn"):
            graph.erase_node(node)
    _require_evaluation(graph)
    attributes, aliases = _collect_attributes(lifted, model)
    module = fx.GraphModule(attributes, graph, class_name="Program")
    program = Program(module, names, dict(inputs), _dynamic_dims(graph, names), aliases)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    program.check()
    return program


def _require_evaluation(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is torch.ops.aten.dropout.default and node.args[2]:
            raise CaptureError(
                "dropout is on in the exported program", where=node.name, fix="export it after model.eval()"
            )


def _collect_attributes(
    lifted: fx.GraphModule, model: nn.Module | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Attributes by the model's own names, one per storage; get_attr nodes are retargeted.

    Parameters are shared with the model; buffers, which a graph may write to, are copied.
    """
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    attributes: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    for node in lifted.graph.nodes:
        if node.op != "get_attr":
            continue
        value = _resolve(lifted, node.target)
        name = str(node.target) if model is None else str(node.target).removeprefix(_PREFIX)
        if isinstance(value, Tensor):
            canonical = first.setdefault(storage_identity(value), name)
            if canonical != name:
                aliases[name] = canonical
            name = canonical
            value = value if isinstance(value, nn.Parameter) else value.clone()
        attributes.setdefault(name, value)
        node.target = name
    for name, value in model.named_parameters(remove_duplicate=False) if model is not None else ():
        found = first.get(storage_identity(value))
        if found is not None and found != name:
            aliases[name] = found
    return attributes, aliases


def storage_identity(value: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Equal for tensors that are one, however many names they have."""
    pointer = value.data_ptr() if value.numel() else id(value)
    return pointer, value.shape, value.stride()


def _resolve(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def _dynamic_dims(graph: fx.Graph, names: tuple[str, ...]) -> dict[str, dict[int, str]]:
    """Which dims of each input may vary, named ``batch``, ``sequence``, ``dim2``, ..."""
    label = {0: "batch", 1: "sequence"}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return {
        name: {
            dim: label.get(dim, f"dim{dim}")
            for dim, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number
        }
        for name, node in zip(names, placeholders, strict=True)
        if isinstance(node.meta.get("val"), Tensor)
    }


def _inline_grad_mode(module: fx.GraphModule) -> None:
    """Replace ``wrap_with_set_grad_enabled(flag, body, *inputs)`` by the body: gradients are not traced."""
    graph = module.graph
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled":
            continue
        _, body, *inputs = node.args
        inner = _resolve(module, body.target)
        values = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), inputs, strict=True))
        with graph.inserting_before(node):
            outputs = graph.graph_copy(inner.graph, values)
        for user in list(node.users):
            user.replace_all_uses_with(
                outputs[user.args[1]] if isinstance(outputs, (tuple, list)) else outputs
            )
            graph.erase_node(user)
        graph.erase_node(node)
