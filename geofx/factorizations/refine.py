"""Factors of any multilinear format moved into the loss-weighted metric, block by block, never uphill."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from geofx.factorizations.contract import Factors

Dense = Callable[[Factors], Tensor]
Operator = Callable[[Tensor], Tensor]
Preconditioner = Callable[[str, Factors], Operator]

SWEEPS = 2
"""Times that every factor is updated."""

STEPS = 4
"""Conjugate gradient steps per factor and sweep; each costs one product with the metric."""


def refine(
    dense: Dense,
    start: Factors,
    target: Tensor,
    gradient: Operator,
    sweeps: int = SWEEPS,
    steps: int = STEPS,
    inverse: Preconditioner = lambda name, factors: _same,
) -> dict[str, Tensor]:
    """argmin over the factors of <Δ, M Δ> with Δ = target - dense(factors), by alternating least squares.

    With all factors but one held, dense is affine, Δ = Δ₀ - J d, and the quadratic is minimised by conjugate
    gradients on Jᵀ M J d = Jᵀ M Δ₀ (Hestenes and Stiefel, 1952); stopping early is still a descent, so the
    loss falls from step to step. Factors that are not floating point stay as they are.

    Args:
        dense: multilinear in each floating-point factor; returns the shape of ``target``.
        start: the factors to begin with, in the dtype to work in.
        target: the weight, or the weights of a stack (sites, out, in), in that dtype.
        gradient: M, symmetric positive semidefinite, such as `Metric.gradient`.
        sweeps: how often all factors are updated.
        steps: conjugate gradient steps per update; a factor of n numbers is exact after n.
        inverse: for a factor's name, with all factors as they are, an approximation of (Jᵀ M J)⁻¹, symmetric
            and positive definite; the better it is, the fewer steps an update takes.

    Returns:
        The refined factors; the start itself where rounding ate the gain.
    """
    gradient = _of_unit_size(gradient, target)
    factors = {name: part.detach().clone() for name, part in start.items()}
    first = target - dense(factors)
    pulled = gradient(first)
    residual = first
    enough = torch.finfo(target.dtype).eps ** 2 * float((target * gradient(target)).sum())
    for _ in range(sweeps):
        for name, part in list(factors.items()):
            if part.is_floating_point() and float((residual * pulled).sum()) > enough:
                factors[name], residual, pulled = _update(
                    dense, factors, name, residual, pulled, gradient, steps, inverse(name, factors)
                )
    final = target - dense(factors)
    before, after = (float((change * gradient(change)).sum()) for change in (first, final))
    return factors if after < before else dict(start)


def _of_unit_size(operator: Operator, at: Tensor) -> Operator:
    """The operator over a power of two near its size: squares of steps stay within float32 in any unit."""
    size = float(operator(at).abs().max()) / (float(at.abs().max()) or 1.0)
    if not 0.0 < size < math.inf:
        return operator
    scale = 2.0 ** -math.frexp(size)[1]
    return lambda vector: scale * operator(vector)


def _same(vector: Tensor) -> Tensor:
    return vector


def _update(
    dense: Dense,
    factors: Factors,
    name: str,
    residual: Tensor,
    pulled: Tensor,
    gradient: Operator,
    steps: int,
    inverse: Operator,
) -> tuple[Tensor, Tensor, Tensor]:
    """One factor moved by ``steps`` preconditioned conjugate gradient steps; with it Δ and M Δ."""
    value = factors[name].detach().clone().requires_grad_()
    with torch.enable_grad():
        output = dense({**factors, name: value})
    offset = dense({**factors, name: torch.zeros_like(value)})

    def transposed(vector: Tensor) -> Tensor:
        (part,) = torch.autograd.grad(output, value, vector, retain_graph=True)
        return part

    moved, slope = value.detach(), transposed(pulled)
    inverse = _of_unit_size(inverse, slope)
    direction = inverse(slope)
    energy = float((slope * direction).sum())
    for _ in range(steps):
        if energy <= 0.0:
            break
        with torch.no_grad():
            change = dense({**factors, name: direction}) - offset
            pull = gradient(change)
            curvature = float((change * pull).sum())
            if curvature <= 0.0:
                break
            length = energy / curvature
            moved = moved + length * direction
            residual, pulled = residual - length * change, pulled - length * pull
        slope = transposed(pulled)
        steepest = inverse(slope)
        following = float((slope * steepest).sum())
        direction, energy = steepest + (following / energy) * direction, following
    return moved, residual, pulled
