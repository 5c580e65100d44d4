"""A site is one constant weight and all the matmuls that multiply by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SiteKind = Literal["linear", "embedding", "tied_embedding"]


@dataclass(frozen=True)
class Site:
    """y = W x (kind ``linear``), y = W[i] (``embedding``), or both uses of one W (``tied_embedding``).

    W is (out, in) = (vocabulary, dim) for a table.

    Attributes:
        weight: name of the parameter; tied parameters have one site, named by the first.
        shape: (out, in) of the canonical orientation, whatever the stored one.
        transposed: the parameter is stored as (in, out), as GPT-2's Conv1D does.
        input: key of the distinct input tensor(s); sites with equal keys share their moments.
        nodes: names of the graph nodes that multiply by the weight, for annotation only.
        aliases: further names of the same parameter.
        dtype: such as ``"float32"``.
        heads: attention heads that the outputs (positive) or inputs (negative) are cut into; 0 where none.
        has_bias: something is added to what comes out.
    """

    weight: str
    shape: tuple[int, int]
    kind: SiteKind = "linear"
    transposed: bool = False
    input: str = ""
    nodes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    dtype: str = "float32"
    heads: int = 0
    has_bias: bool = False

    @property
    def numel(self) -> int:
        """Number of entries of the weight."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Skip:
    """A weight that is not a site, or an option that was not proposed, with the reason."""

    weight: str
    reason: str
    detail: str = ""
