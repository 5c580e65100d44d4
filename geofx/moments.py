"""Second moments of what flows through each site: what the loss can see of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["two_sided", "forward", "data_free"]

UNITS: Mapping[Mode, str] = {
    "two_sided": "nats per token",
    "forward": "relative squared error of site outputs",
    "data_free": "relative squared error of weights",
}
"""What a predicted loss is measured in, by how the moments were taken."""


@dataclass(frozen=True, eq=False)
class Moments:
    """A = E[x xᵀ] and E[x] per distinct input tensor, G = Σ g gᵀ / terms per site output.

    x are the unmasked tokens at a site's input, g = ∂(summed loss)/∂y at its output. A is (in, in),
    G is (out, out), or its diagonal where out is beyond the dense solvers, as that of a head is; with them
    the loss grows by about tr(G ΔW A ΔWᵀ) per loss term. A table that is looked up has counts in the place
    of A; what is a head as well has both.

    Attributes:
        inputs: input key -> A.
        outputs: weight name -> G, or its diagonal as a vector; empty unless ``mode`` is ``"two_sided"``.
        input_of: weight name -> input key, of weights that multiply.
        tokens: input key -> number of tokens seen.
        lookups: name of a table -> how often each row was looked up (vocabulary,).
        lookup_batches: name of a table -> in how many batches each row was looked up (vocabulary,).
        lookup_outputs: name of a table -> G (dim, dim) at what was looked up, as ``outputs``.
        lookup_energies: name of a table -> Σ ‖g‖² over the lookups of each row (vocabulary,), likewise.
        directions: input key -> E[x̄ x̄ᵀ] with x̄ = x / ‖x‖; empty unless asked for.
        loss_terms: number of loss terms that the gradients were summed over.
        mode: ``forward`` has no G, ``data_free`` neither A nor G.
        unit: the unit of the loss that the gradients are of.
        dropped: reasons -> number of calibration rows left out.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    input_of: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    lookups: Mapping[str, Tensor] = field(default_factory=dict)
    lookup_batches: Mapping[str, Tensor] = field(default_factory=dict)
    lookup_outputs: Mapping[str, Tensor] = field(default_factory=dict)
    lookup_energies: Mapping[str, Tensor] = field(default_factory=dict)
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    loss_terms: int = 0
    mode: Mode = "data_free"
    unit: str = UNITS["data_free"]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def input_moment(self, weight: str) -> Tensor | None:
        """A at the input of ``weight``, or None where no token reached it."""
        key = self.input_of.get(weight, "")
        return self.inputs[key] if self.tokens.get(key, 0) > 0 else None

    def tokens_at(self, weight: str) -> int:
        """Number of tokens that ``weight`` was multiplied by, or looked up for where it is only a table."""
        if weight in self.input_of:
            return self.tokens.get(self.input_of[weight], 0)
        return int(self.lookups[weight].sum()) if weight in self.lookups else 0

    def output_moment(self, weight: str) -> Tensor | None:
        """G at the output of ``weight``, or None where none was taken."""
        return self.outputs.get(weight)


def pooled(first: Moments, second: Moments) -> Moments:
    """The moments of the data of both, taken of one model in one mode.

    Means count by tokens, what is per loss term by loss terms; counts and sums add up.
    """

    def by_tokens(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: _mean(part, other[key], first.tokens[key], second.tokens[key]) for key, part in one.items()
        }

    def by_terms(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: _mean(part, other[key], first.loss_terms, second.loss_terms) for key, part in one.items()
        }

    def added(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: part + other[key] for key, part in one.items()}

    reasons = first.dropped.keys() | second.dropped.keys()
    return replace(
        first,
        inputs=by_tokens(first.inputs, second.inputs),
        outputs=by_terms(first.outputs, second.outputs),
        tokens={key: count + second.tokens[key] for key, count in first.tokens.items()},
        lookups=added(first.lookups, second.lookups),
        lookup_batches=added(first.lookup_batches, second.lookup_batches),
        lookup_outputs=by_terms(first.lookup_outputs, second.lookup_outputs),
        lookup_energies=added(first.lookup_energies, second.lookup_energies),
        directions=by_tokens(first.directions, second.directions),
        loss_terms=first.loss_terms + second.loss_terms,
        dropped={key: first.dropped.get(key, 0) + second.dropped.get(key, 0) for key in sorted(reasons)},
    )


def _mean(one: Tensor, other: Tensor, count: int, others: int) -> Tensor:
    share = others / max(1, count + others)
    return torch.lerp(one, other, share)
