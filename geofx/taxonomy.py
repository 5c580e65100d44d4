"""The table of Section 4: of every format and module how many subspaces, which, and what happens among them.

Source: Geometry is All You Need (arXiv 2410.03040), Sections 2.5 and 4.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from geofx.factorizations import FACTORIZATIONS, Dense, Factorization
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.region import OWN, Region, RegionKind
from geofx.region_analysis import Metric, RegionAnalysis
from geofx.site import Site
from geofx.workload import measure

SHAPE = (768, 768)
HEADS = 12
TABLE = 8
"""A table that only embeddings' formats are shown on has so many times the rows."""

KEPT = 0.5
"""The example of a format is its candidate nearest to this share of the dense numbers."""

SECTION = "Xu, Sharmin and Mandic 2024, Sec. 2.5"
_NAME = r"(?:Van |Ben |De )?[A-Z][\w'’-]+"
CITATION = re.compile(rf"{_NAME}(?: (?:et al\.|and {_NAME}))?,? \(?(?:19|20)\d\d(?:, (?:19|20)\d\d)*\)?")


@dataclass(frozen=True)
class TaxonomyRow:
    """One form of the table.

    Attributes:
        name: of the format, or of the module.
        form: at the example's shape; of no subspaces where the format has none there, as for sides 13 and 17.
        regions: kinds of region that the format rewrites; none for a module.
        numbers: stored by the example; None for a module without parameters.
        setting: of the example, such as ``LowRank(rank=192)``.
        papers: authors and years, as the format's documentation cites them.
    """

    name: str
    form: GeometricForm
    regions: tuple[RegionKind, ...]
    numbers: int | None
    setting: str
    papers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON types, with the counts and the words."""
        form = self.form
        words = {"subspaces": form.count, "which": form.which, "transformations": form.operations}
        return {**asdict(self), **words, "form": asdict(form)}


def taxonomy(
    shape: tuple[int, int] = SHAPE, formats: Iterable[type[Factorization]] = FACTORIZATIONS
) -> tuple[TaxonomyRow, ...]:
    """The modules of Section 2.5, then every format at a region of ``shape`` (out, in)."""
    return (*modules(*shape), *(_row(member, shape) for member in formats))


def modules(rows: int, columns: int) -> Iterator[TaxonomyRow]:
    """A linear layer projects, a concatenation is a direct sum, attention projects twice: through K and V."""
    spaces = Subspace("input", columns, columns), Subspace("output", rows, rows)
    linear = GeometricForm(spaces, (Transformation("project", ("input",), "output"),))
    parts = tuple(Subspace(f"P{part}", columns // 2, columns) for part in (1, 2))
    joined = GeometricForm(parts, (Transformation("direct_sum", ("P1", "P2"), "P3"),))
    queries, keys, values = (Subspace(name, columns, columns) for name in ("Q", "K", "V"))
    steps = (
        Transformation("project", ("Q",), "K"),
        Transformation("scale", ("K",), "K"),
        Transformation("project", ("K",), "V"),
    )
    attention = GeometricForm((queries, keys, values), steps)
    for name, form, numbers in (
        ("linear", linear, rows * columns),
        ("concatenation", joined, None),
        ("attention", attention, None),
    ):
        yield TaxonomyRow(name, form, (), numbers, "", (SECTION,))


def citations(member: type) -> tuple[str, ...]:
    """``("Eckart and Young 1936", ...)``: what the documentation of a format, or of its file, cites."""
    text = " ".join(f"{inspect.getdoc(member)} {inspect.getdoc(inspect.getmodule(member))}".split())
    found = (re.sub(r"[,()]", "", match) for match in CITATION.findall(text))
    return tuple(dict.fromkeys(found))


def _row(member: type[Factorization], shape: tuple[int, int]) -> TaxonomyRow:
    kinds: tuple[RegionKind, ...] = tuple(kind for kind in get_args(RegionKind) if kind in member.regions)
    for kind in kinds:
        rows = shape[0] * (TABLE if kind in ("embedding", "tied_embedding") else 1)
        analysis = _example(kind, (rows, shape[1]))
        region = analysis.region
        dense = measure(Dense(), region).parameters
        found = [(form, measure(form, region).parameters) for form in member.candidates(region, analysis)]
        if found:
            form, numbers = min(found, key=lambda pair: abs(pair[1] - KEPT * dense))
            return TaxonomyRow(
                member.name, form.geometry(region), kinds, numbers, str(form), citations(member)
            )
    return TaxonomyRow(member.name, GeometricForm((), ()), kinds, None, "", citations(member))


def _example(kind: RegionKind, shape: tuple[int, int]) -> RegionAnalysis:
    """A region of this kind with random weights, on which formats can propose their settings."""
    random = torch.Generator().manual_seed(0)
    heads = HEADS if shape[0] % HEADS == 0 else 0
    names = ["weight"] if kind in OWN else ["first.weight", "second.weight"]
    site_kind = kind if kind in ("embedding", "tied_embedding") else "linear"
    shapes = dict.fromkeys(names, shape)
    if kind == "gated_mlp":
        shapes[names[-1]] = shape[::-1]
    sites = tuple(Site(name, sides, kind=site_kind, heads=heads) for name, sides in shapes.items())
    weights = {name: torch.randn(sides, generator=random) for name, sides in shapes.items()}
    metrics = {
        name: Metric(torch.eye(columns, dtype=torch.float64), torch.ones(rows, dtype=torch.float64))
        for name, (rows, columns) in shapes.items()
    }
    return RegionAnalysis(Region("example", kind, sites), weights, metrics)
