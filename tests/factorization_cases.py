"""One row per format: adding a format means adding a row here, and every law below it is inherited."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from geofx import factorizations as f
from geofx.region import RegionKind


@dataclass(frozen=True)
class Case:
    """How to test one format.

    Attributes:
        small, large: two settings for 24 x 20 weights, large being the bigger.
        structured: (24, 20) float64 weights, one per site, that ``large`` writes exactly; the last of a
            ``gated_mlp`` is (20, 24).
        tolerance: relative, of a float32 round trip through `fit` and `to_dense`.
        kind: of the region; 24 is then the rows of each site.
        flops: of one token of ``large`` through all sites; two per number stored where not given.
        applies: False where an embedding format is only looked up, never multiplied by.
        exact: relative error allowed in float64 where ``structured`` is recovered by iteration.
        subspaces: how many ``large`` has, as the taxonomy counts them.
    """

    small: f.Factorization
    large: f.Factorization
    structured: tuple[Tensor, ...]
    tolerance: float
    kind: RegionKind = "single"
    flops: int | None = None
    exact: float = 1e-10
    applies: bool = True
    subspaces: int = 2


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rank(rank: int, sites: int = 1) -> tuple[Tensor, ...]:
    right = random(rank, 20, seed=rank)
    return tuple(random(24, rank, seed=1000 + site) @ right for site in range(sites))


CASES: dict[str, Case] = {
    "dense": Case(f.Dense(), f.Dense(), _rank(20), 0.0),
    "low_rank": Case(f.LowRank(3), f.LowRank(9), _rank(9), 1e-6),
    "gauge_fixed": Case(f.GaugeFixed(3), f.GaugeFixed(11), _rank(11), 5e-5),
}
"""Keyed by the format's name; a second row of a format adds a suffix after a dash."""

CASES["low_rank-input"] = Case(f.LowRank(3, "input"), f.LowRank(9, "input"), _rank(9), 1e-6)
CASES["low_rank-none"] = Case(f.LowRank(3, "none"), f.LowRank(9, "none"), _rank(9), 1e-6)
CASES["low_rank-input_diagonal"] = Case(
    f.LowRank(3, "input_diagonal", 0.5), f.LowRank(9, "input_diagonal", 0.5), _rank(9), 1e-6
)
CASES["gauge_fixed-pivoted"] = Case(f.GaugeFixed(3, "pivoted"), f.GaugeFixed(11, "pivoted"), _rank(11), 1e-6)
CASES["low_rank-shared_input"] = Case(
    f.LowRank(3), f.LowRank(9), _rank(9, 3), 1e-6, "shared_input", flops=2 * (9 * 20 + 72 * 9)
)
CASES["low_rank-embedding"] = Case(f.LowRank(3), f.LowRank(9), _rank(9), 1e-6, "embedding", flops=2 * 9 * 20)
CASES["low_rank-tied_embedding"] = Case(
    f.LowRank(3), f.LowRank(9), _rank(9), 1e-6, "tied_embedding", flops=2 * 9 * (20 + 24 + 20)
)
CASES["shared_basis"] = Case(
    f.SharedBasis(3), f.SharedBasis(9), _rank(9, 3), 1e-6, "stack", flops=3 * 2 * 9 * (20 + 24), subspaces=4
)
CASES["shared_weight"] = Case(
    f.SharedWeight(), f.SharedWeight(), (random(24, 20),) * 3, 1e-6, "stack", flops=3 * 2 * 480
)
CASES["activation_subspace"] = Case(
    f.ActivationSubspace(3), f.ActivationSubspace(20), _rank(20), 1e-6, subspaces=1
)
CASES["activation_subspace-mse"] = Case(
    f.ActivationSubspace(3, "mse"), f.ActivationSubspace(20, "mse"), _rank(20), 1e-6, subspaces=1
)
CASES["activation_subspace-go_mse"] = Case(
    f.ActivationSubspace(3, "go_mse"), f.ActivationSubspace(20, "go_mse"), _rank(20), 1e-6, subspaces=1
)
CASES["activation_subspace-nl_mse"] = Case(
    f.ActivationSubspace(3, "nl_mse"), f.ActivationSubspace(20, "nl_mse"), _rank(20), 1e-6, subspaces=1
)
CASES["activation_subspace-shared_input"] = Case(
    f.ActivationSubspace(3),
    f.ActivationSubspace(20),
    _rank(20, 3),
    1e-6,
    "shared_input",
    flops=2 * 20 * (20 + 72),
    subspaces=1,
)


def _kronecker(terms: int) -> tuple[Tensor]:
    pairs = ((random(6, 5, seed=term), random(4, 4, seed=100 + term)) for term in range(terms))
    return (torch.stack([torch.kron(*pair) for pair in pairs]).sum(0),)


def _blocks(rank: int, rows: int, columns: int) -> tuple[Tensor]:
    """Every block of every ``rows``-th output and a run of inputs, ``columns`` of them, has the rank."""
    weight = torch.zeros(24, 20, dtype=torch.float64)
    for row in range(rows):
        for place, run in enumerate(torch.arange(20).chunk(columns)):
            seed = 1 + row + 10 * place
            weight[row::rows, run] = random(24 // rows, rank, seed=seed) @ random(rank, len(run), seed=-seed)
    return (weight,)


CASES["kronecker"] = Case(
    f.Kronecker(2, (6, 4), (5, 4)),
    f.Kronecker(5, (6, 4), (5, 4)),
    _kronecker(5),
    1e-6,
    flops=2 * 100 * (4 + 6),
    subspaces=4,
)
CASES["monarch"] = Case(f.Monarch(1, 4), f.Monarch(2, 4), _blocks(2, 4, 4), 1e-6, subspaces=16)
CASES["block_tensor_train"] = Case(
    f.BlockTensorTrain(1, (6, 4), (5, 4)), f.BlockTensorTrain(2, (6, 4), (5, 4)), _blocks(2, 4, 5), 1e-6
)


def _tensor_train(rows: tuple[int, ...], columns: tuple[int, ...], ranks: tuple[int, ...]) -> Tensor:
    """The first 24 rows of what random cores multiply out to; of 27 the last three are zero."""
    ends = zip((1, *ranks), rows, columns, (*ranks, 1), strict=True)
    cores = {f"core{k}": random(*shape, seed=k) for k, shape in enumerate(ends, 1)}
    if rows[0] == 3:
        cores["core1"][0, 2, :, 4:] = cores["core2"][:4, 2] = 0.0
    return f.TensorTrain(rows, columns, ranks).to_dense(cores)[:24]


_FOLDS = (4, 3, 2), (5, 2, 2)
_LOOKUP = 2 * (5 * 8 + 5 * 8 * 2 * 3 + 10 * 3 * 2)
_PADDED = f.TensorTrain((3, 3, 3), (5, 2, 2), (3, 2), 3), f.TensorTrain((3, 3, 3), (5, 2, 2), (8, 3), 3)
CASES["tensor_train"] = Case(
    f.TensorTrain(*_FOLDS, (3, 2)),
    f.TensorTrain(*_FOLDS, (8, 3)),
    (_tensor_train(*_FOLDS, (8, 3)),),
    1e-5,
    flops=2 * (10 * 3 * 2 * 2 + 5 * (8 * 3) * (2 * 3) * 2 + 4 * (5 * 8) * 6),
    subspaces=3,
)
CASES["tensor_train-stack"] = Case(
    f.TensorTrain((24, 1), (1, 20), (3, 2)),
    f.TensorTrain((24, 1), (1, 20), (6, 5)),
    tuple(random(24, 6, seed=1) @ random(6, 5, seed=2 + site) @ random(5, 20, seed=9) for site in range(3)),
    1e-5,
    "stack",
    flops=3 * 2 * (20 * 5 + 5 * 6 + 6 * 24),
    subspaces=5,
)
CASES["tensor_train-embedding"] = Case(
    *_PADDED, (_tensor_train((3, 3, 3), (5, 2, 2), (8, 3)),), 1e-5, "embedding", flops=_LOOKUP, subspaces=3
)
CASES["tensor_train-tied_embedding"] = Case(
    *_PADDED,
    (_tensor_train((3, 3, 3), (5, 2, 2), (8, 3)),),
    1e-5,
    "tied_embedding",
    flops=_LOOKUP + 2 * (10 * 3 * 3 * 2 + 5 * (8 * 3) * (2 * 3) * 3 + 3 * (5 * 8) * 9),
    subspaces=3,
)

_BLOCKS = (10, 14)
_RANKS = 2 * 18 * 20
CASES["group_reduce"] = Case(
    f.GroupReduce(_BLOCKS, (4, 2)),
    f.GroupReduce(_BLOCKS, (9, 9)),
    _rank(9),
    1e-6,
    "embedding",
    flops=_RANKS,
    subspaces=4,
)
CASES["group_reduce-tied_embedding"] = Case(
    f.GroupReduce(_BLOCKS, (4, 2)),
    f.GroupReduce(_BLOCKS, (9, 9)),
    _rank(9),
    1e-6,
    "tied_embedding",
    flops=2 * _RANKS + 2 * 9 * 24,
    subspaces=4,
)
CASES["group_reduce-exchanges"] = Case(
    f.GroupReduce(_BLOCKS, (4, 2), 2),
    f.GroupReduce(_BLOCKS, (9, 9), 2),
    _rank(9),
    1e-6,
    "embedding",
    flops=_RANKS,
    subspaces=4,
)


def _states() -> Tensor:
    """Rows of 20 that, padded to 32, are products of cores with modes 4, 2, 4 and bonds 2."""
    cores = random(24, 4, 2, seed=1), random(24, 2, 2, 2, seed=2), random(24, 2, 4, seed=3)
    cores[0][:, 2:] = 0.0
    return torch.einsum("vap,vpbq,vqc->vabc", *cores).reshape(24, 32)[:, :20].clone()


for _weighting in ("two_sided", "none"):
    CASES[f"token_mps{'' if _weighting == 'two_sided' else '-none'}"] = Case(
        f.TokenMPS(20, 1, _weighting),
        f.TokenMPS(20, 2, _weighting),
        (_states(),),
        1e-6,
        "embedding",
        flops=2 * (4 * 2 * 4 + 8 * 2 * 4),
        applies=False,
        subspaces=3,
    )


def _tucker(ranks: tuple[int, ...]) -> Tensor:
    """Random bases of a random core over 24 x 20 folded to 6 x 4 x 5 x 4."""
    names = ("row1", "row2", "column1", "column2")
    shapes = zip(names, (6, 4, 5, 4), ranks, strict=True)
    factors = {name: random(size, rank, seed=size + rank) for name, size, rank in shapes}
    return f.Tucker((6, 4), (5, 4), ranks).to_dense({**factors, "core": random(*ranks, seed=3)})


CASES["tucker"] = Case(
    f.Tucker((6, 4), (5, 4), (3, 2, 2, 2)),
    f.Tucker((6, 4), (5, 4), (5, 3, 4, 3)),
    (_tucker((5, 3, 4, 3)),),
    1e-5,
    flops=2 * (5 * 4 * 3 + 5 * 4 * 3 + 12 * 15 + 6 * 5 * 3 + 6 * 3 * 4),
    subspaces=5,
)
CASES["tucker-stack"] = Case(
    f.Tucker((24,), (20,), (1, 3, 3)),
    f.Tucker((24,), (20,), (2, 6, 5)),
    tuple(
        random(24, 6, seed=1)
        @ (own[0] * random(6, 5, seed=2) + own[1] * random(6, 5, seed=3))
        @ random(5, 20, seed=4)
        for own in random(3, 2, seed=5)
    ),
    1e-5,
    "stack",
    flops=3 * 2 * (20 * 5 + 5 * 2 * 6 + 2 * 6 + 6 * 24),
    subspaces=4,
)


def _cp(rank: int) -> Tensor:
    """Random terms over 24 x 20 with the rows folded to 6 x 4."""
    shapes = {"row1": (6, rank), "row2": (4, rank), "column1": (20, rank)}
    factors = {name: random(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    return f.CP(rank, (6, 4), (20,)).to_dense(factors)


CASES["cp"] = Case(
    f.CP(2, (6, 4), (20,)),
    f.CP(5, (6, 4), (20,)),
    (_cp(5),),
    1e-5,
    flops=2 * 5 * (20 + 24),
    exact=1e-7,
    subspaces=3,
)


def _butterfly(levels: int, rank: int) -> tuple[Tensor]:
    half, rows, columns = 2 ** (levels - 1), 24 // 2**levels, 20 // 2**levels
    widths = (rows, *[rank] * (levels - 1), columns)
    shapes = [(half, 2 * above, 2 * below) for above, below in pairwise(widths)]
    factors = {f"factor{level}": random(*shape, seed=level) for level, shape in enumerate(shapes, 1)}
    return (f.Butterfly(levels, rank).to_dense(factors),)


def _with_rows(rank: int, rows: int) -> tuple[Tensor]:
    weight = _rank(rank)[0].clone()
    weight[3 : 3 + 4 * rows : 4] = 5.0 * random(rows, 20, seed=5)
    return (weight,)


CASES["butterfly"] = Case(f.Butterfly(2, 1), f.Butterfly(2, 4), _butterfly(2, 4), 1e-6, subspaces=8)
CASES["low_rank_plus_sparse"] = Case(
    f.LowRankPlusSparse(2, 1), f.LowRankPlusSparse(4, 5), _with_rows(4, 5), 1e-6, subspaces=3
)


def _head_blocks(heads: int, dim: int, whole: int) -> Tensor:
    """(heads · dim, whole): two blocks of ranks (2, 2, 4), orthogonal to each other in every mode."""
    first, second, third = (torch.linalg.qr(random(size, size))[0] for size in (heads, dim, whole))
    cores = [torch.linalg.qr(random(4, 4, seed=seed))[0].reshape(2, 2, 4) for seed in (1, 2)]
    parts = (
        scale * torch.einsum("abc,ha,db,nc->hdn", core, first[:, cut], second[:, cut], third[:, wide])
        for scale, core, cut, wide in zip(
            (2.0, 1.0), cores, (slice(2), slice(2, 4)), (slice(4), slice(4, 8)), strict=True
        )
    )
    return sum(parts, torch.zeros(())).flatten(0, 1)


CASES["block_term"] = Case(
    f.BlockTerm(4, 1, (2, 2, 4)),
    f.BlockTerm(4, 2, (2, 2, 4)),
    (_head_blocks(4, 6, 20),),
    1e-6,
    flops=2 * 2 * (20 * 4 + 4 * 4 + 2 * 2 * 6 + 4 * 2 * 6),
    subspaces=8,
)
CASES["block_term-inputs"] = Case(
    f.BlockTerm(-4, 1, (2, 2, 4)),
    f.BlockTerm(-4, 2, (2, 2, 4)),
    (_head_blocks(4, 5, 24).T.contiguous(),),
    1e-6,
    flops=2 * 2 * (24 * 4 + 4 * 4 + 2 * 2 * 5 + 4 * 2 * 5),
    subspaces=8,
)
CASES["hybrid"] = Case(
    f.Hybrid(f.TensorTrain((6, 4), (5, 4), (1,)), f.LowRank(2)),
    f.Hybrid(f.TensorTrain((6, 4), (5, 4), (2,)), f.LowRank(9)),
    _rank(9),
    1e-6,
    flops=2 * (2 * (80 + 120) + 9 * 44),
    subspaces=2 + 2,
)
CASES["hybrid-indexed"] = Case(
    f.Hybrid(f.LowRankPlusSparse(1, 1), f.Kronecker(1, (6, 4), (5, 4))),
    f.Hybrid(f.LowRankPlusSparse(2, 3), f.Kronecker(2, (6, 4), (5, 4))),
    _kronecker(2),
    1e-6,
    flops=2 * (2 * 41 + 3 * 20) + 2 * 40 * (4 + 6),
    subspaces=3 + 4,
)


def _mlp(units: int) -> tuple[Tensor, ...]:
    """Two maps into 24 units and one out of them; all but some units are nowhere read nor written."""
    used = torch.randperm(24, generator=torch.Generator().manual_seed(3))[:units]
    mask = torch.zeros(24, 1, dtype=torch.float64)
    mask[used] = 1.0
    return mask * random(24, 20, seed=1), mask * random(24, 20, seed=2), random(20, 24, seed=3) * mask.T


CASES["dropped_units"] = Case(
    f.DroppedUnits(7), f.DroppedUnits(15), _mlp(15), 1e-5, "gated_mlp", flops=2 * 3 * 15 * 20, subspaces=1
)
