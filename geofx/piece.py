"""One region by itself, as a function of its inputs and factors: what is counted and what is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass

from geofx.factorizations import Factorization, Lookup, Narrowing
from geofx.region import TABLES, Region, RegionKind
from geofx.site import Site

SEED = 0


@dataclass(frozen=True)
class Piece:
    """One use of each site of a region whose weights are written as ``form``, whatever their names.

    Attributes:
        maps: shape (out, in) of each site, and whether it has a bias.
        dtype: such as ``"float32"``.
    """

    form: Factorization
    kind: RegionKind
    maps: tuple[tuple[tuple[int, int], bool], ...]
    dtype: str

    @classmethod
    def of(cls, form: Factorization, region: Region) -> Piece:
        """That of ``region``; equal for regions of equal shapes."""
        maps = tuple((site.shape, site.has_bias) for site in region.sites)
        return cls(form, region.kind, maps, region.sites[0].dtype)

    def with_form(self, form: Factorization) -> Piece:
        """The same region written as another form."""
        return replace(self, form=form)

    @property
    def region(self) -> Region:
        """A region of these shapes."""
        sites = (
            Site(f"probe{k}", shape, dtype=self.dtype, has_bias=has_bias)
            for k, (shape, has_bias) in enumerate(self.maps)
        )
        return Region("probe", self.kind, tuple(sites))

    def factors(self, device: str = "meta") -> dict[str, Tensor]:
        """A tensor for each factor, noise where the device has storage; indices are permutations."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(SEED)
        return {
            name: self._made(shape, name.partition("@")[0].startswith("index"), device, generator)
            for name, shape in self.form.factor_shapes(self.region).items()
        }

    def inputs(self, lead: Sequence[int], device: str = "meta") -> list[Tensor]:
        """What the sites read, (*lead, in) each or ids (*lead,); one tensor where they share it."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(SEED)
        found = []
        if self.kind in TABLES:
            found.append(torch.zeros(*lead, dtype=torch.int64, device=device))
        if self.kind != "embedding":
            alike = self.kind in ("shared_input", "tied_embedding")
            sites = range(1 if alike else len(self.maps))
            found += [self._made((*lead, self._width(site)), False, device, generator) for site in sites]
        return found

    def __call__(self, inputs: Sequence[Tensor], factors: Mapping[str, Tensor]) -> list[Tensor]:
        """What each site gives."""
        values = list(inputs)
        found = []
        if self.kind in TABLES:
            assert isinstance(self.form, Lookup)
            found.append(self.form.lookup(values.pop(0), factors))
        if self.kind != "embedding":
            sites = range(len(self.maps))
            found += [self.form.apply(values[min(site, len(values) - 1)], factors, site) for site in sites]
        return found

    def traced(self, lead: Sequence[int]) -> fx.GraphModule:
        """The graph of (*inputs, *factors) -> outputs; what sites compute alike is computed once."""
        inputs, factors = self.inputs(lead), self.factors()

        def body(*values: Tensor) -> list[Tensor]:
            named = dict(zip(factors, values[len(inputs) :], strict=True))
            return self(values[: len(inputs)], named)

        made = make_fx(body, pre_dispatch=True)(*inputs, *factors.values())
        merged = CSEPass()(made)
        module: fx.GraphModule = made if merged is None else merged.graph_module
        return module

    def _made(self, shape: Sequence[int], is_index: bool, device: str, generator: Any) -> Tensor:
        size = tuple(shape)
        if device == "meta":
            dtype = torch.int32 if is_index else getattr(torch, self.dtype)
            return torch.empty(size, dtype=dtype, device=device)
        if is_index:
            count = torch.Size(size).numel()
            return torch.randperm(count, generator=generator, device=device).to(torch.int32).reshape(size)
        noise = torch.randn(size, generator=generator, device=device) / max(1, size[-1]) ** 0.5
        made: Tensor = noise.to(getattr(torch, self.dtype))
        return made

    def _width(self, site: int) -> int:
        """Number of inputs that a site still gets."""
        if isinstance(self.form, Narrowing):
            kept = self.form.kept_inputs(site, len(self.maps))
            if kept is not None:
                return len(kept)
        return self.maps[site][0][1]
