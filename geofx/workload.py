"""Flops, bytes and launches of a piece of graph, measured by running it on tensors without storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from geofx.factorizations import Factorization, Narrowing
from geofx.region import Region, RegionKind
from geofx.site import Site

PROBE_TOKENS = 16
"""Tokens that a workload is measured at; per-token figures divide by it."""


@dataclass(frozen=True)
class Workload:
    """What one piece of graph does.

    Attributes:
        flops: per token; a multiply-add is 2.
        parameters: floating-point numbers stored.
        weight_bytes: bytes of all factors, indices included.
        activation_bytes: bytes written per token.
        launches: kernels per call.
    """

    flops: float
    parameters: int
    weight_bytes: int
    activation_bytes: float
    launches: int

    def times(self, rows: float) -> Workload:
        """The same weights used ``rows`` times per token."""
        return replace(self, flops=self.flops * rows, activation_bytes=self.activation_bytes * rows)


class _OutputCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls that write memory (views do not) and the bytes that they write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches, self.written = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.launches += 1
            self.written += result.numel() * result.element_size()
        return result


def measure(factorization: Factorization, region: Region) -> Workload:
    """Workload of all sites of ``region``, by FlopCounterMode on meta tensors at the region's shapes.

    What the sites of a ``shared_input`` region compute alike, such as a projection onto a shared basis, is
    counted once, as the lowered graph runs it.
    """
    maps = tuple((site.shape, site.has_bias) for site in region.sites)
    return _measure(factorization, maps, region.sites[0].dtype, region.kind)  # type: ignore[arg-type]


@lru_cache(maxsize=65536)
def _measure(
    factorization: Any, maps: tuple[tuple[tuple[int, int], bool], ...], dtype_name: str, kind: RegionKind
) -> Workload:
    sites = tuple(
        Site(f"probe{index}", shape, dtype=dtype_name, has_bias=has_bias)
        for index, (shape, has_bias) in enumerate(maps)
    )
    dtype = getattr(torch, dtype_name)
    factors = {
        name: torch.empty(size, dtype=torch.int32 if _is_index(name) else dtype, device="meta")
        for name, size in factorization.factor_shapes(Region("probe", kind, sites)).items()
    }
    run = _use(factorization, factors, tuple(shape for shape, _ in maps), dtype, kind)
    outputs, flops = _OutputCounter(), FlopCounterMode(display=False)
    with torch.no_grad(), outputs, flops:
        run()
    return Workload(
        flops=flops.get_total_flops() / PROBE_TOKENS,
        parameters=sum(part.numel() for part in factors.values() if part.is_floating_point()),
        weight_bytes=sum(part.numel() * part.element_size() for part in factors.values()),
        activation_bytes=outputs.written / PROBE_TOKENS,
        launches=outputs.launches,
    )


def _is_index(name: str) -> bool:
    return name.partition("@")[0].startswith("index")


def _use(
    factorization: Any,
    factors: Mapping[str, Tensor],
    shapes: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    kind: RegionKind,
) -> Callable[[], object]:
    """One use of each site by `PROBE_TOKENS` tokens."""
    inputs = [
        torch.empty(PROBE_TOKENS, _width(factorization, shapes, site), dtype=dtype, device="meta")
        for site in range(len(shapes))
    ]
    x = inputs[0]
    ids = torch.empty(PROBE_TOKENS, dtype=torch.int64, device="meta")
    names = list(factors)

    def apply(x: Tensor, *parts: Tensor) -> list[Tensor]:
        named = dict(zip(names, parts, strict=True))
        return [factorization.apply(x, named, site) for site in range(len(shapes))]

    if kind == "shared_input":
        traced = make_fx(apply)(x, *factors.values())
        merged = CSEPass()(traced)
        once = traced if merged is None else merged.graph_module
        return lambda: once(x, *factors.values())
    if kind == "embedding":
        return lambda: factorization.lookup(ids, factors)
    if kind == "tied_embedding":
        return lambda: (factorization.lookup(ids, factors), apply(x, *factors.values()))
    return lambda: [factorization.apply(x, factors, site) for site, x in enumerate(inputs)]


def _width(factorization: Any, shapes: Sequence[tuple[int, int]], site: int) -> int:
    """Number of inputs that a site still gets."""
    if isinstance(factorization, Narrowing):
        kept = factorization.kept_inputs(site, len(shapes))
        return shapes[site][1] if kept is None else len(kept)
    return shapes[site][1]
