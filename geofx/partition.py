"""min Σ c_j x_j subject to A x = 1, R x <= b, x binary: set partitioning under limits, exactly."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

GAP_PER_COLUMN = 1e-9
"""Share of the bound, times the columns searched, within which a partition counts as optimal."""
CUT_ROUNDS = 50
_ROW_SCALE, _OBJECTIVE_SCALE = 1e2, 1e3
_WIDENED, _ROUNDING = 1e-8, 1e-14
_stdout_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Problem:
    """n columns, of which every one of the m elements is to be covered once.

    Attributes:
        objective: (n,), >= 0.
        cover: (m, n), 1 where column j covers element i.
        group: (n,), equal for columns that cover the same elements.
        rows: (k, n), >= 0, what each column uses of each limited resource.
        limits: (k,).
        base: groups that together cover every element once.
    """

    objective: Floats
    cover: csr_array
    group: Indices
    rows: Floats
    limits: Floats
    base: Indices

    def value(self, chosen: Indices) -> float:
        """Σ c_j over ``chosen``, rounded once."""
        return math.fsum(self.objective[chosen])

    def among(self, columns: Indices) -> Problem:
        """The same problem with only these columns."""
        cover, rows = csr_array(self.cover[:, columns]), self.rows[:, columns]
        return Problem(self.objective[columns], cover, self.group[columns], rows, self.limits, self.base)

    def exceeded(self, chosen: Indices) -> list[int]:
        """The rows whose sum, rounded once and so exact for integers, is above the limit."""
        return [k for k, row in enumerate(self.rows) if math.fsum(row[chosen]) > self.limits[k]]


@dataclass(frozen=True, eq=False)
class Solution:
    """A partition within the limits, a proved lower bound, and whether they meet."""

    chosen: Indices
    objective: float
    bound: float
    proved: bool


def solve(problem: Problem, time_limit_s: float = 20.0) -> Solution | None:
    """The best partition within the limits, or None where there is none.

    A linear relaxation gives a bound and reduced costs, swaps give a first partition. A column whose
    reduced cost is above the difference cannot be in a better one and is dropped; HiGHS solves the rest.

    Raises:
        TimeoutError: the time ran out before any partition within the limits was found.
    """
    deadline = time.monotonic() + time_limit_s
    fitting = np.flatnonzero((problem.rows <= problem.limits[:, None]).all(axis=0))
    found = _solve_fitting(problem.among(fitting), deadline)
    return found and replace(found, chosen=fitting[found.chosen])


def _solve_fitting(problem: Problem, deadline: float) -> Solution | None:
    if (problem.limits < 0).any() or (problem.cover.sum(axis=1) == 0).any():
        return None
    if not len(problem.group):
        return Solution(np.zeros(0, dtype=np.intp), 0.0, 0.0, True)
    first = _first_partition(problem)
    relaxed = _relax(problem, first, deadline)
    if relaxed is None:
        return None
    bound, reduced, rounded = relaxed
    if rounded is not None:
        first = _better(problem, first, _swap_to_fit(problem, rounded))
    if first is not None and problem.value(first) - bound <= GAP_PER_COLUMN * bound:
        return Solution(first, problem.value(first), bound, True)
    return _branch(problem, first, bound, reduced, deadline)


def _relax(
    problem: Problem, first: Indices | None, deadline: float
) -> tuple[float, Floats, Indices | None] | None:
    """Bound, reduced costs and rounded solution of the relaxation x >= 0; None where it has no solution."""
    cost, scale = _scaled_objective(problem, first)
    rows, limits = _scaled_rows(problem)
    with _stdout_kept_clean():
        result = linprog(
            cost,
            A_ub=rows if len(rows) else None,
            b_ub=limits if len(rows) else None,
            A_eq=problem.cover,
            b_eq=np.ones(problem.cover.shape[0]),
            method="highs",
            options={"time_limit": max(deadline - time.monotonic(), 1e-3)},
        )
    if result.status == 2:
        return None
    if result.status != 0:
        return 0.0, np.zeros_like(problem.objective), None
    shares = result.eqlin.marginals
    prices = np.minimum(result.ineqlin.marginals, 0.0) if len(rows) else np.zeros(0)
    reduced = cost - problem.cover.T @ shares - rows.T @ prices
    terms = np.concatenate([shares, limits * prices, np.minimum(reduced, 0.0)])
    bound = math.fsum(terms) - _ROUNDING * float(np.abs(terms).sum())  # holds for any prices
    return max(bound / scale, 0.0), reduced / scale, _rounded(problem, result.x)


def _rounded(problem: Problem, shares: Floats) -> Indices | None:
    """The column with the largest share in each group that mostly belongs to the solution."""
    heads = _least_per_group(-shares, problem.group)
    totals = np.bincount(problem.group, shares)[problem.group[heads]]
    chosen = np.sort(heads[totals > 0.5])
    covered = problem.cover[:, chosen].sum(axis=1)
    return chosen if (covered == 1).all() else None


def _branch(
    problem: Problem, first: Indices | None, bound: float, reduced: Floats, deadline: float
) -> Solution | None:
    """Branch and bound over the columns that may still improve on ``first``."""
    known = math.inf if first is None else problem.value(first)
    keep = reduced <= (known - bound) * (1.0 + 1e-6) + 1e-9 * abs(bound)
    if first is not None:
        keep[first] = True
    columns = np.flatnonzero(keep)
    logger.debug("%d of %d columns left, gap %.3g", len(columns), len(keep), known - bound)
    found, proved_bound, proved = _milp(problem, columns, first, deadline)
    best = _better(problem, first, found)
    if best is None and proved:
        return None
    if best is None:
        raise TimeoutError
    value = problem.value(best)
    if proved and value < known / 2:  # at this scale HiGHS could not tell small values apart
        return _branch(problem, best, bound, reduced, deadline)
    bound = max(bound, min(proved_bound, known))
    return Solution(best, value, min(bound, value), proved)


def _milp(
    problem: Problem, columns: Indices, first: Indices | None, deadline: float
) -> tuple[Indices | None, float, bool]:
    """Best partition among ``columns``, a bound on all of them, and whether the search was finished.

    HiGHS takes a sum for feasible within a tolerance. One that is over the limit in exact arithmetic
    is cut off by a cover inequality, which no partition within the limits violates.
    """
    cost, scale = _scaled_objective(problem, first)
    rows, limits = _scaled_rows(problem)
    cover = csr_array(problem.cover[:, columns])
    constraints = [LinearConstraint(cover, 1.0, 1.0)]
    if len(rows):
        constraints.append(LinearConstraint(rows[:, columns], -np.inf, limits))
    gap, bound, chosen = GAP_PER_COLUMN * len(columns), 0.0, columns
    for _ in range(CUT_ROUNDS):
        with _stdout_kept_clean():
            result = milp(
                cost[columns],
                integrality=np.ones(len(columns)),
                bounds=Bounds(0.0, 1.0),
                constraints=constraints,
                options={"mip_rel_gap": gap, "time_limit": max(deadline - time.monotonic(), 1e-3)},
            )
        bound = max(bound, (result.mip_dual_bound or 0.0) / scale)
        if result.x is None:
            return None, math.inf if result.status == 2 else bound, result.status == 2
        chosen = columns[result.x > 0.5]
        over = problem.exceeded(chosen)
        if not over:
            return chosen, bound, result.status == 0
        constraints += [_cover_cut(problem, columns, chosen, row) for row in over]
    return _swap_to_fit(problem, chosen), bound, False


def _cover_cut(problem: Problem, columns: Indices, chosen: Indices, row: int) -> LinearConstraint:
    """Σ_{j in C} x_j <= |C| - 1 for columns C that together exceed the limit, or dearer ones instead."""
    use = problem.rows[row]
    members = chosen[np.argsort(-use[chosen], kind="stable")]
    while len(members) > 1 and math.fsum(use[members[:-1]]) > problem.limits[row]:
        members = members[:-1]
    least = dict(zip(problem.group[members], use[members], strict=True))
    floor = np.array([least.get(group, math.inf) for group in problem.group[columns]])
    return LinearConstraint((use[columns] >= floor).astype(float)[None], -np.inf, len(members) - 1)


def _first_partition(problem: Problem) -> Indices | None:
    """argmin c + λ Σ_k r_k / b_k in each group of ``base``, λ the least found that fits, then swaps."""
    columns = np.flatnonzero(np.isin(problem.group, problem.base))
    if len(np.unique(problem.group[columns])) < len(problem.base):
        return None
    weight = (problem.rows[:, columns] / np.where(problem.limits > 0, problem.limits, 1.0)[:, None]).sum(
        axis=0
    )
    cost, scale = problem.objective[columns], float(problem.objective.max()) or 1.0

    def at(power: float) -> Indices:
        return columns[_least_per_group(cost + scale * 10.0**power * weight, problem.group[columns])]

    low, high = -20.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.exceeded(at(middle)) else (low, middle)
    return _swap_to_fit(problem, at(high))


def _least_per_group(key: Floats, group: Indices) -> Indices:
    order = np.lexsort((key, group))
    return order[np.unique(group[order], return_index=True)[1]]


def _swap_to_fit(problem: Problem, start: Indices) -> Indices | None:
    """From a partition to one within the limits, by swaps inside groups; None where they get stuck.

    Each swap has the least rise of the objective per relief; then any that lower it and still fit follow.
    """
    chosen = start.copy()
    slot = np.full(int(problem.group.max()) + 1, -1)
    slot[problem.group[start]] = np.arange(len(start))
    movable = np.flatnonzero(slot[problem.group] >= 0)
    place = slot[problem.group[movable]]
    scale = np.where(problem.limits > 0, problem.limits, 1.0)[:, None]
    rows, limits = problem.rows / scale, problem.limits[:, None] / scale
    for _ in range(len(movable)):
        rise = problem.objective[movable] - problem.objective[chosen[place]]
        use = rows[:, chosen].sum(axis=1, keepdims=True)
        after = np.maximum(use - limits + (rows[:, movable] - rows[:, chosen[place]]), 0.0).sum(axis=0)
        if problem.exceeded(chosen):
            relief = float(np.maximum(use - limits, 0.0).sum()) - after
            rank = np.where(
                relief > 0, np.where(rise > 0, rise / np.where(relief > 0, relief, 1.0), rise), np.inf
            )
        else:
            rank = np.where((rise < 0) & (after <= 0), rise, np.inf)
        best = int(np.argmin(rank))
        if rank[best] == np.inf:
            break
        swapped = chosen.copy()
        swapped[place[best]] = movable[best]
        if not problem.exceeded(chosen) and problem.exceeded(swapped):
            break
        chosen = swapped
    return None if problem.exceeded(chosen) else np.sort(chosen)


def _better(problem: Problem, one: Indices | None, other: Indices | None) -> Indices | None:
    if one is None or other is None:
        return other if one is None else one
    return other if problem.value(other) < problem.value(one) else one


def _scaled_objective(problem: Problem, first: Indices | None) -> tuple[Floats, float]:
    size = 0.0 if first is None else problem.value(first)
    scale = _OBJECTIVE_SCALE / (size or float(problem.objective.max()) or 1.0)
    return problem.objective * scale, scale


def _scaled_rows(problem: Problem) -> tuple[Floats, Floats]:
    """Rows whose limits are all equal, so that one absolute tolerance fits bytes and nats.

    The limits are a hair wider, lest rounding exclude a partition that just meets them; see `_cover_cut`.
    """
    size = np.where(problem.limits > 0, problem.limits, problem.rows.max(axis=1, initial=0.0))
    scale = _ROW_SCALE / np.where(size > 0, size, 1.0)
    return problem.rows * scale[:, None], problem.limits * scale * (1.0 + _WIDENED)


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """Send descriptor 1 to the log meanwhile: HiGHS prints from C whatever its options say."""
    with _stdout_lock, tempfile.TemporaryFile() as printed:
        try:
            saved = os.dup(1)
        except OSError:  # closed: nothing can be printed on it
            yield
            return
        try:
            _flush()
            os.dup2(printed.fileno(), 1)
            yield
        finally:
            _flush()
            os.dup2(saved, 1)
            os.close(saved)
            printed.seek(0)
            for line in printed.read().decode(errors="replace").splitlines():
                logger.debug("HiGHS: %s", line)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)  # C buffers apart from Python; not on Windows
