"""Published methods by name: which formats and weights, how a budget is shared out, and what differs here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import get_args

from geofx import papers
from geofx.errors import ConfigError
from geofx.factorizations.activation_subspace import Criterion
from geofx.method import Form, Method
from geofx.papers import Paper
from geofx.patterns import nearest
from geofx.region import TABLES, RegionKind

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
EMBEDDINGS: tuple[RegionKind, ...] = tuple(sorted(TABLES))
ASVD_POWER = 0.5
METRIC = "fitted in the metric of the loss, starting from the paper's projection, and not trained afterwards"


@dataclass(frozen=True, kw_only=True)
class Recipe(Method):
    """A method of the literature.

    Attributes:
        differs: a sentence on what geofx does otherwise than the paper.
    """

    paper: Paper
    differs: str


def svd() -> Recipe:
    """Truncated SVD, the same share of every matrix."""
    return Recipe(
        "svd",
        (Form.of("low_rank", weighting="none"),),
        paper=papers.SVD,
        differs="No distillation follows.",
    )


def svd_llm() -> Recipe:
    """SVD of W L with L Lᵀ = E[x xᵀ], the same share of every matrix."""
    return Recipe(
        "svd_llm",
        (Form.of("low_rank", weighting="input"),),
        paper=papers.SVD_LLM,
        differs="E[x xᵀ] is that of the original model, shrunk a little; no update and no LoRA follow.",
    )


def drone() -> Recipe:
    """The optimum that SVD-LLM has too, with ranks by what each matrix adds to the loss."""
    return Recipe(
        "drone",
        (Form.of("low_rank", weighting="input"),),
        allocation="planned",
        paper=papers.DRONE,
        differs="Ranks come from one exact plan, not from a greedy search; no distillation follows.",
    )


def asvd(power: float = ASVD_POWER) -> Recipe:
    """SVD of W S with S = diag(rms x)^power, ranks by sensitivity."""
    return Recipe(
        "asvd" if power == ASVD_POWER else f"asvd-{power:g}",
        (Form.of("low_rank", weighting="input_diagonal", power=power),),
        allocation="planned",
        paper=papers.ASVD,
        differs="S holds the root mean square, not mean |x|; ranks are planned, not searched by perplexity.",
    )


def fwsvd() -> Recipe:
    """SVD of W D with D² the Fisher information of each input, the same share of every matrix."""
    return Recipe(
        "fwsvd",
        (Form.of("low_rank", weighting="input_diagonal", power=1.0),),
        paper=papers.FWSVD,
        differs="The information of input j is A_jj tr G, x and g taken as independent; not finetuned.",
    )


def pifa() -> Recipe:
    """Low rank whose pivot rows stand for themselves: r² fewer numbers at rank r."""
    return Recipe(
        "pifa",
        (Form.of("gauge_fixed", rows="pivoted"),),
        paper=papers.PIFA,
        differs="The truncation is the two-sided one; the sequential reconstruction M does not follow.",
    )


def espace(criterion: Criterion = "best") -> Recipe:
    """x ≈ P Pᵀ x with P static and orthonormal, by one of six criteria or the best at each site."""
    if criterion not in CRITERIA:
        raise ConfigError(f"unknown criterion {criterion!r}", fix=f"use one of {', '.join(CRITERIA)}")
    return Recipe(
        f"espace-{criterion}",
        (Form.of("activation_subspace", criterion=criterion),),
        paper=papers.ESPACE,
        differs="The best criterion is that of the least predicted loss; no retraining follows.",
    )


def kronecker_gpt() -> Recipe:
    """W ≈ Σ A ⊗ B, the same share of every matrix."""
    return Recipe(
        "kronecker_gpt",
        (Form.of("kronecker"),),
        paper=papers.KRONECKER_GPT,
        differs=f"As many terms as the share has room for, the embedding as it is; {METRIC}.",
    )


def kronecker_bert() -> Recipe:
    """W ≈ A ⊗ B, one term."""
    return Recipe(
        "kronecker_bert",
        (Form.of("kronecker", terms=1),),
        allocation="planned",
        paper=papers.KRONECKER_BERT,
        differs=f"Only as many matrices as the budget asks for, the embedding as it is; {METRIC}.",
    )


def monarch() -> Recipe:
    """Block-diagonal, permutation, block-diagonal."""
    return Recipe(
        "monarch",
        (Form.of("monarch"),),
        paper=papers.MONARCH,
        differs=f"Blocks of any rank, and weights that are not square; {METRIC}.",
    )


def butterfly() -> Recipe:
    """A product of block factors of logarithmic depth."""
    return Recipe(
        "butterfly",
        (Form.of("butterfly"),),
        paper=papers.BUTTERFLY,
        differs=f"Blocks in place of scalars, so that any share can be kept; {METRIC}.",
    )


def btt() -> Recipe:
    """Two batched products of blocks: a block tensor train."""
    return Recipe(
        "btt",
        (Form.of("block_tensor_train"),),
        paper=papers.BTT,
        differs=f"A projection of trained weights, where the paper trains from scratch; {METRIC}.",
    )


def mpo() -> Recipe:
    """Matrix product operators, the same share of every matrix."""
    return Recipe(
        "mpo",
        (Form.of("tensor_train"),),
        paper=papers.MPO,
        differs=f"No tensor is singled out for tuning; {METRIC}.",
    )


def tt_gpt2() -> Recipe:
    """Tensor-train matrices where they cost least."""
    return Recipe(
        "tt_gpt2",
        (Form.of("tensor_train"),),
        allocation="planned",
        paper=papers.TT_GPT2,
        differs=f"Any matmul may be rewritten, not the fully connected ones alone; {METRIC}.",
    )


def tt_embedding() -> Recipe:
    """The embedding as a tensor-train matrix."""
    return Recipe(
        "tt_embedding",
        (Form.of("tensor_train"),),
        kinds=EMBEDDINGS,
        paper=papers.TT_EMBEDDING,
        differs=f"A projection of a trained table, where the paper trains from scratch; {METRIC}.",
    )


def tensorgpt(rank: int = 4) -> Recipe:
    """Each token's row, folded, as a matrix product state of its own."""
    return Recipe(
        f"tensorgpt-{rank}",
        (Form.of("token_mps", rank=rank, weighting="none"),),
        kinds=("embedding",),
        paper=papers.TENSORGPT,
        differs="One bound on the rank for all rows, and a table that is the head too is left alone.",
    )


def group_reduce() -> Recipe:
    """Low rank per group of tokens of like frequency, weighted by frequency."""
    return Recipe(
        "group_reduce",
        (Form.of("group_reduce"),),
        kinds=EMBEDDINGS,
        paper=papers.GROUP_REDUCE,
        differs="Frequencies are those of the calibration text; no retraining follows.",
    )


def basis_sharing() -> Recipe:
    """A basis that the same matrix of two neighbouring layers shares."""
    return Recipe(
        "basis_sharing",
        (Form.of("shared_basis"),),
        kinds=("stack",),
        layers=2,
        paper=papers.BASIS_SHARING,
        differs=f"Output and down projections share too, which the paper leaves alone; {METRIC}.",
    )


def albert() -> Recipe:
    """Layers that share one weight, and a table of low rank."""
    return Recipe(
        "albert",
        (
            Form.of("shared_weight"),
            Form.of("low_rank"),
        ),
        kinds=("stack", *EMBEDDINGS),
        allocation="planned",
        paper=papers.ALBERT,
        differs="Only as many layers share as the budget asks for, and none is trained as in the paper.",
    )


def wang_tucker() -> Recipe:
    """The same matrix of all layers as one tensor, in Tucker form."""
    return Recipe(
        "wang_tucker",
        (Form.of("tucker"),),
        kinds=("stack",),
        paper=papers.EXTREME,
        differs=f"One tensor per kind of matrix, where the paper stacks all kinds of one shape; {METRIC}.",
    )


def wang_tt() -> Recipe:
    """The same matrix of all layers as one tensor, as a tensor train."""
    return Recipe(
        "wang_tt",
        (Form.of("tensor_train"),),
        kinds=("stack",),
        paper=papers.EXTREME,
        differs=f"One tensor per kind of matrix, where the paper stacks all kinds of one shape; {METRIC}.",
    )


def tensorized_transformer() -> Recipe:
    """Block terms over the attention heads."""
    return Recipe(
        "tensorized_transformer",
        (Form.of("block_term"),),
        paper=papers.TENSORIZED_TRANSFORMER,
        differs=f"Heads of trained weights share factors, attention itself is computed as before; {METRIC}.",
    )


def tuformer() -> Recipe:
    """Block terms over the attention heads, where they cost least."""
    return Recipe(
        "tuformer",
        (Form.of("block_term"),),
        allocation="planned",
        paper=papers.TUFORMER,
        differs=f"The heads' number stays, so that the weights alone are rewritten; {METRIC}.",
    )


def hypoformer() -> Recipe:
    """The sum of a tensor train and a matrix of low rank."""
    return Recipe(
        "hypoformer",
        (Form.of("hybrid"),),
        paper=papers.HYPOFORMER,
        differs=f"A projection of trained weights, where the paper trains from scratch; {METRIC}.",
    )


def losparse() -> Recipe:
    """The sum of a matrix of low rank and a sparse one."""
    return Recipe(
        "losparse",
        (Form.of("low_rank_plus_sparse"),),
        paper=papers.LOSPARSE,
        differs=f"The sparse part is chosen once, not pruned step by step in training; {METRIC}.",
    )


def cp() -> Recipe:
    """A sum of rank-one tensors over the folded matrix."""
    return Recipe(
        "cp",
        (Form.of("cp"),),
        paper=papers.CP,
        differs=f"Matrices are folded to higher order, the paper's convolutions are so already; {METRIC}.",
    )


def tucker() -> Recipe:
    """A core and a factor per order of the folded matrix."""
    return Recipe(
        "tucker",
        (Form.of("tucker"),),
        paper=papers.EXTREME,
        differs=f"Every matrix on its own, the paper stacks layers; {METRIC}.",
    )


RECIPES: tuple[Callable[[], Recipe], ...] = (
    svd,
    svd_llm,
    drone,
    asvd,
    fwsvd,
    pifa,
    espace,
    kronecker_gpt,
    kronecker_bert,
    monarch,
    butterfly,
    btt,
    mpo,
    tt_gpt2,
    tt_embedding,
    tensorgpt,
    group_reduce,
    basis_sharing,
    albert,
    wang_tucker,
    wang_tt,
    tensorized_transformer,
    tuformer,
    hypoformer,
    losparse,
    cp,
    tucker,
)


def all() -> tuple[Recipe, ...]:
    """Every recipe, with its default settings; `espace` by each of its criteria."""
    others = [make() for make in RECIPES if make is not espace]
    return (*others, *(espace(criterion) for criterion in CRITERIA))


def named(names: Iterable[str]) -> tuple[Recipe, ...]:
    """The recipes of these names, such as ``svd_llm`` or ``espace-nl_mse``.

    Raises:
        ConfigError: a name is not that of a recipe.
    """
    known = {recipe.name: recipe for recipe in all()}
    wanted = tuple(names)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"no recipe {name!r}", fix=f"the nearest are {nearest(name, known)}")
    return tuple(known[name] for name in wanted)
