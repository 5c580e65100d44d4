"""What the formats made of small blocks share: batched weighted truncation and products of block matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from geofx.errors import NumericsError, PlanError
from geofx.factorizations.contract import Factors, stored
from geofx.factorizations.refine import Dense, Operator, Preconditioner, refine
from geofx.linalg import FULL_DECOMPOSITION_LIMIT, leading_axes, require_finite, working_dtype
from geofx.region import Region
from geofx.region_analysis import RegionAnalysis

Fold = tuple[int, int]


def require_fold(rows: Fold, columns: Fold, region: Region) -> None:
    """Raises PlanError unless the folds multiply to the region's shape."""
    if min(*rows, *columns) < 1 or (rows[0] * rows[1], columns[0] * columns[1]) != region.shape:
        raise PlanError(
            f"the folds {rows} and {columns} do not multiply to {region.shape}",
            where=region.name,
            fix="mend the folds",
        )


def to_blocks(weight: Tensor, rows: Fold, columns: Fold) -> Tensor:
    """(m2, n1, m1, n2): block (β, γ) has the outputs α m2 + β and the inputs γ n2 + δ, for all α and δ."""
    return weight.reshape(*rows, *columns).permute(1, 2, 0, 3)


def truncate_blocks(
    blocks: Tensor, rank: int, outputs: Tensor | None = None, inputs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """argmin over L, R of rank r of tr(G (B - L R) A (B - L R)ᵀ) for each block B of a batch at once.

    By an eigenproblem on the smaller side; the larger needs no root, as in `region_analysis.truncate`.

    Args:
        blocks: B, (..., p, q).
        rank: r <= min(p, q).
        outputs: G, (..., p, p) of a batch that broadcasts, or None for the identity.
        inputs: A, (..., q, q), likewise.

    Returns:
        L (..., p, r) and R (..., r, q) in float64, each column of L as long as its row of R.
    """
    if blocks.shape[-2] < blocks.shape[-1]:
        left, right = truncate_blocks(blocks.mT, rank, inputs, outputs)
        return right.mT, left.mT
    root = _root(inputs)
    lifted = blocks.double() if root is None else blocks.double() @ root
    gram = lifted.mT @ (lifted if outputs is None else outputs.double() @ lifted)
    axes = leading_axes(gram, rank, "a block's Gram matrix")
    left = lifted @ axes
    right = axes.mT if root is None else torch.linalg.solve_triangular(root.mT, axes, upper=True).mT
    balance = (right.norm(dim=-1) / left.norm(dim=-2).clamp_min(1e-300)).clamp(1e-150, 1e150).sqrt()
    return left * balance[..., None, :], right / balance[..., :, None]


def _root(moment: Tensor | None) -> Tensor | None:
    """Cholesky factors of a batch; the identity's, None, where one is not positive definite."""
    if moment is None:
        return None
    root, info = torch.linalg.cholesky_ex(moment.double())
    return None if bool(info.any()) else root


def whole(moment: Tensor | None, size: int) -> Tensor:
    """A moment as a matrix (size, size) of float64, where it was given by its diagonal or as the identity.

    Raises:
        NumericsError: the matrix would be beyond the dense solvers, as that of a vocabulary's outputs.
    """
    if size > FULL_DECOMPOSITION_LIMIT:
        raise NumericsError(
            f"a metric of {size} x {size} is beyond the limit of {FULL_DECOMPOSITION_LIMIT}",
            fix="take low_rank, or a format over folds, for this weight",
        )
    if moment is None:
        return torch.eye(size, dtype=torch.float64)
    return (moment.diag() if moment.dim() == 1 else moment).double()


def diagonal_blocks(matrix: Tensor, fold: Fold, along: int) -> Tensor:
    """Diagonal blocks of a matrix whose index is folded, one for each value of part ``along`` (0 or 1)."""
    return matrix.reshape(*fold, *fold).diagonal(0, along, along + 2).movedim(-1, 0)


def inverses(batch: Tensor) -> Tensor:
    """Inverses of positive semidefinite matrices (..., n, n), finite by a ridge of 1e-6 of their size."""
    wide = ((batch + batch.mT) / 2).double()
    level = wide.diagonal(0, -2, -1).mean(-1)
    ridge = 1e-6 * torch.maximum(level, level.mean()).clamp_min(1e-30)[..., None, None]
    eye = torch.eye(batch.shape[-1], dtype=torch.float64)
    root, info = torch.linalg.cholesky_ex(wide + ridge * eye)
    return torch.where(info[..., None, None] == 0, torch.cholesky_inverse(root), 1e-6 / ridge * eye).to(batch)


def refine_best(
    dense: Dense,
    starts: Sequence[Factors],
    analysis: RegionAnalysis,
    inverse: Preconditioner,
    **counts: int,
) -> dict[str, Tensor]:
    """The best of ``starts`` in the loss-weighted metric, refined in it; in the weight's dtype.

    Raises:
        NumericsError: a factor is not finite in that dtype.
    """
    weight, metric = analysis.weight, analysis.metric
    dtype = working_dtype(weight)
    target = weight.to(dtype)

    def loss(factors: Factors) -> float:
        change = target - dense(factors)
        return float((change * metric.gradient(change)).sum())

    typed = [{name: part.to(dtype) for name, part in start.items()} for start in starts]
    refined = refine(dense, min(typed, key=loss), target, metric.gradient, inverse=inverse, **counts)
    return stored(refined, weight)


def fit_blocks(rank: int, rows: Fold, columns: Fold, analysis: RegionAnalysis) -> dict[str, Tensor]:
    """``left`` (m2, m1, n1 r) and ``right`` (n1, m2 r, n2) whose `compose` is nearest to the weight.

    Starts: the truncation of every block, which is optimal without a metric, and the same with each block
    weighted by the diagonal blocks of G and A at its outputs and inputs.
    """
    blocks = to_blocks(require_finite(analysis.weight, analysis.region.name), rows, columns)
    metric, (out, width) = analysis.metric, analysis.region.shape
    outputs, inputs = whole(metric.output, out), whole(metric.input, width)
    weighting = diagonal_blocks(outputs, rows, 1)[:, None], diagonal_blocks(inputs, columns, 0)
    starts = [
        {"left": left.transpose(1, 2).flatten(2), "right": right.transpose(0, 1).flatten(1, 2)}
        for left, right in (truncate_blocks(blocks, rank), truncate_blocks(blocks, rank, *weighting))
    ]
    dtype = working_dtype(analysis.weight)
    inverse = _block_inverse(outputs.to(dtype), inputs.to(dtype), rows, columns)
    return refine_best(lambda factors: compose(factors["left"], factors["right"]), starts, analysis, inverse)


def _block_inverse(outputs: Tensor, inputs: Tensor, rows: Fold, columns: Fold) -> Preconditioner:
    """Exact where G (for ``right``, A) joins no two blocks: inverses of its blocks and of the bond's Gram."""
    across = inverses(diagonal_blocks(outputs, rows, 1)), inverses(diagonal_blocks(inputs, columns, 0))
    outer, inner = outputs.reshape(*rows, *rows), inputs.reshape(*columns, *columns)

    def inverse(name: str, factors: Factors) -> Operator:
        left, right = _cores(factors["left"], factors["right"])
        if name == "left":
            gram = torch.einsum("cbsd,cdef,ebtf->bcset", right, inner, right)
            bond = inverses(gram.flatten(3).flatten(1, 2))
            return lambda slope: across[0] @ slope @ bond
        gram = torch.einsum("bacs,abef,fect->cbsft", left, outer, left)
        bond = inverses(gram.flatten(3).flatten(1, 2))
        return lambda slope: bond @ slope @ across[1]

    return inverse


def compose(left: Tensor, right: Tensor) -> Tensor:
    """(m1 m2, n1 n2): W[α m2 + β, γ n2 + δ] = Σ_σ left[β, α, γ r + σ] · right[γ, β r + σ, δ]."""
    return torch.einsum("bacs,cbsd->abcd", *_cores(left, right)).flatten(2).flatten(0, 1)


def _cores(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Views (m2, m1, n1, r) and (n1, m2, r, n2) of the two factors."""
    (m2, m1, _), (n1, _, n2) = left.shape, right.shape
    return left.reshape(m2, m1, n1, -1), right.reshape(n1, m2, -1, n2)
