"""What the analysis knows of one region: its weights, their metric, and every truncation of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor

from geofx.linalg import eigh_psd, require_finite, root_and_inverse, shrink, working_dtype
from geofx.moments import Moments
from geofx.region import Region
from geofx.spectrum import Spectrum

Weighting = Literal["two_sided", "input", "none", "input_diagonal"]
Weights = Mapping[str, Tensor]

INPUT_SHRINKAGE = 1e-4
OUTPUT_SHRINKAGE = 1e-2
"""Least shares of mean(diag) · I mixed into A and G: relative, so that no unit or model is favoured."""


@dataclass(frozen=True, eq=False)
class Truncation:
    """Ŵ_r = left[:, :r] @ right[:r]: the optimum of every rank r at once.

    ``left`` is (out, k), ``right`` (k, in), ``spectrum`` has k = min(out, in) values.
    """

    left: Tensor
    right: Tensor
    spectrum: Spectrum


@dataclass(frozen=True, eq=False)
class Metric:
    """‖ΔW‖² = tr(G ΔW A ΔWᵀ), with A (in, in) and G (out, out) shrunk, so positive definite.

    A side may be given by its diagonal alone, as a vector; None stands for the identity. ``scale`` turns the
    form into the unit of the loss. A block-diagonal G is given by its ``blocks``, in the place of ``output``.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    scale: float = 1.0
    blocks: tuple[Tensor, ...] = ()

    def left(self, matrix: Tensor) -> Tensor:
        """G M for a matrix of out rows."""
        return by_blocks(self.blocks, matrix) if self.blocks else on_left(self.output, matrix)

    def gradient(self, change: Tensor) -> Tensor:
        """G ΔW A, in the dtype of ``change``: half the gradient of the loss, but for ``scale``."""
        return self.left(on_right(change, self.input))

    def loss(self, change: Tensor) -> float:
        """scale · tr(G ΔW A ΔWᵀ) for a ``change`` ΔW of shape (out, in)."""
        delta = change.double()
        left, right = self.left(delta), on_right(delta, self.input)
        return self.scale * float((left * right).sum())


def on_left(moment: Tensor | None, matrix: Tensor) -> Tensor:
    """G M for G given whole, by its diagonal, or as None for the identity."""
    if moment is None:
        return matrix
    return moment.to(matrix)[:, None] * matrix if moment.dim() == 1 else moment.to(matrix) @ matrix


def by_blocks(blocks: Sequence[Tensor], matrix: Tensor) -> Tensor:
    """M X for a block-diagonal M, each block whole or by its diagonal."""
    parts = torch.split(matrix, [len(block) for block in blocks])
    return torch.cat([on_left(block, part) for block, part in zip(blocks, parts, strict=True)])


def on_right(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """M A, likewise."""
    return matrix if moment is None else on_left(moment, matrix.T).T


def diagonal_power(moment: Tensor | None, power: float) -> Tensor | None:
    """diag(M)^power as a vector, for M given whole, by its diagonal, or as None for the identity."""
    if moment is None:
        return None
    return (moment if moment.dim() == 1 else moment.diagonal()).double().clamp_min(0.0) ** power


def truncate(weight: Tensor, metric: Metric, what: str = "weight") -> Truncation:
    """argmin over rank r of tr(G (W - Ŵ) A (W - Ŵ)ᵀ), for all r, from one eigenproblem.

    On the smaller side: for in <= out, A^{1/2} Wᵀ G W A^{1/2} = V Σ² Vᵀ and
    Ŵ_r = W A^{1/2} V_r V_rᵀ A^{-1/2}; else G^{1/2} W A Wᵀ G^{1/2} = U Σ² Uᵀ and
    Ŵ_r = G^{-1/2} U_r U_rᵀ G^{1/2} W. The larger side needs no root (Swift-SVD's observation).

    Raises:
        NumericsError: a value is not finite or no solver converged.
    """
    work = require_finite(weight, what).double()
    left, right, squares = (_from_input_side if work.shape[1] <= work.shape[0] else _from_output_side)(
        work, metric, what
    )
    balance = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).clamp(1e-150, 1e150).sqrt()
    dtype = working_dtype(weight)
    spectrum = Spectrum((metric.scale * squares).numpy(force=True))
    return Truncation((left * balance).to(dtype), (right / balance[:, None]).to(dtype), spectrum)


def _from_input_side(weight: Tensor, metric: Metric, what: str) -> tuple[Tensor, Tensor, Tensor]:
    root, inverse = roots(metric.input, weight.shape[1], what)
    lifted = weight @ root
    squares, vectors = eigh_psd(lifted.T @ metric.left(lifted), what)
    return lifted @ vectors, vectors.T @ inverse, squares


def _from_output_side(weight: Tensor, metric: Metric, what: str) -> tuple[Tensor, Tensor, Tensor]:
    if metric.blocks:
        pairs = [root_and_inverse(block, f"second moment at {what}") for block in metric.blocks]
    else:
        pairs = [roots(metric.output, weight.shape[0], what)]
    lifted = by_blocks([root for root, _ in pairs], weight)
    squares, vectors = eigh_psd(on_right(lifted, metric.input) @ lifted.T, what)
    return by_blocks([inverse for _, inverse in pairs], vectors), vectors.T @ lifted, squares


def roots(matrix: Tensor | None, size: int, what: str) -> tuple[Tensor, Tensor]:
    """M^{1/2} and its inverse, (size, size), for M given whole, by its diagonal, or as None."""
    if matrix is None:
        eye = torch.eye(size, dtype=torch.float64)
        return eye, eye
    root, inverse = _recent_roots(matrix, f"second moment at {what}")
    return (root.diag(), inverse.diag()) if matrix.dim() == 1 else (root, inverse)


class Recent:
    """The last results of a function of an object, told by identity: sites of one input follow one another.

    Only the results are kept alive, not what they are of.
    """

    def __init__(self, function: Callable[..., Any], size: int = 2) -> None:
        self._function = function
        self._kept: deque[tuple[ref[Any], Any]] = deque(maxlen=size)

    def __call__(self, item: Any, *rest: Any) -> Any:
        """``function(item, *rest)``; with one item the rest is the same every time, but for messages."""
        for known, result in self._kept:
            if known() is item:
                return result
        result = self._function(item, *rest)
        self._kept.append((ref(item), result))
        return result


_recent_roots, _recent_shrunk = Recent(root_and_inverse), Recent(shrink)


@dataclass(frozen=True, eq=False)
class RegionAnalysis:
    """A region, its weights in canonical (out, in) orientation, and the metric of each.

    Attributes:
        known_spectrum: that of a saved analysis.
        directions: E[x̄ x̄ᵀ] of the input scaled to norm 1, (in, in), where `calibrate` was asked for it.
    """

    region: Region
    weights: Weights
    metrics: Mapping[str, Metric]
    known_spectrum: Spectrum | None = None
    directions: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """(Σ out, in): the weights one below the other; of a region of one site that site's weight."""
        weights = list(self.weights.values())
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    @property
    def metric(self) -> Metric:
        """The metric of `weight`: the sites share A, their G stand along a diagonal.

        Sites of a ``stack`` have inputs of their own: there it is that of the mean A.
        """
        if len(self.weights) == 1:
            return self.metrics[next(iter(self.weights))]
        joint: Metric = _recent_joint(self)
        return joint

    @property
    def stacked(self) -> Tensor:
        """(sites, out, in): the weights of sites of one shape, in float64 where they are, else in float32."""
        weights = torch.stack([require_finite(weight, name) for name, weight in self.weights.items()])
        return weights.to(working_dtype(weights))

    def stacked_gradient(self) -> Callable[[Tensor], Tensor]:
        """ΔW (sites, out, in) -> scale_i · G_i ΔW_i A_i for each site i: half the gradient of the loss."""
        metrics = [self.metrics[name] for name in self.weights]

        def gradient(change: Tensor) -> Tensor:
            return torch.stack([m.scale * m.gradient(part) for m, part in zip(metrics, change, strict=True)])

        return gradient

    def stacked_loss(self, change: Tensor) -> float:
        """Σ_i scale_i · tr(G_i ΔW_i A_i ΔW_iᵀ)."""
        return sum(self.metrics[name].loss(part) for name, part in zip(self.weights, change, strict=True))

    @property
    def spectrum(self) -> Spectrum:
        """The two-sided spectrum: the one given (a saved analysis'), else that of `truncation`."""
        return self.known_spectrum or self.truncation.spectrum

    @cached_property
    def truncation(self) -> Truncation:
        """The two-sided truncation of `weight`."""
        return truncate(self.weight, self.metric, self.region.name)

    def truncation_under(self, weighting: Weighting, power: float = 1.0) -> Truncation:
        """The truncation under a part of the metric: both sides, one side, its diagonal^power, or neither."""
        if weighting == "two_sided":
            return self.truncation
        whole = self.metric
        kept = {
            "input": Metric(whole.input),
            "none": Metric(),
            "input_diagonal": Metric(diagonal_power(whole.input, power)),
        }
        return truncate(self.weight, kept[weighting], self.region.name)

    def losses_under(self, weighting: Weighting, power: float = 1.0) -> tuple[float, ...]:
        """What each rank 0, 1, .. of that truncation loses in the whole metric.

        What is cut is Σ_{i > r} l_i r_i, so the loss is Σ_{i, j > r} (l_iᵀ G l_j)(r_i A r_jᵀ): the sums over
        the trailing blocks of one matrix.
        """
        key = weighting, power
        if key not in self._losses:
            whole, cut = self.metric, self.truncation_under(weighting, power)
            left, right = cut.left.double(), cut.right.double()
            pairs = (left.T @ whole.left(left)) * (on_right(right, whole.input) @ right.T)
            blocks = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).clamp_min(0.0)
            self._losses[key] = (*(whole.scale * blocks).tolist(), 0.0)
        return self._losses[key]

    @cached_property
    def _losses(self) -> dict[tuple[Weighting, float], tuple[float, ...]]:
        return {}


def _joint(analysis: RegionAnalysis) -> Metric:
    """Metric of the weights one below the other: mean A, block-diagonal scale · G."""
    metrics = [analysis.metrics[name] for name in analysis.weights]
    inputs = [metric.input for metric in metrics if metric.input is not None]
    outputs = [
        metric.scale * (torch.ones(size) if metric.output is None else metric.output).double()
        for metric, size in zip(metrics, analysis.region.rows, strict=True)
    ]
    shared = inputs and all(one is inputs[0] for one in inputs)
    mean = inputs[0] if shared else torch.stack(inputs).mean(0) if inputs else None
    return Metric(mean, blocks=tuple(outputs))


# of few regions, as the blocks are larger than the weights
_recent_joint = Recent(_joint)


class MomentMetrics(Mapping[str, Metric]):
    """The metric of each weight, built from its moments when asked for: it is as large as the weights.

    A linear map has A and G. A table has as its (diagonal) G the share f of each row in what is read, and
    the G at what is read as its A: Σ_v f_v ΔW_v G ΔW_vᵀ per token. What is both has the nearest product.
    """

    def __init__(self, weights: Weights, moments: Moments) -> None:
        self._weights, self._moments = weights, moments

    def __getitem__(self, name: str) -> Metric:
        if name not in self._moments.lookups:
            return self._linear(name)
        if name not in self._moments.input_of:
            return self._table(name)
        return nearest_product(self._table(name), self._linear(name), self._weights[name].shape)

    def _linear(self, name: str) -> Metric:
        moments = self._moments
        inputs, outputs = moments.input_moment(name), moments.output_moment(name)
        if inputs is not None:
            inputs = _recent_shrunk(inputs, sampling_share(inputs, moments.tokens_at(name), INPUT_SHRINKAGE))
        return region_metric(self._weights[name], inputs, _shrunk_output(outputs, moments.loss_terms))

    def _table(self, name: str) -> Metric:
        moments = self._moments
        gradient = _shrunk_output(moments.lookup_outputs.get(name), moments.loss_terms)
        rows = moments.lookup_batches.get(name), moments.lookup_energies.get(name)
        shares = lookup_shares(moments.lookups[name], *rows)
        if gradient is not None:
            return Metric(gradient, shares)
        size = Metric(None, shares).loss(self._weights[name])
        return Metric(None, shares, 1.0 / size if size > 0.0 else 1.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _shrunk_output(moment: Tensor | None, terms: int) -> Tensor | None:
    return None if moment is None else shrink(moment, sampling_share(moment, terms, OUTPUT_SHRINKAGE))


def lookup_shares(counts: Tensor, batches: Tensor | None = None, energies: Tensor | None = None) -> Tensor:
    """f = (1 - a) e / Σe + a / V: the share of each of V rows in what the loss sees, none of them free.

    e is ``energies``, Σ ‖g‖² over the lookups of a row, or where there are none its ``counts``: a rare token
    says more than a frequent one. a is the share of new tokens to come: of those that no other token repeats
    (Good, 1953; Turing), or, as texts repeat themselves, that no other of several ``batches`` holds. It is
    spread evenly, as nearly all rows are unread, and is at least the shrinkage of any output.
    """
    seen = (counts if energies is None or not energies.any() else energies).double()
    total = seen.sum().clamp_min(torch.finfo(torch.float64).tiny)
    lone = counts == 1 if batches is None or not (batches > 1).any() else batches == 1
    unread = min(1.0, max(OUTPUT_SHRINKAGE, float((seen * lone).sum() / total)))
    return seen / total * (1.0 - unread) + unread / counts.numel()


def nearest_product(first: Metric, second: Metric, shape: tuple[int, ...]) -> Metric:
    """argmin over w, M of ‖v₁ ⊗ N₁ + v₂ ⊗ N₂ - w ⊗ M‖ for the metrics v ⊗ N of weights of ``shape``.

    A sum of two products is a matrix of rank two in Van Loan's (1993) rearrangement: its leading pair
    w = V a, M = N K a / (aᵀ K a) with K = VᵀV comes from the 2 x 2 problem (NᵀN) K a = σ² a, whose entries
    are not negative; so a is not either (Perron), and w and M stay positive.
    """
    rows, columns = shape
    outputs, inputs = [], []
    for metric in (first, second):
        side = torch.ones(rows) if metric.output is None else metric.output
        outputs.append(metric.scale * (side if side.dim() == 1 else side.diagonal()).double())
        inputs.append((torch.eye(columns) if metric.input is None else metric.input).double())
    norms = [part.norm().clamp_min(torch.finfo(torch.float64).tiny) for part in inputs]
    left = torch.stack([part * norm for part, norm in zip(outputs, norms, strict=True)], 1)
    right = torch.stack([(part / norm).flatten() for part, norm in zip(inputs, norms, strict=True)], 1)
    gram = left.T @ left
    step = right.T @ right @ gram
    mixture = _leading_vector(step / step.abs().max())
    weights = right @ (gram @ mixture) / (mixture @ gram @ mixture)
    return Metric(weights.reshape(columns, columns), left @ mixture)


def _leading_vector(matrix: Tensor) -> Tensor:
    """Eigenvector of the larger eigenvalue of a (2, 2) matrix of entries >= 0."""
    (a, b), (c, d) = matrix.tolist()
    largest = (a + d + math.sqrt((a - d) ** 2 + 4 * b * c)) / 2
    candidates = ((b, largest - a), (largest - d, c))
    best = max(candidates, key=lambda pair: math.hypot(*pair))
    return matrix.new_tensor(best if math.hypot(*best) > 0 else (1.0, 1.0))


def sampling_share(moment: Tensor, samples: int, least: float) -> float:
    """Share of shrinkage that the number of samples asks for: (tr M)² / (‖M‖² T), at least ``least``.

    That is Ledoit and Wolf's (2004) estimate E‖x xᵀ - M‖² / (T ‖M - m I‖²) for samples of equal norm,
    bounded from the matrix alone: few samples in many directions shrink much, many in few hardly. Of a
    diagonal, given as a vector, the same (Hausser and Strimmer, 2009).
    """
    wide = moment.double()
    trace = wide.sum() if wide.dim() == 1 else wide.trace()
    spread = float(trace**2 / wide.square().sum().clamp_min(torch.finfo(torch.float64).tiny))
    return min(1.0, max(least, spread / max(1, samples)))


def region_metric(weight: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Metric:
    """The metric of one weight from its shrunk moments; the scale makes a missing side comparable.

    Without G the form is the relative squared error of the output, without A also of the weight,
    so that sites still add up.
    """
    if outputs is not None:
        return Metric(inputs, outputs)
    size = Metric(inputs).loss(weight)
    return Metric(inputs, None, 1.0 / size if size > 0.0 else 1.0)
