"""Run the graph forward and backward on data, and keep the second moments at every site."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from geofx.batches import Batch, inputs_of, of_the_data, select_rows, token_mask
from geofx.errors import CalibrationError
from geofx.linalg import FULL_DECOMPOSITION_LIMIT, add_gram, fill_lower
from geofx.moments import UNITS, Mode, Moments
from geofx.objective import Objective
from geofx.passes.find_sites import linear_nodes, lookup_nodes
from geofx.program import Program, flat_tensors, writes_in_place
from geofx.progress import Progress, log_progress
from geofx.site import Site

logger = logging.getLogger(__name__)

SMALLEST, LARGEST = 1e-24, 1e36
"""Largest entries of a moment that float32 has room for, the small ones beside them too."""
MAX_DROPPED_RATIO = 0.1
"""Share of calibration rows that may be left out as not finite before the model itself is at fault."""


def calibrate(
    program: Program,
    batches: list[Batch],
    objective: Objective,
    mode: Mode = "two_sided",
    progress: Progress = log_progress,
    directions: bool = False,
) -> Moments:
    """A and G of every site over ``batches``; one forward and one backward through the activations each.

    Weights take no gradient, inputs shared by sites are squared once, only upper triangles are computed,
    padding is left out. Rows that make a site's input infinite or NaN are dropped and counted. Lookups are
    counted by row. ``directions`` also takes the moments of inputs scaled to norm 1.

    Raises:
        CalibrationError: no token is left, too many rows are dropped, or gradients are not finite.
    """
    recorder = Recorder(program, objective, mode == "two_sided", directions)
    progress("calibrate", 0, len(batches))
    with program.buffers_kept():
        for done, batch in enumerate(batches):
            recorder.add(batch)
            progress("calibrate", done + 1, len(batches))
    return recorder.moments(mode)


class _NotFiniteError(Exception):
    def __init__(self, node: str, rows: Tensor) -> None:
        super().__init__(node)
        self.node, self.rows = node, rows


class Recorder(fx.Interpreter):
    """Sums of x xᵀ, x and g gᵀ over all batches, and of how often rows are looked up, in float64."""

    def __init__(
        self, program: Program, objective: Objective, with_gradients: bool, with_directions: bool = False
    ) -> None:
        super().__init__(program.graph_module)
        self.program, self.objective, self.with_gradients = program, objective, with_gradients
        self.linear, self.tables = linear_nodes(program), lookup_nodes(program)
        self.is_wide = any(tensor.dtype == torch.float64 for _, tensor in program.tensors())
        self.grams: dict[str, Tensor] = {}
        self.directions: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.lookups: dict[str, Tensor] = {}
        self.lookup_batches: dict[str, Tensor] = {}
        self.lookup_gradients: dict[str, Tensor] = {}
        self.lookup_energies: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.terms, self.seen_rows, self.batches = 0.0, 0, 0
        self.dropped: dict[str, int] = {}
        self.last_bad = ""
        self.is_mutating = any(writes_in_place(node) for node in program.graph.nodes)
        for site in self.linear.values():
            rows, columns = site.shape
            self.grams.setdefault(site.input, _zeros(columns, columns))
            self.tokens.setdefault(site.input, 0)
            if with_directions:
                self.directions.setdefault(site.input, _zeros(columns, columns))
            if with_gradients:
                diagonal = site.kind != "linear" or rows > FULL_DECOMPOSITION_LIMIT
                sides = (rows,) if diagonal else (rows, rows)
                self.gradients.setdefault(site.weight, _zeros(*sides))
        for table in self.tables.values():
            rows, columns = table.shape
            self.lookups.setdefault(table.weight, _zeros(rows))
            self.lookup_batches.setdefault(table.weight, _zeros(rows))
            if with_gradients:
                self.lookup_gradients.setdefault(table.weight, _zeros(columns, columns))
                self.lookup_energies.setdefault(table.weight, _zeros(rows))

    def add(self, batch: Batch) -> None:
        """Add one batch, or the rows of it that stay finite."""
        rows = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
        self.seen_rows += rows
        self.batches += 1
        while True:
            try:
                return self._add_finite(batch)
            except _NotFiniteError as error:
                bad = int(error.rows.sum())
                logger.warning("%d calibration rows are not finite at %s and are left out", bad, error.node)
                self.dropped["not finite"] = self.dropped.get("not finite", 0) + bad
                self.last_bad = error.node
                batch = select_rows(batch, ~error.rows)
                if not bool((~error.rows).any()):
                    return None

    def _add_finite(self, batch: Batch) -> None:
        inputs = inputs_of(self.program, batch)
        self.mask = token_mask(batch | inputs)
        self.captured: dict[tuple[str, tuple[int, int]], Tensor] = {}
        self.alive: list[Tensor] = []
        self.counted: dict[str, list[Tensor]] = defaultdict(list)
        self.rows = next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor))
        with torch.set_grad_enabled(self.with_gradients):
            try:
                with of_the_data(f"calibration batch {self.batches - 1}"):
                    output = self.run(*inputs.values())
            finally:
                self.env = {}  # its values' hooks hold this object: autograd would keep both for ever
            self._require_no_nan(*flat_tensors(output))
            if self.with_gradients:
                seed, terms = self.objective.gradient_seed(output, batch | inputs)
        for (key, _), x in self.captured.items():
            self._add_input(key, x)
        for weight, parts in self.counted.items():
            counts = torch.cat(parts).bincount(minlength=self.lookups[weight].numel())
            self.lookups[weight] += counts
            self.lookup_batches[weight] += counts > 0
        self.captured, self.alive = {}, []
        if self.with_gradients:
            self.terms += terms
            seed.backward()  # type: ignore[no-untyped-call]

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; at a site, keep its input and hook its output's gradient."""
        site, table = self.linear.get(n.name), self.tables.get(n.name)
        if site is not None:
            self._capture(site, n.name, self.env[n.args[0]])  # type: ignore[index]
            return self._hooked(super().run_node(n), self.gradients, site.weight)
        value = super().run_node(n)
        if table is not None:
            ids = self.env[n.args[1]]  # type: ignore[index]
            self._add_lookups(table.weight, ids)
            return self._hooked(value, self.lookup_gradients, table.weight, ids)
        return value.detach() if n.op == "get_attr" and isinstance(value, Tensor) else value

    def _capture(self, site: Site, node: str, x: Tensor) -> None:
        self._require_finite(node, x)
        kept = x.detach()
        if self.is_mutating:
            self.alive.append(kept)  # its address is its key: no other tensor may get it
            kept = kept.clone()
        self.captured[site.input, (x.data_ptr(), x.numel())] = kept

    def _hooked(
        self, value: Tensor, totals: dict[str, Tensor], weight: str, ids: Tensor | None = None
    ) -> Tensor:
        """``value``, whose gradient will be squared into ``totals`` and, where it has ``ids``, by row."""
        if not self.with_gradients:
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_().clone()
        value.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self._add_gradient(totals[weight], weight, gradient, ids)
        )
        return value

    def _require_finite(self, node: str, *values: Tensor) -> None:
        for value in values:
            if value.is_floating_point() and not math.isfinite(float(value.detach().sum())):
                finite = torch.isfinite(value)
                if self.mask is not None and value.shape[:2] == self.mask.shape:
                    finite = finite | ~self.mask.reshape(*self.mask.shape, *[1] * (value.dim() - 2))
                if finite.all():
                    continue
                per_row = value.shape[0] // self.rows if value.shape[0] % self.rows == 0 else 0
                bad = ~finite.flatten(1).all(1).reshape(self.rows, per_row).all(1) if per_row else None
                raise _NotFiniteError(
                    node, bad if bad is not None else torch.ones(self.rows, dtype=torch.bool)
                )

    def _require_no_nan(self, *outputs: Tensor) -> None:
        """Infinite outputs may be the model's own way to say never; NaN is nobody's."""
        for value in outputs:
            if value.is_floating_point() and not math.isfinite(float(value.detach().sum())):
                self._require_finite("output", torch.where(torch.isinf(value), 0.0, value))

    def _valid(self, value: Tensor) -> Tensor:
        """Rows of a (batch, sequence, n), (sequence, batch, n) or (batch · sequence, n), no padding."""
        flat = value.reshape(-1, value.shape[-1])
        if self.mask is None:
            return flat
        for mask in (self.mask, self.mask.T):
            if value.shape[:-1] == mask.shape:
                return flat[mask.reshape(-1)]
        if value.dim() == 2 and value.shape[0] == self.mask.numel():
            return flat[self.mask.reshape(-1)]
        return flat

    def _add_input(self, key: str, x: Tensor) -> None:
        rows = _wide(self._valid(x))
        _add_scaled(self.grams[key], rows)
        self.tokens[key] += rows.shape[0]
        if self.directions:
            peaks = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
            _add_scaled(self.directions[key], functional.normalize(rows / peaks, dim=1))

    def _add_lookups(self, weight: str, ids: Tensor) -> None:
        """Count the rows that unmasked tokens read; ids given once for a whole batch count for each row."""
        if ids.dim() > 1 and ids.shape[0] == 1:
            ids = ids.expand(self.rows, *ids.shape[1:])
        self.counted[weight].append(self._valid(ids.unsqueeze(-1)).flatten())

    def _add_gradient(self, total: Tensor, weight: str, gradient: Tensor, ids: Tensor | None) -> None:
        rows = _wide(self._valid(gradient.detach()))
        if not math.isfinite(float(rows.sum())):
            raise CalibrationError("gradients are not finite", where=weight, fix="run the model in float32")
        _add_scaled(total, rows)
        if ids is not None:
            places = self._valid(ids.unsqueeze(-1)).flatten()
            self.lookup_energies[weight].index_add_(0, places, rows.double().square().sum(1))

    def moments(self, mode: Mode) -> Moments:
        """What was summed, divided by the numbers of tokens and loss terms."""
        lost = self.dropped.get("not finite", 0)
        if lost > max(1.0, MAX_DROPPED_RATIO * self.seen_rows):
            raise CalibrationError(
                f"{lost} of {self.seen_rows} rows give values that are not finite",
                where=self.last_bad,
                fix="check the data, or run the model in float32",
            )
        if self.with_gradients and self.terms <= 0.0:
            raise CalibrationError("the calibration data has no loss term", fix="pass longer texts")
        if not any(self.tokens.values()) and not any(counts.any() for counts in self.lookups.values()):
            raise CalibrationError(
                "no token reached any site", fix="pass calibration data that is not all padding"
            )
        sites = {site.weight: site for site in self.linear.values()}
        for site in sites.values():
            if self.tokens[site.input] == 0:
                logger.warning("no calibration token reached %s", site.weight)
        return Moments(
            inputs=self._means(self.grams),
            outputs=self._finished(self.gradients),
            lookups=self.lookups,
            lookup_batches=self.lookup_batches,
            lookup_outputs=self._finished(self.lookup_gradients),
            lookup_energies=self.lookup_energies,
            directions=self._means(self.directions),
            input_of={name: site.input for name, site in sites.items()},
            tokens=dict(self.tokens),
            loss_terms=round(self.terms),
            mode=mode,
            unit=self.objective.unit if mode == "two_sided" else UNITS[mode],
            dropped=dict(self.dropped),
        )

    def _means(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: self._finish(sums, key, max(1, self.tokens[key])) for key in sorted(sums)}

    def _finished(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._finish(sums, name, self.terms) for name in sorted(sums)}

    def _finish(self, sums: dict[str, Tensor], name: str, count: float) -> Tensor:
        """The whole matrix of means, in float64 where the model computes so or float32 cannot hold it.

        Frees the sum.
        """
        mean = sums.pop(name) / count
        peak = float(mean.abs().max()) if mean.numel() else 0.0
        fits = peak == 0.0 or SMALLEST < peak < LARGEST
        mean = mean.float() if fits and not self.is_wide else mean
        return fill_lower(mean) if mean.dim() == 2 else mean


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _add_scaled(total: Tensor, rows: Tensor) -> None:
    """total += rowsᵀ rows, with rows scaled by a power of two where their squares would leave float32."""
    peak = max(abs(float(value)) for value in rows.aminmax()) if rows.numel() else 0.0
    if peak == 0.0 or 1e-12 < peak < 1e12:
        return _add_squares(total, rows)
    scale = 2.0 ** math.floor(math.log2(peak))
    part = torch.zeros_like(total)
    _add_squares(part, rows / scale)
    total += part * scale * scale
    return None


def _add_squares(total: Tensor, rows: Tensor) -> None:
    """The upper triangle of rowsᵀ rows, or its diagonal where ``total`` is a vector."""
    if total.dim() == 2:
        return add_gram(total, rows)
    total += torch.linalg.vector_norm(rows, dim=0).square()
    return None
