"""A region is a named set of sites that one factorization may rewrite together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from geofx.site import Site

RegionKind = Literal["single", "shared_input", "gated_mlp", "stack", "embedding", "tied_embedding"]
TABLES: frozenset[RegionKind] = frozenset({"embedding", "tied_embedding"})
"""Kinds whose weight is looked up."""
OWN: frozenset[RegionKind] = frozenset({"single", "embedding", "tied_embedding"})
"""Kinds that hold one site and are its own region: where it may stay dense."""


@dataclass(frozen=True)
class Region:
    """``sites`` that are rewritten by one choice. A region of one site is named by its weight.

    ``shared_input`` are linear maps of one tensor, ``stack`` the same map in several layers; ``gated_mlp``
    are maps into hidden units that act one by one, and last the map out of them; ``embedding`` is a table
    that is only looked up, ``tied_embedding`` one that is also the output's weight.
    """

    name: str
    kind: RegionKind
    sites: tuple[Site, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights, in site order."""
        return tuple(site.weight for site in self.sites)

    @property
    def site(self) -> Site:
        """The only site of a region that has one."""
        (site,) = self.sites
        return site

    @property
    def has_spectrum(self) -> bool:
        """Whether one spectrum has the loss of every rank: not where sites have inputs of their own."""
        return self.kind not in ("stack", "gated_mlp")

    @property
    def shape(self) -> tuple[int, int]:
        """(Σ out, in): the region as one matrix, its weights one below the other."""
        return sum(site.shape[0] for site in self.sites), self.sites[0].shape[1]

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of outputs of each site."""
        return tuple(site.shape[0] for site in self.sites)
