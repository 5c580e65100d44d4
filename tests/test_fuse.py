"""Chains into fused operations: found whatever format wrote them, and never where numbers differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factorization_cases import CASES
from tiny_models import build, example
from torch import Tensor, fx, nn

import geofx
from geofx.annotations import REWRITE
from geofx.factorizations import Factorization, GaugeFixed, LowRank, Monarch, TensorTrain, TokenMPS
from geofx.ops import BLOCK_DIAGONAL_LINEAR, GAUGE_FIXED_LINEAR, LOW_RANK_LINEAR, FusedOp
from geofx.passes.cleanup import Cleanup
from geofx.passes.contract import run_passes
from geofx.passes.fuse import Fuse
from geofx.piece import Piece
from geofx.piece_latency import repeated
from geofx.program import Program


def always(op: FusedOp, arguments: tuple[Any, ...]) -> bool:
    return True


def fused(program: Program, pays: Any = always) -> Program:
    clone = program.clone()
    run_passes(clone, [Fuse(pays), Cleanup()])
    return clone


def operations(program: Program) -> list[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name.removesuffix(".default") for name in names if name.startswith("geofx.")]


PIECES = {
    "low_rank": (LowRank(3), LOW_RANK_LINEAR),
    "low_rank of rank 1": (LowRank(1), LOW_RANK_LINEAR),
    "gauge_fixed first": (GaugeFixed(3), GAUGE_FIXED_LINEAR),
    "gauge_fixed within": (GaugeFixed(3, start=4), GAUGE_FIXED_LINEAR),
    "gauge_fixed last": (GaugeFixed(3, start=9), GAUGE_FIXED_LINEAR),
    "gauge_fixed pivoted": (GaugeFixed(3, "pivoted"), GAUGE_FIXED_LINEAR),
    "monarch": (Monarch(2, 2), BLOCK_DIAGONAL_LINEAR),
    "monarch of 4 blocks": (Monarch(4, 1), BLOCK_DIAGONAL_LINEAR),
}


TABLES = {
    "token_mps": (TokenMPS(16, 2), (30, 16)),
    "token_mps of rank 1": (TokenMPS(16, 1), (30, 16)),
    "token_mps of odd width": (TokenMPS(50, 3), (9, 50)),
    "tensor_train of 2": (TensorTrain((3, 4), (2, 3), (3,)), (12, 6)),
    "tensor_train of 3": (TensorTrain((3, 4, 5), (2, 3, 4), (3, 4)), (60, 24)),
    "tensor_train padded": (TensorTrain((3, 4, 5), (2, 3, 4), (3, 4), padding=2), (58, 24)),
}


@pytest.mark.parametrize("name", TABLES)
def test_lookups_in_factorized_tables_are_found(name: str) -> None:
    form, shape = TABLES[name]
    program = repeated(Piece(form, "embedding", ((shape, False),), "float32"), 5, 2)
    found = fused(program)
    assert operations(found) == [f"geofx.{form.name}_lookup"] * 2
    assert "aten.embedding.default" not in {str(node.target) for node in found.graph.nodes}
    x = torch.randint(shape[0], (1, 5))
    for one, other in zip(found(x0=x), program(x0=x), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", PIECES)
def test_every_format_with_an_operation_is_found(name: str) -> None:
    form, op = PIECES[name]
    program = repeated(Piece(form, "single", (((12, 8), False),), "float32"), 5, 2)
    found = fused(program)
    assert operations(found) == [f"geofx.{op.name}"] * 2
    assert not {"aten.linear.default", "aten.bmm.default"} & {str(node.target) for node in found.graph.nodes}
    for one, other in zip(found(**program.example), program(**program.example), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", [LowRank(5), GaugeFixed(5), GaugeFixed(5, "pivoted"), Monarch(4, 2)])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_rewritten_models_give_the_same_with_every_chain_fused(
    architecture: str, form: Factorization
) -> None:
    analysis = geofx.analyze(build(architecture), example(architecture))
    plan = analysis.plan(geofx.Budget(parameters=1.0))
    forms = {item.region: form for item in plan.choices if item.kind == "single"}
    result = analysis.apply(plan.edit(forms))
    found = fused(result.program)
    assert len(operations(found)) == len(forms) > 8
    given = example(architecture)
    for one, other in zip(_tensors(found(**given)), _tensors(result(**given)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    noted = {REWRITE.get(node).region for node in found.graph.nodes if REWRITE.name in node.meta}
    assert noted == set(forms)
    assert not operations(result.program), "a program is fused as a copy"


def test_maps_that_share_their_input_become_one() -> None:
    analysis = geofx.analyze(build("llama"), example("llama"))
    plan = analysis.plan(geofx.Budget(parameters=1.0))
    regions = [item.region for item in analysis.regions.values() if item.region.kind == "shared_input"][:2]
    result = analysis.apply(plan.edit({region.name: LowRank(20) for region in regions}, regions))
    sites = sum(len(region.sites) for region in regions)
    found = fused(result.program)
    assert operations(found) == ["geofx.low_rank_linear"] * 2
    assert sites >= 4
    given = example("llama")
    for one, other in zip(_tensors(found(**given)), _tensors(result(**given)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_changes_where_it_does_not_pay() -> None:
    program = repeated(Piece(LowRank(3), "single", (((12, 8), False),), "float32"), 5, 2)
    asked = []

    def never(op: FusedOp, arguments: tuple[Any, ...]) -> bool:
        asked.append((op.name, arguments[0].device.type, tuple(part.shape for part in arguments[:3])))
        return False

    assert not Fuse(never).run(program)
    assert asked == [("low_rank_linear", "meta", ((1, 5, 8), (12, 3), (3, 8)))] * 2


class Blocks(nn.Module):
    """Two batched products with a transposition between them that is not Monarch's."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.left = nn.Parameter(torch.randn(2, 4, 4)), nn.Parameter(torch.randn(2, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.bmm(x.reshape(-1, 2, 4).transpose(0, 1), self.right.transpose(1, 2))
        crossed = inner.reshape(2, -1, 4).permute(0, 1, 2).flatten(2)
        return torch.bmm(crossed, self.left.transpose(1, 2)).permute(1, 2, 0).reshape(*x.shape[:-1], 12)


class Shared(nn.Module):
    """z is asked for by itself too."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 3, bias=False), nn.Linear(3, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.down(x)
        return self.up(z), z


class Writing(nn.Module):
    """x is written to between the products."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 3, bias=False), nn.Linear(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        copied = x.clone()
        z = self.down(copied)
        copied.add_(1.0)
        return self.up(z) + copied.sum()


class WritingAView(Writing):
    """A view of x is written to."""

    def forward(self, x: Tensor) -> Tensor:
        copied = x.clone()
        z = self.down(copied)
        copied[:, 0].unsqueeze(1).add_(1.0)
        return self.up(z) + copied.sum()


class Promoting(Writing):
    """The bias is of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 12, bias=False)
        self.bfloat16()
        self.shift = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x.bfloat16())) + self.shift


@pytest.mark.parametrize("make", [Blocks, Shared, Writing, WritingAView, Promoting])
def test_what_only_looks_like_a_chain_stays(make: type[nn.Module]) -> None:
    program = geofx.trace(make(), {"x": torch.randn(2, 3, 8)})
    assert operations(fused(program)) == []


def test_chains_that_follow_each_other_or_overlap() -> None:
    sizes = ((8, 3, False), (3, 12, True), (12, 5, False), (5, 4, False), (4, 7, True))
    model = nn.Sequential(*(nn.Linear(*size[:2], bias=size[2]) for size in sizes))
    program = geofx.trace(model, {"input": torch.randn(2, 3, 8)})
    found = fused(program)
    assert operations(found) == ["geofx.low_rank_linear"] * 2
    assert "aten.linear.default" in {str(node.target) for node in found.graph.nodes}
    x = torch.randn(4, 3, 8)
    torch.testing.assert_close(found(x), program(x))


class Sharing(nn.Module):
    """Maps of one projection, with and without a bias, one viewed in another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.first = nn.Linear(8, 3, bias=False), nn.Linear(3, 12)
        self.second, self.third = nn.Linear(3, 6, bias=False), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.down(x)
        return self.first(z).view(x.shape[0], -1), self.second(z), self.third(z)


def test_members_of_a_group_keep_their_biases_and_views() -> None:
    program = geofx.trace(Sharing(), {"x": torch.randn(2, 3, 8)})
    found = fused(program)
    assert operations(found) == ["geofx.low_rank_linear"]
    x = torch.randn(2, 3, 8)
    for one, other in zip(found(x), program(x), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", CASES)
def test_no_format_is_fused_into_other_numbers(name: str) -> None:
    case = CASES[name]
    maps = tuple(((part.shape[0], part.shape[1]), False) for part in case.structured)
    program = repeated(Piece(case.small, case.kind, maps, "float32"), 4, 1)
    found = fused(program)
    for one, other in zip(found(**program.example), program(**program.example), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_lookup_that_is_scaled_ends_before_that() -> None:
    form = TensorTrain((3, 4), (2, 3), (3,))
    program = repeated(Piece(form, "embedding", (((12, 6), False),), "float32"), 5, 1)
    (column,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)
    with program.graph.inserting_before(column):
        scaled = program.graph.call_function(torch.ops.aten.mul.Tensor, (column.args[0], 4.0))
    column.replace_input_with(column.args[0], scaled)
    program.graph_module.recompile()
    found = fused(program)
    assert operations(found) == ["geofx.tensor_train_lookup"]
    x = torch.randint(12, (1, 5))
    torch.testing.assert_close(found(x0=x)[0], program(x0=x)[0])


def test_buffers_move_as_buffers() -> None:
    program = repeated(Piece(LowRank(3), "single", (((12, 8), False),), "float32"), 5, 2)
    moved = program.moved("meta")
    assert {tensor.device.type for _, tensor in moved.tensors()} == {"meta"}
    assert dict(moved.graph_module.named_buffers()).keys() == dict(program.tensors()).keys()


def test_a_graph_moved_elsewhere_makes_its_tensors_there() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.create_node("get_attr", "weight")
    places = graph.call_function(torch.ops.aten.arange.default, (4,), {"device": torch.device("cpu")})
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (weight, places)))
    root = nn.Module()
    root.weight = nn.Parameter(torch.zeros(4))
    program = Program(fx.GraphModule(root, graph), ("x",), {"x": torch.zeros(1)}, {}, {})
    assert x.users == {}
    assert program.moved("meta")(torch.zeros(1)).device.type == "meta"
    assert program(torch.zeros(1)).tolist() == [0, 1, 2, 3], "the program itself stays"


def _tensors(output: Any) -> list[Tensor]:
    return [part for part in torch.utils._pytree.tree_leaves(output) if isinstance(part, Tensor)]
