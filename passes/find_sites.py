"""Every constant weight that is multiplied: sites, and the reasons why other weights are none."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from geofx.annotations import SITE, Key
from geofx.linalg import FULL_DECOMPOSITION_LIMIT
from geofx.passes.find_heads import find_heads
from geofx.program import Program
from geofx.site import Site, Skip

aten = torch.ops.aten

_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.alias.default,
    aten.detach.default,
)
_PRODUCTS = {"linear", "matmul", "einsum", "t"}
_LEADING_TO_PRODUCTS = {"embedding", "embedding_bag", "transpose", "permute", "slice", "split", "chunk"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FindSites:
    """Leaves a `Site` on every linear and lookup node whose weight is understood in all its uses."""

    name: ClassVar[str] = "find_sites"
    reads: ClassVar[tuple[Key[Any], ...]] = ()
    writes: ClassVar[tuple[Key[Any], ...]] = (SITE,)

    def run(self, program: Program) -> bool:
        """Annotate; the graph itself stays as it is."""
        for site in find_sites(program)[0]:
            for node in program.graph.nodes:
                if node.name in site.nodes:
                    SITE.set(node, site)
        return False


def sites_of(program: Program) -> tuple[Site, ...]:
    """The sites that `FindSites` left on the graph, in graph order."""
    found = {
        node.meta[SITE.name].weight: node.meta[SITE.name]
        for node in program.graph.nodes
        if SITE.name in node.meta
    }
    return tuple(found.values())


def linear_nodes(program: Program) -> dict[str, Site]:
    """Name of each linear node that has a site -> the site."""
    return _nodes_with(program, aten.linear.default)


def lookup_nodes(program: Program) -> dict[str, Site]:
    """Name of each lookup in a table that is a site -> the site."""
    return _nodes_with(program, aten.embedding.default)


def _nodes_with(program: Program, target: Any) -> dict[str, Site]:
    found = (node for node in program.graph.nodes if SITE.name in node.meta and node.target is target)
    return {node.name: SITE.get(node) for node in found}


def find_sites(program: Program) -> tuple[list[Site], list[Skip]]:
    """Sites of all kinds in graph order, and every other weight of two or more dims with its reason."""
    reads: dict[str, list[fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            reads[str(node.target)].append(node)
    found = [_site_or_skip(program, name, nodes) for name, nodes in reads.items()]
    order = {node.name: place for place, node in enumerate(program.graph.nodes)}
    sites = sorted((item for item in found if isinstance(item, Site)), key=lambda site: order[site.nodes[0]])
    return sites, [item for item in found if isinstance(item, Skip)]


def _site_or_skip(program: Program, name: str, nodes: list[fx.Node]) -> Site | Skip | None:
    value = program.attribute(name)
    if not isinstance(value, Tensor) or value.dim() < 2 or not _is_multiplied(nodes, value):
        return None
    refusal = _refusal(value)
    if refusal is not None:
        return Skip(name, *refusal)
    users = [(user, False) for node in nodes for user in node.users]
    flipped = [user for user, _ in users if user.target is aten.t.default]
    uses = [(user, flip) for user, flip in users if user not in flipped]
    uses += [(user, True) for node in flipped for user in node.users]
    return _from_uses(program, name, value, uses)


def _from_uses(program: Program, name: str, value: Tensor, uses: list[tuple[fx.Node, bool]]) -> Site | Skip:
    linear = [(node, flip) for node, flip in uses if _is_weight_of_linear(node)]
    lookups = [node for node, flip in uses if not flip and node.target is aten.embedding.default]
    orientations = {flip for _, flip in linear} | ({False} if lookups else set())
    if len(linear) + len(lookups) != len(uses) or len(orientations) != 1:
        known = {str(aten.linear.default), str(aten.embedding.default)}
        odd = sorted({str(node.target) for node, _ in uses} - known)
        return Skip(name, "NON_LINEAR_USE", f"also used by {', '.join(odd) or 'both W and its transpose'}")
    transposed = orientations.pop()
    rows, columns = value.shape[::-1] if transposed else value.shape
    if columns > FULL_DECOMPOSITION_LIMIT:
        size = f"{8 * columns**2 / 1e9:.1f} GB"
        return Skip(name, "TOO_LARGE", f"the second moment of {columns} inputs would take {size}")
    site = Site(name, (rows, columns), transposed=transposed, dtype=str(value.dtype).removeprefix("torch."))
    used = {node for node, _ in uses}
    sources = [node.args[0] for node, _ in linear] or [node.args[1] for node in lookups]
    return replace(
        site,
        kind=("tied_embedding" if linear else "embedding") if lookups else "linear",
        input="+".join(sorted({_source(node) for node in sources})),
        nodes=tuple(node.name for node in program.graph.nodes if node in used),
        aliases=tuple(sorted(alias for alias, target in program.aliases.items() if target == name)),
        heads=find_heads((node for node, _ in linear), (rows, columns)),
        has_bias=any(len(node.args) > 2 and node.args[2] is not None for node, _ in linear),
    )


def _is_multiplied(nodes: list[fx.Node], value: Tensor) -> bool:
    """Whether any use is a product, or a lookup or view of numbers that may lead to one."""
    names = {
        str(getattr(user.target, "__name__", user.target)).split(".")[0]
        for node in nodes
        for user in node.users
    }
    words = _PRODUCTS | _LEADING_TO_PRODUCTS if value.is_floating_point() else _PRODUCTS
    return any(name in words or "mm" in name or "conv" in name for name in names)


def _refusal(value: Tensor) -> tuple[str, str] | None:
    if value.dim() > 2:
        return "UNSUPPORTED_OP", f"a weight of {value.dim()} dims is not one matrix"
    if value.dtype not in _DTYPES:
        quantized = not value.is_floating_point() and not value.is_complex()
        return "QUANTIZED_WEIGHT" if quantized else "UNSUPPORTED_DTYPE", str(value.dtype)
    if min(value.shape) < 2:
        return "TOO_SMALL", f"shape {tuple(value.shape)}"
    if not torch.isfinite(value).all():
        return "NONFINITE_WEIGHT", f"{int((~torch.isfinite(value)).sum())} values are not finite"
    return None


def _is_weight_of_linear(node: fx.Node) -> bool:
    weight = node.args[1] if node.target is aten.linear.default else None
    return weight is not None and weight is not node.args[0] and weight not in node.args[2:]


def _source(node: Any) -> str:
    """Name of the tensor behind reshapes that keep the last dim, so that equal inputs share moments."""
    while node.op == "call_function" and node.target in _RESHAPES and _keeps_last_dim(node):
        node = node.args[0]
    return str(node.name)


def _keeps_last_dim(node: fx.Node) -> bool:
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape[-1] == after.shape[-1]
