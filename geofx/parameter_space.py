"""All parameters of a model as one vector v, and which of its coordinates are whose.

Source: Geometry is All You Need (arXiv 2410.03040), Definition 1 and equations 4 to 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from geofx.annotations import annotations_of
from geofx.errors import ConfigError
from geofx.factorizations.contract import Factored, widened
from geofx.factorizations.dense import Dense
from geofx.program import Program
from geofx.trace import storage_identity

CHUNK = 2**22
"""A vector is read in pieces of at most so many numbers."""


@dataclass(frozen=True, eq=False)
class ParameterSpace:
    """v = Σ_i v_i in ℝⁿ: the floating-point tensors of a model, tied ones once; none is copied until asked.

    Attributes:
        shapes: the tensors in order; eq. 4's layers.
        read: gives a tensor by name, in any layout of its shape.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    @classmethod
    def of(cls, model: nn.Module | Program) -> ParameterSpace:
        """The parameters and buffers of a module, or those that a traced graph reads."""
        named = model.tensors() if isinstance(model, Program) else _distinct(model)
        tensors = {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}
        return cls({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)

    @cached_property
    def idx(self) -> dict[str, range]:
        """Name -> coordinates idx(i - 1) .. idx(i) of its layer, half-open (eq. 6, counted from 0)."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        ends = list(accumulate(sizes))
        return {
            name: range(end - size, end) for name, size, end in zip(self.shapes, sizes, ends, strict=True)
        }

    @property
    def dim(self) -> int:
        """n, the length of v."""
        return sum(len(layer) for layer in self.idx.values())

    def slice(self, name: str) -> Tensor:
        """The coordinates of one layer, (len(idx[name]),): v_i without its zeros.

        Raises:
            ConfigError: there is no such layer, or its tensor has another shape.
        """
        if name not in self.shapes:
            raise ConfigError(f"no parameter {name!r}", fix="see idx for the names; tied ones have one")
        tensor = self.read(name)
        if tuple(tensor.shape) != tuple(self.shapes[name]):
            raise ConfigError(
                f"{name!r} is {tuple(tensor.shape)}, not {tuple(self.shapes[name])}",
                fix="pass the model that the result was made from",
            )
        return tensor.reshape(-1)

    def chunks(self, size: int = CHUNK) -> Iterator[Tensor]:
        """v in order, in pieces of at most ``size`` numbers, one tensor in memory at a time."""
        for name in self.shapes:
            yield from torch.split(self.slice(name), size)

    def vector(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """v as one tensor (n,)."""
        whole, start = torch.empty(self.dim, dtype=dtype), 0
        for piece in self.chunks():
            whole[start : start + len(piece)] = piece
            start += len(piece)
        return whole

    def reconstructed(self, program: Program, rewrites: Mapping[str, Factored]) -> ParameterSpace:
        """v̂ = g⁻¹(ṽ) at the coordinates of v, read from the graph that was made of this model.

        A rewritten weight is multiplied out from its factors when it is read, site by site, in the layout in
        which the model stores it; all else is the graph's own tensor.
        """
        owners = {
            weight: (factored, site)
            for factored in rewrites.values()
            for site, weight in enumerate(factored.weights)
            if not isinstance(factored.factorization, Dense)
        }
        transposed = _stored_transposed(program)

        @torch.no_grad()
        def read(name: str) -> Tensor:
            weight = program.aliases.get(name, name)
            if weight not in owners:
                return _tensor(program, weight)
            factored, site = owners[weight]
            factors = {part: _tensor(program, stored) for part, stored in factored.attributes.items()}
            shape = self.shapes[name][::-1] if weight in transposed else self.shapes[name]
            dense = widened(factored.factorization, factors, site, shape)
            return dense.t() if weight in transposed else dense

        return ParameterSpace(self.shapes, read)

    @torch.no_grad()
    def applied_to(self, program: Program, names: Iterable[str]) -> Program:
        """A clone of ``program`` whose parameters of these names have the values that they have here."""
        clone = program.clone()
        for name in names:
            value = self.slice(name).reshape(self.shapes[name])
            clone.set_tensor(name, value.contiguous(), trainable=False)
        return clone


def _distinct(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    first: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        first.setdefault(storage_identity(tensor), (name, tensor))
    return first.values()


def _stored_transposed(program: Program) -> frozenset[str]:
    """Weights that the model stores as (in, out), also where the graph was saved and loaded."""
    notes = (annotations_of(node) for node in program.graph.nodes)
    return frozenset(note["site.weight"] for note in notes if note.get("site.transposed"))


def _tensor(program: Program, name: str) -> Tensor:
    try:
        return program.weight(name).detach()
    except KeyError as error:
        raise ConfigError(
            f"the graph holds no {name!r}", fix="pass the model that the result was made from"
        ) from error
