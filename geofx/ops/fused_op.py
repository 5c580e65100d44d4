"""An operation that stands for a chain of aten operations, and runs as one kernel where there is one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

logger = logging.getLogger(__name__)

LIBRARY = torch.library.Library("geofx", "DEF")  # type: ignore[no-untyped-call]
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES_LIMIT = 4096
"""How many shapes an operation remembers to have checked."""


class FusedOp:
    """``geofx::name``: schema, fake, gradients and flops are those of its chain.

    A factorized matmul is two products of which the first, z = x Rᵀ, is small. As one kernel z never leaves
    the chip.

    Attributes:
        name: of the operation in ``torch.ops.geofx``.
        chain: the same in aten operations, which take the same arguments: what runs where no kernel does.
        kernel: where the launch is found, ``module:function``; imported on first use, as it needs Triton.
        failure: why the kernel is not used any more, once it did not compile or launch.
    """

    def __init__(self, schema: str, chain: Callable[..., Any], kernel: str) -> None:
        self.name, self.chain, self.kernel = schema.partition("(")[0], chain, kernel
        self.failure: str | None = None
        self._known: dict[tuple[Any, ...], None] = {}
        LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        LIBRARY.impl(self.name, chain, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        LIBRARY.impl(self.name, self._on_cuda, "CUDA")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"geofx::{self.name}", chain, lib=LIBRARY)
        torch.library.register_autograd(
            f"geofx::{self.name}", self._backward, setup_context=_save, lib=LIBRARY
        )
        register_flop_formula(getattr(torch.ops.geofx, self.name), get_raw=True)(self._flops)

    @property
    def overload(self) -> Any:
        """What a graph calls."""
        return getattr(torch.ops.geofx, self.name).default

    def __call__(self, *args: Any) -> Any:
        """Run it: the kernel on CUDA, the chain elsewhere."""
        return self.overload(*args)

    def launch(self) -> Callable[..., Any]:
        """The function that launches the kernel.

        Raises:
            ImportError: Triton is not installed.
        """
        module, _, name = self.kernel.partition(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]

    def _on_cuda(self, *args: Any) -> Any:
        """The kernel, after checks that the chain would make; the chain where there is none that works."""
        floats = [part for part in pytree.tree_leaves(args) if _is_floating(part)]
        alike = len({part.dtype for part in floats}) == 1 and floats[0].dtype in KERNEL_DTYPES
        if not alike or _is_cast(floats[0]) or self.failure is not None or not has_triton():
            return self.chain(*args)
        self._require(*args)
        try:
            return self.launch()(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver may say
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("geofx::%s runs as aten operations, its kernel fails: %s", self.name, self.failure)
            return self.chain(*args)

    def _require(self, *args: Any) -> None:
        """Check shapes by the chain on tensors without storage, once for each, and devices."""
        leaves = pytree.tree_leaves(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        devices = sorted({str(part.device) for part in tensors})
        if len(devices) > 1:
            raise RuntimeError(f"geofx::{self.name}: tensors are on {' and '.join(devices)}")
        key = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if key not in self._known:
            with torch.no_grad():
                self.chain(*_without_storage(args))
            if len(self._known) >= SHAPES_LIMIT:
                self._known.clear()
            self._known[key] = None

    def _backward(self, context: Any, *gradients: Any) -> Any:
        """The vector-Jacobian product of the chain, run again under the autocast of the first run."""
        leaves, spec = pytree.tree_flatten(context.arguments)
        saved = iter(context.saved_tensors)
        values = [next(saved) if leaf is _SAVED else leaf for leaf in leaves]
        needed = pytree.tree_leaves(context.needs_input_grad)
        wanted = [place for place, value in enumerate(values) if _is_floating(value) and needed[place]]
        again = torch.is_grad_enabled()
        with torch.enable_grad(), context.autocast():
            for place in wanted:
                value = values[place]
                values[place] = value.view_as(value) if again else value.detach().requires_grad_()
            output = self.chain(*pytree.tree_unflatten(values, spec))
        found = torch.autograd.grad(
            output, [values[place] for place in wanted], gradients, create_graph=again
        )
        results: list[Any] = [None] * len(values)
        for place, gradient in zip(wanted, found, strict=True):
            results[place] = gradient
        arguments = zip(context.arguments, pytree.tree_unflatten(results, spec), strict=True)
        return tuple(found if _SAVED in pytree.tree_leaves(given) else None for given, found in arguments)

    def _flops(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        """Those of the chain; what a kernel computes twice does not count."""
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            self.chain(*_without_storage(args), **kwargs)
        return int(counter.get_total_flops())


_SAVED = object()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    leaves, spec = pytree.tree_flatten(inputs)
    ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
    ctx.arguments = pytree.tree_unflatten(
        [_SAVED if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
    )
    device = next(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))
    ctx.autocast = nullcontext
    if torch.amp.is_autocast_available(device):
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.autocast = partial(torch.autocast, device, dtype=dtype, enabled=enabled)


def _without_storage(args: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda part: torch.empty_like(part, device="meta"), args)


def _is_cast(part: Tensor) -> bool:
    """Whether autocast would have the chain compute in another dtype."""
    device = part.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False
    return part.dtype != torch.get_autocast_dtype(device)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@cache
def has_triton() -> bool:
    """Whether kernels can be had; says so once where not."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning("Triton is not installed: geofx operations run as the aten operations they stand for")
    return found
