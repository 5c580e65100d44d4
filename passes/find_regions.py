"""Sites that can be rewritten together, found by graph pattern."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch

from geofx.program import Program
from geofx.region import Region, RegionKind
from geofx.site import Site


def find_regions(program: Program, sites: Iterable[Site]) -> tuple[Region, ...]:
    """Every site alone, linear maps of one tensor together, and one map across layers.

    ``shared_input``: linear sites that each run once, on the same tensor. ``gated_mlp``: a linear site and
    those whose outputs, one by one, make its inputs. ``stack``: linear sites with one role in several
    layers; of more than two the first and second, the third and fourth and so on, and all of them.
    """
    every = list(sites)
    own = [Region(site.weight, _own_kind(site), (site,)) for site in every]
    once = [site for site in every if site.kind == "linear" and len(site.nodes) == 1]
    joint = defaultdict(list)
    for region in (*_shared_inputs(once), *_hidden_units(program, once)):
        joint[region.weights[-1]].append(region)
    near = [found for region in own for found in (region, *joint[region.name])]
    return tuple(_named_apart((*near, *_stacks(program, once))))


def _named_apart(regions: Iterable[Region]) -> Iterator[Region]:
    """The regions; one of the same weights as another, of another kind, with its kind in the name."""
    names = set[str]()
    for region in regions:
        taken = region.name in names
        names.add(region.name)
        yield replace(region, name=f"{region.name} ({region.kind})") if taken else region


def _own_kind(site: Site) -> RegionKind:
    return "single" if site.kind == "linear" else site.kind


def _shared_inputs(sites: Iterable[Site]) -> Iterator[Region]:
    groups: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in sites:
        groups[site.input, site.dtype].append(site)
    yield from (_together("shared_input", members) for members in groups.values() if len(members) > 1)


def _hidden_units(program: Program, sites: Sequence[Site]) -> Iterator[Region]:
    """Sites of which each is read by nothing but operations on single numbers that lead to one other site."""
    nodes = {node.name: node for node in program.graph.nodes}
    owner = {site.nodes[0]: site for site in sites}
    for site in sites:
        end = nodes[site.nodes[0]]
        between, before = _cone(end.args[0], owner)
        closed = all(set(node.users) <= {*between, end} for node in (*between, *before))
        members = [found for name, found in owner.items() if nodes[name] in before]
        closed = closed and len(members) == len(before)
        alike = {(member.shape[0], member.dtype) for member in members} == {(site.shape[1], site.dtype)}
        if closed and alike:
            yield _together("gated_mlp", (*members, site))


def _cone(end: Any, owner: Mapping[str, Site]) -> tuple[set[Any], set[Any]]:
    """Operations on single numbers that lead to ``end``, and what they read: the sites of an MLP."""
    between, before, todo = set[Any](), set[Any](), [end]
    while todo:
        node = todo.pop()
        if node.name not in owner and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            between.add(node)
            todo += [item for item in node.all_input_nodes if item not in between]
        else:
            before.add(node)
    return between, before


def _stacks(program: Program, sites: Sequence[Site]) -> Iterator[Region]:
    groups: dict[tuple[Hashable, ...], list[Site]] = defaultdict(list)
    for site, role in zip(sites, _roles(program, sites), strict=True):
        groups[role].append(site)
    for members in groups.values():
        pairs = [members[start : start + 2] for start in range(0, len(members) - 1, 2)]
        yield from (_together("stack", pair) for pair in pairs if len(members) > 2)
        if len(members) > 1:
            yield _together("stack", members)


def _alike(lists: Sequence[Sequence[str]]) -> int:
    """How many first entries all lists have in common."""
    return sum(1 for _ in takewhile(lambda entries: len(set(entries)) == 1, zip(*lists, strict=False)))


def _roles(program: Program, sites: Sequence[Site]) -> Iterator[tuple[Hashable, ...]]:
    """What the same map of another layer has alike, the first and the last layer not excepted.

    The shape, its place among the maps of its input (q is the first of three), what makes the input and
    what takes the output; no names.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    families: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        families[site.input].append(site.weight)
    for site in sites:
        node, family = nodes[site.nodes[0]], families[site.input]
        before, after = _target(node.args[0]), tuple(sorted(_target(user) for user in node.users))
        yield site.shape, site.dtype, len(family), family.index(site.weight), before, after


def _target(node: Any) -> str:
    return str(node.target) if node.op == "call_function" else str(node.op)


def _together(kind: RegionKind, sites: Sequence[Site]) -> Region:
    return Region(joint_name([site.weight for site in sites]), kind, tuple(sites))


def joint_name(names: Sequence[str]) -> str:
    """One name for several: ``layers.0.{q_proj,k_proj}.weight``, ``layers.{0..29}.up.weight``."""
    split = [name.split(".") for name in names]
    head = _alike(split)
    tail = _alike([parts[head:][::-1] for parts in split])
    middles = [".".join(parts[head : len(parts) - tail]) for parts in split]
    numbers = [int(middle) for middle in middles if middle.isdecimal()]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[0] + len(middles))):
        middles = [f"{numbers[0]}..{numbers[-1]}"]
    return ".".join((*split[0][:head], f"{{{','.join(middles)}}}", *split[0][len(split[0]) - tail :]))
