"""A region is a named set of sites that one factorization may rewrite together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from geofx.site import Site

RegionKind = Literal["single", "shared_input", "gated_mlp", "value_output", "stack", "tied_embedding"]


@dataclass(frozen=True)
class Region:
    """``sites`` that are rewritten by one choice. A ``single`` region is named by its weight."""

    name: str
    kind: RegionKind
    sites: tuple[Site, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights, in site order."""
        return tuple(site.weight for site in self.sites)

    @property
    def site(self) -> Site:
        """The only site of a ``single`` region."""
        (site,) = self.sites
        return site
