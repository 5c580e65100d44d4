"""Eigenproblems that check what LAPACK does not: finite in, finite out, clipped, deterministic signs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import scipy.linalg
import torch
from torch import Tensor

from geofx.errors import NumericsError

logger = logging.getLogger(__name__)

FULL_DECOMPOSITION_LIMIT = 16384
"""Largest side that dense LAPACK drivers are given; their 32-bit workspaces overflow some way above."""


def require_finite(matrix: Tensor, what: str) -> Tensor:
    """Return ``matrix``; LAPACK would return NaN without a word if it held an Inf.

    Raises:
        NumericsError: an entry is NaN or infinite.
    """
    if not torch.isfinite(matrix).all():
        bad = int((~torch.isfinite(matrix)).sum())
        raise NumericsError(f"{what} holds {bad} values that are not finite", fix="leave this site dense")
    return matrix


def eigh_psd(matrix: Tensor, what: str = "matrix") -> tuple[Tensor, Tensor]:
    """M = Q diag(λ) Qᵀ with λ descending and clipped at 0, in float64.

    ``matrix`` is (n, n), symmetric positive semidefinite up to rounding. Eigenvectors have their
    largest entry positive, so that the result does not depend on LAPACK's choice of sign.

    Raises:
        NumericsError: not finite, or every solver failed.
    """
    require_finite(matrix, what)
    scale = float(matrix.abs().max()) or 1.0
    symmetric = (matrix.double() / scale).add(matrix.double().T / scale) / 2
    values, vectors = _first_that_converges(symmetric, _EIGH_LADDER, what)
    order = torch.arange(values.numel() - 1, -1, -1)
    return values[order].clamp_min(0.0) * scale, canonical_signs(vectors[:, order])


def working_dtype(weight: Tensor) -> torch.dtype:
    """float64 for weights of it, float32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def leading_axes(grams: Tensor, rank: int, what: str = "Gram matrix") -> Tensor:
    """(..., n, r): eigenvectors of the r largest eigenvalues of each of a batch (..., n, n), largest first.

    Of matrices as `eigh_psd` takes them, in float64, with its signs.

    Raises:
        NumericsError: not finite, or every solver failed.
    """
    if grams.dim() == 2:
        return eigh_psd(grams, what)[1][:, :rank]
    require_finite(grams, what)
    try:
        vectors: Tensor = torch.linalg.eigh(grams.double())[1].flip(-1)
    except RuntimeError as error:
        logger.warning("%s: the batch did not converge (%s), trying one by one", what, error)
        one_by_one = [eigh_psd(gram, what)[1] for gram in grams.flatten(0, -3)]
        vectors = torch.stack(one_by_one).reshape(grams.shape)
    return canonical_signs(vectors[..., :rank])


def cholesky(matrices: Tensor, what: str = "matrix") -> Tensor:
    """Lower L with L Lᵀ = M for each of a batch (..., n, n), in float64.

    Raises:
        NumericsError: one is not finite or not positive definite.
    """
    root: Tensor
    root, info = torch.linalg.cholesky_ex(require_finite(matrices, what).double())
    if bool(info.any()):
        raise NumericsError(f"{what} is not positive definite", fix="leave this site dense")
    return root


def root_and_inverse(matrix: Tensor, what: str = "matrix", floor: float = 1e-12) -> tuple[Tensor, Tensor]:
    """M^{1/2} and its pseudo-inverse on the live subspace {λ > floor · λ_max}; both (n, n) float64.

    Of a diagonal, given as a vector, the diagonals; exact, so that all that is above 0 is live.
    """
    if matrix.dim() == 1:
        root = matrix.double().clamp_min(0.0).sqrt()
        return root, torch.where(root > 0, 1.0 / root, 0.0)
    values, vectors = eigh_psd(matrix, what)
    live = values > floor * values[0].clamp_min(torch.finfo(torch.float64).tiny)
    root = torch.where(live, values.sqrt(), 0.0)
    inverse = torch.where(live, 1.0 / torch.where(live, root, 1.0), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def shrink(matrix: Tensor, share: float) -> Tensor:
    """(1 - a) M + a · mean(diag M) · I: relative shrinkage, which keeps the trace; M may be its diagonal."""
    mean = (matrix.diagonal() if matrix.dim() == 2 else matrix).mean()
    shrunk = matrix.double() * (1.0 - share)
    (shrunk.diagonal() if matrix.dim() == 2 else shrunk).add_(share * mean.double())
    return shrunk


def add_gram(total: Tensor, rows: Tensor, block: int = 384) -> None:
    """total += rowsᵀ rows on the upper triangle only, in blocks: half the flops of the full product.

    ``rows`` is (tokens, n); ``total`` (n, n), usually of a wider dtype. Use `fill_lower` at the end.
    """
    size = rows.shape[1]
    for start in range(0, size, block):
        stop = min(start + block, size)
        total[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]


def fill_lower(upper: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is given."""
    return upper.triu() + upper.triu(1).T


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Upper triangle of (n, n), row by row, as a vector of n(n+1)/2."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns].contiguous()


def unpack_symmetric(packed: Tensor) -> Tensor:
    """Inverse of `pack_symmetric`."""
    size = int(((8 * packed.numel() + 1) ** 0.5 - 1) // 2)
    matrix = packed.new_zeros(size, size)
    rows, columns = torch.triu_indices(size, size)
    matrix[rows, columns] = packed
    return fill_lower(matrix)


def multiply_blocks(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y[α m2 + β] = Σ_γσ left[β, α, γσ] (right[γ, βσ, :] · x[γ]), as two batched matmuls.

    x (..., n1 n2), left (m2, m1, n1 r), right (n1, m2 r, n2) -> (..., m1 m2).
    """
    (m2, m1, _), (n1, _, n2) = left.shape, right.shape
    slices = x.reshape(-1, n1, n2).transpose(0, 1)
    inner = torch.bmm(slices, right.transpose(1, 2))
    crossed = inner.reshape(n1, -1, m2, right.shape[1] // m2).permute(2, 1, 0, 3).flatten(2)
    blocks = torch.bmm(crossed, left.transpose(1, 2))
    return blocks.permute(1, 2, 0).reshape(*x.shape[:-1], m1 * m2)


def canonical_signs(vectors: Tensor) -> Tensor:
    """Columns scaled by ±1 so that the entry of largest modulus is positive."""
    picked = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(picked < 0, -1.0, 1.0).to(vectors.dtype)


def _perturbed_eigh(matrix: Tensor) -> tuple[Tensor, ...]:
    noise = torch.randn(matrix.shape, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    return tuple(torch.linalg.eigh(matrix + 1e-14 * matrix.norm() * (noise + noise.T)))


def _scipy_eigh(matrix: Tensor) -> tuple[Tensor, ...]:
    parts = scipy.linalg.eigh(matrix.numpy(force=True), driver="ev")
    return tuple(torch.from_numpy(part.copy()).to(matrix.device) for part in parts)


Solver = Callable[[Tensor], tuple[Tensor, ...]]

_EIGH_LADDER: tuple[tuple[str, Solver], ...] = (
    ("syevd", lambda m: tuple(torch.linalg.eigh(m))),
    ("syevd on a perturbed matrix", _perturbed_eigh),
    ("syev", _scipy_eigh),
)


def _first_that_converges(
    matrix: Tensor, ladder: tuple[tuple[str, Solver], ...], what: str
) -> tuple[Tensor, ...]:
    if max(matrix.shape) > FULL_DECOMPOSITION_LIMIT:
        raise NumericsError(
            f"{what} of shape {tuple(matrix.shape)} is beyond the dense solvers' {FULL_DECOMPOSITION_LIMIT}",
            fix="leave this site dense",
        )
    last: Exception | None = None
    for name, solve in ladder:
        try:
            parts = solve(matrix)
        except (RuntimeError, scipy.linalg.LinAlgError, ValueError) as error:
            logger.warning("%s: %s did not converge (%s), trying the next solver", what, name, error)
            last = error
            continue
        if all(torch.isfinite(part).all() for part in parts):
            return parts
        logger.warning("%s: %s returned values that are not finite, trying the next solver", what, name)
    raise NumericsError(f"{what}: no solver converged", fix="leave this site dense") from last
