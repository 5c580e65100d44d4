"""The user's eager module with factors in place of weights: y = apply(x, F) + b instead of y = x Wᵀ + b."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from geofx.errors import ConfigError
from geofx.factorizations import Dense, Factored, Factorization, Factors, Growing, Lookup, Narrowing
from geofx.factorizations.contract import of_site

PROBE_SHAPE = (2, 3)
"""Leading dimensions of the random input that tells whether a module is a linear map."""

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


class _Derived(Tensor):
    """A product of factors: what is written into it would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The values."""
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ConfigError(
            "a factorized weight cannot be written: it is computed from its factors",
            where=f"shape {tuple(self.shape)}",
            fix="keep adapters apart from the model, or train the factors",
        )


class FactorizedLayer(nn.Module):
    """A layer whose weight is given by factors: what `FactorizedLinear` and `FactorizedEmbedding` share.

    Factors are parameters (index tensors buffers) named as in the graph, ``{leaf}_{factor}``; those that
    several sites of a region share are one parameter, held by each of their layers. A layer knows only its
    own site, so it runs the format as for the first of a region: ``left@2`` of the region is its ``left``.

    Attributes:
        factorization: the format.
        transposed: the dense weight was stored as (in, out).
        leaf: the name that the dense weight had here.
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["factors", "weight"]

    def __init__(
        self,
        factorization: Factorization,
        factors: Factors,
        *,
        site: int = 0,
        trainable: bool = True,
        transposed: bool = False,
        leaf: str = "weight",
    ) -> None:
        nn.Module.__init__(self)
        self.transposed, self.leaf, self._attributes = transposed, leaf, dict[str, str]()
        belonging = {name: part for name, part in factors.items() if _belongs(name, site, factors)}
        own = {name.partition("@")[0]: part for name, part in belonging.items()}
        self.become(factorization, own, trainable=trainable)

    def become(
        self,
        factorization: Factorization,
        factors: Factors,
        static: Iterable[str] = (),
        *,
        trainable: bool = True,
    ) -> None:
        """Hold these factors in the place of those that are held; the ``static`` ones are buffers."""
        for attribute in self._attributes.values():
            delattr(self, attribute)
        self.factorization = factorization
        self._attributes = {name: f"{self.leaf}_{name}" for name in factors}
        for name, value in factors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(self._attributes[name], value)
            elif value.is_floating_point() and name not in static:
                parameter = nn.Parameter(value.detach().clone(), requires_grad=trainable)
                self.register_parameter(self._attributes[name], parameter)
            else:
                self.register_buffer(self._attributes[name], value.detach().clone())

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name: the shared ones and those of this site, without its number."""
        return {name: getattr(self, attribute) for name, attribute in self._attributes.items()}

    @property
    def weight(self) -> Tensor:
        """A copy of the weight that the factors stand for, as it was stored; for code that looks at it."""
        dense = self.factorization.to_dense(self.factors)
        return (dense.t() if self.transposed else dense).clone().as_subclass(_Derived)

    def extra_repr(self) -> str:
        """The format and the shapes of its factors."""
        shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in self.factors.items())
        return f"{self.factorization}, {shapes}"


class FactorizedLinear(FactorizedLayer, nn.Linear):  # type: ignore[override]
    """y = factorization.apply(x, factors) + bias, for x (..., in) and y (..., out).

    An nn.Linear to code that looks for such (adapters, for instance), though its ``weight`` can only be read.
    """

    bias: Tensor | None  # type: ignore[assignment]

    def __init__(
        self,
        factorization: Factorization,
        factors: Factors,
        bias: Tensor | None = None,
        *,
        shape: tuple[int, int],
        **layer: Any,
    ) -> None:
        FactorizedLayer.__init__(self, factorization, factors, **layer)
        self.out_features, self.in_features = shape
        self.narrows_bias = bias is not None and bias.shape[0] != shape[0]
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the factors; ``x`` is (..., in)."""
        y = self.factorization.apply(x, self.factors)
        return y if self.bias is None else y + self._bias()

    def _bias(self) -> Tensor:
        assert self.bias is not None
        if self.narrows_bias:
            assert isinstance(self.factorization, Narrowing)
            return self.factorization.narrow_bias(self.bias, self.factors)
        return self.bias


class FactorizedEmbedding(FactorizedLayer):
    """y = factorization.lookup(ids, factors): rows of the table, built for the asked ids only."""

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``ids``, integers of any shape; returns (..., dim)."""
        assert isinstance(self.factorization, Lookup)
        return self.factorization.lookup(ids, self.factors)

    def add_tokens(self, rows: Tensor) -> None:
        """Grow the vocabulary by ``rows`` (n, dim); what is stored is neither read nor copied.

        Raises:
            ConfigError: the format does not store each row on its own.
        """
        if not isinstance(self.factorization, Growing):
            raise ConfigError(f"a table as {self.factorization.name} cannot grow", fix="use token_mps")
        self.factorization, grown = self.factorization.add_tokens(self.factors, rows)
        for name in grown.keys() - self._attributes.keys():
            self._attributes[name] = f"{self.leaf}_{name}"
            self.register_parameter(self._attributes[name], nn.Parameter(grown[name]))


def _belongs(factor: str, site: int, factors: Factors) -> bool:
    """Whether a site needs a factor: all need a shared one, only the third ``left@2``."""
    name, _, owner = factor.partition("@")
    is_shared = of_site(name, 1) not in factors
    return is_shared or int(owner or 0) == site


@dataclass(frozen=True)
class _Owner:
    path: str
    module: nn.Module
    leaf: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.leaf)  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None


def factorize_module(
    model: nn.Module,
    choices: Iterable[Factored],
    aliases: Mapping[str, str] | None = None,
) -> nn.Module:
    """A copy of ``model`` in which the chosen weights W are given by their factors; ``model`` is unchanged.

    Every module that holds a chosen weight is replaced wherever it occurs; the dense weights are neither
    copied nor kept. Training mode, ``requires_grad``, hooks and all other ties stay as they are, and factors
    that several layers share are tied.

    Args:
        model: the eager model.
        choices: formats, factors and the names of the weights; `Dense` leaves its weights alone.
        aliases: further names of a weight -> its name in ``choices``.

    Raises:
        ConfigError: a name is not a weight of ``model``, or its module is neither a plain linear map nor a
            plain lookup.
    """
    memo: dict[int, Any] = {}
    owners = list(_owners(model))
    for factored in choices:
        if isinstance(factored.factorization, Dense):
            continue
        weights = [_find_weight(owners, name, aliases or {}) for name in factored.weights]
        tied = replace(factored, factors=_fresh(factored.factors, weights[0]))
        for site, weight in enumerate(weights):
            for owner in owners:
                if owner.tensor is weight and id(owner.module) not in memo:
                    memo[id(owner.module)] = _replacement(owner, tied, site, memo)
    return copy.deepcopy(model, memo)


def _fresh(factors: Factors, like: Tensor) -> Factors:
    """Copies on the weight's device, parameters where floating point, so that layers can share them."""
    copies = {name: part.detach().to(like.device, copy=True) for name, part in factors.items()}
    return {
        name: nn.Parameter(part, requires_grad=like.requires_grad) if part.is_floating_point() else part
        for name, part in copies.items()
    }


def _owners(model: nn.Module) -> Iterator[_Owner]:
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                yield _Owner(path, module, leaf)


def _find_weight(owners: list[_Owner], name: str, aliases: Mapping[str, str]) -> Tensor:
    names = {name, *(alias for alias, target in aliases.items() if target == name)}
    found = [owner.tensor for owner in owners if f"{owner.path}.{owner.leaf}".lstrip(".") in names]
    if not found:
        raise ConfigError(f"the model has no weight {name!r}", fix="use the model that the plan was made for")
    return found[0]


def _replacement(owner: _Owner, factored: Factored, site: int, memo: dict[int, Any]) -> FactorizedLayer:
    form, factors = factored.factorization, factored.factors
    result: FactorizedLayer
    if isinstance(form, Lookup) and _looks_up(owner):
        result = FactorizedEmbedding(form, factors, site=site, leaf=owner.leaf)
    else:
        transposed = _is_transposed(owner)
        bias = copy.deepcopy(owner.bias, memo)  # the memo keeps a bias tied that is tied
        result = FactorizedLinear(
            form,
            factors,
            bias,
            shape=_narrowed(
                form, owner.tensor.shape[:: -1 if transposed else 1], site, len(factored.weights)
            ),
            site=site,
            transposed=transposed,
            leaf=owner.leaf,
        )
    for hooks in _HOOKS:
        getattr(result, hooks).update(getattr(owner.module, hooks))
    return result.train(owner.module.training)


def _narrowed(form: Factorization, shape: tuple[int, ...], site: int, sites: int) -> tuple[int, int]:
    """(out, in) of what is left of a weight of ``shape``."""
    rows, columns = shape
    if isinstance(form, Narrowing):
        outputs, inputs = form.kept_outputs(site, sites), form.kept_inputs(site, sites)
        rows = rows if outputs is None else len(outputs)
        columns = columns if inputs is None else len(inputs)
    return rows, columns


@torch.no_grad()
def _looks_up(owner: _Owner) -> bool:
    """Whether the module computes W[ids] and holds nothing else."""
    table = owner.tensor
    renormalizes = getattr(owner.module, "max_norm", None) is not None  # in place: it must not see the probe
    if table.dim() != 2 or len(owner.module.state_dict()) != 1 or renormalizes:
        return False
    ids = torch.arange(6).reshape(PROBE_SHAPE) * 7919 % table.shape[0]
    try:
        actual = owner.module.forward(ids.to(table.device))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(actual, Tensor) and torch.equal(actual, table[ids])


def _is_transposed(owner: _Owner) -> bool:
    """False where the module computes x Wᵀ + b, True where x W + b.

    Raises:
        ConfigError: it computes neither, or holds tensors that are neither W nor b.
    """
    known = {id(owner.tensor), id(owner.bias)}
    others = [
        name for name, value in owner.module.state_dict(keep_vars=True).items() if id(value) not in known
    ]
    if owner.tensor.dim() == 2 and owner.tensor.is_floating_point() and not others:
        for transposed in (False, True):
            if _computes_linear(owner, transposed):
                return transposed
    also = f", also holds {others[0]}" if others else ""
    raise ConfigError(
        f"module {owner.path!r} of class {type(owner.module).__name__} "
        "is neither a plain linear map nor a lookup",
        where=f"{owner.leaf}, shape {tuple(owner.tensor.shape)}{also}",
        fix="add its weight to `ignore`, or merge adapters and parametrizations first",
    )


@torch.no_grad()
def _computes_linear(owner: _Owner, transposed: bool) -> bool:
    weight = owner.tensor.t() if transposed else owner.tensor
    random = torch.Generator().manual_seed(0)
    x = torch.randn(*PROBE_SHAPE, weight.shape[1], generator=random).to(weight)
    try:
        expected = functional.linear(x, weight, owner.bias)
        actual = owner.module.forward(x)  # not __call__: the user's hooks must not see the probe
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    tolerance = 64 * torch.finfo(weight.dtype).eps * float(expected.abs().max())
    return float((actual - expected).abs().max()) <= tolerance
