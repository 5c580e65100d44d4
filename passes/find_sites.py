"""Every constant weight that is multiplied: sites, and the reasons why other weights are none."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from geofx.annotations import SITE, Key
from geofx.linalg import FULL_DECOMPOSITION_LIMIT
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
    """Leaves a `Site` on every linear node whose weight is understood in all its uses."""

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
    return {node.name: SITE.get(node) for node in program.graph.nodes if SITE.name in node.meta}


def find_sites(program: Program) -> tuple[list[Site], list[Skip]]:
    """Linear sites in graph order, and every other weight of two or more dims with its reason."""
    reads: dict[str, list[fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            reads[str(node.target)].append(node)
    found = [_site_or_skip(program, name, nodes) for name, nodes in reads.items()]
    sites = [item for item in found if isinstance(item, Site)]
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
    lookups = [node for node, _ in uses if node.target is aten.embedding.default]
    if lookups:
        reason = "TIED_EMBEDDING" if linear else "EMBEDDING"
        return Skip(name, reason, "a lookup table: no format for embeddings is chosen by this version")
    odd = sorted({str(node.target) for node, _ in uses} - {str(aten.linear.default)})
    orientations = {flip for _, flip in linear}
    if len(linear) != len(uses) or len(orientations) != 1:
        return Skip(name, "NON_LINEAR_USE", f"also used by {', '.join(odd) or 'both W and its transpose'}")
    side = max(value.shape)
    if side > FULL_DECOMPOSITION_LIMIT:
        return Skip(name, "TOO_LARGE", f"moments of a side of {side} would take {8 * side**2 / 1e9:.1f} GB")
    transposed = orientations.pop()
    rows, columns = value.shape[::-1] if transposed else value.shape
    site = Site(name, (rows, columns), transposed=transposed, dtype=str(value.dtype).removeprefix("torch."))
    inputs = sorted({_source(node.args[0]) for node, _ in linear})
    aliases = tuple(sorted(alias for alias, target in program.aliases.items() if target == name))
    names = tuple(node.name for node, _ in linear)
    return replace(site, input="+".join(inputs), nodes=names, aliases=aliases)


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
