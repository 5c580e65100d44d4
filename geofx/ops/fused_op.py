"""An operation that stands for a chain of aten operations, and runs as one kernel where there is one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

logger = logging.getLogger(__name__)

LIBRARY = torch.library.Library("geofx", "DEF")  # type: ignore[no-untyped-call]
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedOp:
    """``geofx::name``: schema, fake, gradients and flops are those of its chain.

    A factorized matmul is two products of which the first, z = x Rᵀ, is small. As one kernel z never leaves
    the chip.

    Attributes:
        name: of the operation in ``torch.ops.geofx``.
        chain: the same in aten operations, which take the same arguments: what runs where no kernel does.
        kernel: where the launch is found, ``module:function``; imported on first use, as it needs Triton.
    """

    def __init__(self, schema: str, chain: Callable[..., Any], kernel: str) -> None:
        self.name, self.chain, self.kernel = schema.partition("(")[0], chain, kernel
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
        floats = [part for part in pytree.tree_leaves(args) if _is_floating(part)]
        if len({part.dtype for part in floats}) == 1 and floats[0].dtype in KERNEL_DTYPES and has_triton():
            return self.launch()(*args)
        return self.chain(*args)

    def _backward(self, context: Any, *gradients: Any) -> Any:
        """The vector-Jacobian product of the chain, run again."""
        leaves, spec = pytree.tree_flatten(context.arguments)
        saved = iter(context.saved_tensors)
        values = [next(saved) if leaf is _SAVED else leaf for leaf in leaves]
        needed = pytree.tree_leaves(context.needs_input_grad)
        wanted = [place for place, value in enumerate(values) if _is_floating(value) and needed[place]]
        with torch.enable_grad():
            for place in wanted:
                values[place] = values[place].detach().requires_grad_()
            output = self.chain(*pytree.tree_unflatten(values, spec))
        found = torch.autograd.grad(output, [values[place] for place in wanted], gradients)
        results: list[Any] = [None] * len(values)
        for place, gradient in zip(wanted, found, strict=True):
            results[place] = gradient
        arguments = zip(context.arguments, pytree.tree_unflatten(results, spec), strict=True)
        return tuple(found if _SAVED in pytree.tree_leaves(given) else None for given, found in arguments)

    def _flops(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        """Those of the chain; what a kernel computes twice does not count."""
        meta = pytree.tree_map_only(Tensor, lambda part: torch.empty_like(part, device="meta"), args)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            self.chain(*meta, **kwargs)
        return int(counter.get_total_flops())


_SAVED = object()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    leaves, spec = pytree.tree_flatten(inputs)
    ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
    ctx.arguments = pytree.tree_unflatten(
        [_SAVED if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
    )


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@cache
def has_triton() -> bool:
    """Whether kernels can be had; says so once where not."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning("Triton is not installed: geofx operations run as the aten operations they stand for")
    return found
