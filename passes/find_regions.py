"""Sites that can be rewritten together, found by graph pattern."""

from __future__ import annotations

from collections.abc import Iterable

from geofx.region import Region
from geofx.site import Site


def find_regions(sites: Iterable[Site]) -> tuple[Region, ...]:
    """One ``single`` region per linear site."""
    return tuple(Region(site.weight, "single", (site,)) for site in sites if site.kind == "linear")
