"""W[v] = G_1[v] G_2[v] .. G_K[v]: each row, folded to a tensor, is a matrix product state of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from geofx.errors import PlanError
from geofx.factorizations.contract import Factors, measured_loss
from geofx.factorizations.refine import refine
from geofx.geometry import GeometricForm, Subspace, Transformation
from geofx.linalg import leading_axes, require_finite, working_dtype
from geofx.region import Region, RegionKind
from geofx.region_analysis import RegionAnalysis, Weights, on_right

STEPS = 2
"""Conjugate gradient steps per core: a table of 50,000 rows takes well under a minute."""

CHUNK = 2048
"""Rows decomposed at a time: few enough to stay in the cache."""


@dataclass(frozen=True)
class TokenMPS:
    """argmin over rank r of ‖w - G_1 G_2 .. G_K‖² for each row w, padded with zeros to 2^n and folded.

    TensorGPT (Xu et al., 2023): TT-SVD (Oseledets, 2011) of every row on its own, over modes of 2. Bonds that
    r does not cut would be identities, so the modes between them are one: 2^a, 2, .., 2, 2^a with 2^a the
    least power above r; the same states in fewer numbers. ``weighting`` ``"two_sided"`` then moves the cores
    by alternating least squares in the metric; ``"none"`` is the paper's.

    Rows share nothing, so `add_tokens` writes new ones in ``cores1``, ``cores2``, .. beside what is stored;
    ``added`` is how many rows each of those holds.
    """

    columns: int
    rank: int
    weighting: Literal["two_sided", "none"] = "two_sided"
    added: tuple[int, ...] = ()

    name: ClassVar[str] = "token_mps"
    regions: ClassVar[frozenset[RegionKind]] = frozenset({"embedding"})
    closed_form: ClassVar[bool] = False

    @property
    def cores(self) -> tuple[tuple[int, int, int], ...]:
        """(bond, mode, bond) of each core of a row."""
        bits, cut = (self.columns - 1).bit_length(), self.rank.bit_length()
        head = min(cut, bits - bits // 2)
        tail = min(cut, bits - head)
        modes = (2**head, *[2] * (bits - head - tail), 2**tail)
        bonds = [min(self.rank, math.prod(modes[:k]), math.prod(modes[k:])) for k in range(len(modes) + 1)]
        return tuple(zip(bonds, modes, bonds[1:], strict=False))

    @property
    def numbers(self) -> int:
        """How many numbers a row takes."""
        return sum(math.prod(core) for core in self.cores)

    @classmethod
    def candidates(cls, region: Region, analysis: RegionAnalysis) -> Iterator[Self]:
        """Ranks 1, 2, .. while a row's cores are smaller than the row."""
        form = cls(region.shape[1], 1)
        while form.columns > 2 and form.numbers < form.columns:
            yield form
            form = replace(form, rank=form.rank + 1)

    def factor_shapes(self, region: Region) -> dict[str, tuple[int, ...]]:
        """``cores`` (out, numbers), a row's cores one after the other; one more each time tokens came."""
        rows, columns = region.shape
        first, limit = rows - sum(self.added), 2 ** ((columns - 1).bit_length() // 2)
        grows = min((first, *self.added)) >= 1
        if columns != self.columns or columns < 3 or not grows or not 1 <= self.rank <= limit:
            what = f"rows of {self.columns} and rank {self.rank}, {self.added} of them added"
            where = f"{region.name}, shape {region.shape}"
            raise PlanError(what, where=where, fix=f"use its columns and a rank of 1..{limit}")
        return {_cores(part): (size, self.numbers) for part, size in enumerate((first, *self.added))}

    def predicted_loss(self, region: Region, analysis: RegionAnalysis) -> float:
        """The loss at the fitted cores."""
        return measured_loss(self, analysis)

    def fit(self, weights: Weights, analysis: RegionAnalysis) -> tuple[Self, Factors]:
        """TT-SVD of every row, and of its refinement in the metric what is better."""
        weight = require_finite(weights[analysis.region.site.weight], analysis.region.name)
        moment = analysis.metric.input if self.weighting == "two_sided" else None
        packed = torch.cat([self._packed(rows, moment) for rows in torch.split(weight, CHUNK)])
        sizes = [len(weight) - sum(self.added), *self.added]
        return self, {_cores(part): rows.clone() for part, rows in enumerate(torch.split(packed, sizes))}

    def add_tokens(self, factors: Factors, rows: Tensor) -> tuple[Self, Factors]:
        """This format with ``rows`` (n, in) after its last; the rows stored are neither read nor copied.

        The new cores are those of TT-SVD alone, also under ``"two_sided"``: a table keeps no metric.

        Raises:
            PlanError, NumericsError: ``rows`` are of another width or no numbers, or not finite.
        """
        if rows.dim() != 2 or rows.shape[1] != self.columns or len(rows) == 0 or not rows.is_floating_point():
            raise PlanError(
                f"new rows of shape {tuple(rows.shape)}, {rows.dtype}",
                fix=f"give (n, {self.columns}) numbers",
            )
        require_finite(rows, "new rows")
        like = factors[_cores(0)]
        packed = torch.cat([self._packed(part, None) for part in torch.split(rows.detach(), CHUNK)])
        grown = replace(self, added=(*self.added, len(rows)))
        return grown, {**factors, _cores(len(grown.added)): require_finite(packed.to(like), "new rows")}

    def apply(self, x: Tensor, factors: Factors, site: int = 0) -> Tensor:
        """Raises PlanError: a head would have to rebuild every row for every token."""
        raise PlanError("token_mps is only looked up", fix="use group_reduce or low_rank for a head")

    def lookup(self, ids: Tensor, factors: Factors) -> Tensor:
        """G_1 G_2 .. G_K of the asked rows, from left to right."""
        sizes = [factors[_cores(part)].shape[0] for part in range(len(self.added) + 1)]
        packed = functional.embedding(
            ids if not self.added else ids.clamp(max=sizes[0] - 1), factors[_cores(0)]
        )
        for part, size in enumerate(self.added, 1):
            places = ids - sum(sizes[:part])
            newer = functional.embedding(places.clamp(0, size - 1), factors[_cores(part)])
            packed = torch.where((places >= 0).unsqueeze(-1), newer, packed)
        return self._product(self._unpacked(packed))

    def to_dense(self, factors: Factors, site: int = 0) -> Tensor:
        """All rows, their cores multiplied from right to left."""
        packed = torch.cat([factors[_cores(part)] for part in range(len(self.added) + 1)])
        dense = []
        for rows in torch.split(packed, CHUNK):
            *others, state = self._unpacked(rows)
            state = state[..., 0]
            for core in reversed(others):
                state = torch.einsum("vpmq,vqx->vpmx", core, state).flatten(2)
            dense.append(state[:, 0, : self.columns])
        return torch.cat(dense)

    def geometry(self, region: Region) -> GeometricForm:
        """A subspace per core of a row, contracted along the bonds."""
        spaces = [
            Subspace(f"core {place}", min(p, m * q), m * q) for place, (p, m, q) in enumerate(self.cores)
        ]
        names = [space.name for space in spaces]
        steps = [Transformation("contract", pair, pair[1]) for pair in pairwise(names)]
        return GeometricForm(tuple(spaces), tuple(steps))

    def _packed(self, rows: Tensor, moment: Tensor | None) -> Tensor:
        """The cores of each row, in its dtype; without a ``moment`` those of TT-SVD."""
        start = self._decomposed(rows.double())
        if moment is not None:
            start = self._refined(start, rows.to(working_dtype(rows)), moment)
        packed = torch.cat([core.flatten(1) for core in start], 1)
        return require_finite(packed.to(rows), "cores of a table")

    def _decomposed(self, rows: Tensor) -> list[Tensor]:
        """TT-SVD of all rows, each bond's basis the leading eigenvectors of a small Gram matrix."""
        bits = (self.columns - 1).bit_length()
        rest = functional.pad(rows, (0, 2**bits - self.columns)).unsqueeze(1)
        found = []
        for left, mode, right in self.cores[:-1]:
            unfolded = rest.reshape(len(rows), left * mode, -1)
            basis = leading_axes(unfolded @ unfolded.mT, right, "rows of a table")
            found.append(torch.unflatten(basis, 1, (left, mode)))
            rest = basis.mT @ unfolded
        return [*found, rest.unsqueeze(-1)]

    def _refined(self, cores: Sequence[Tensor], rows: Tensor, moment: Tensor) -> list[Tensor]:
        """Cores nearer in ‖·‖_A, row by row: whatever their shares, the loss falls."""
        start = {str(place): core.to(rows) for place, core in enumerate(cores)}
        refined = refine(
            lambda parts: self._product([parts[name] for name in start]),
            start,
            rows,
            lambda change: on_right(change, moment),
            sweeps=1,
            steps=STEPS,
        )
        losses = []
        for parts in (start, refined):
            change = rows - self._product(list(parts.values()))
            losses.append((change * on_right(change, moment)).sum(1))
        better = (losses[1] < losses[0])[:, None, None, None]
        return [torch.where(better, refined[name], part) for name, part in start.items()]

    def _unpacked(self, packed: Tensor) -> list[Tensor]:
        parts = torch.split(packed, [math.prod(core) for core in self.cores], -1)
        return [torch.unflatten(part, -1, core) for part, core in zip(parts, self.cores, strict=True)]

    def _product(self, cores: Sequence[Tensor]) -> Tensor:
        """(..., in) of cores (..., bond, mode, bond)."""
        state = cores[0].squeeze(-3)
        for core in cores[1:]:
            state = torch.unflatten(state @ core.flatten(-2), -1, core.shape[-2:]).flatten(-3, -2)
        return state.squeeze(-1)[..., : self.columns]


def _cores(part: int) -> str:
    return f"cores{part or ''}"
