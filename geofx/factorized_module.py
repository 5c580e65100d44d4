"""The user's eager module with factors in place of weights: y = apply(x, F) + b instead of y = x Wᵀ + b."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from geofx.errors import ConfigError
from geofx.factorizations import Dense, Factorization, Factors

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


class FactorizedLinear(nn.Module):
    """y = factorization.apply(x, factors) + bias, for x (..., in) and y (..., out).

    Factors are parameters (index tensors buffers) named ``{leaf}_{factor}``, as they are in the graph.

    Attributes:
        factorization: the format, whose `apply` is the forward.
        transposed: the dense weight was stored as (in, out).
    """

    bias: Tensor | None
    __jit_unused_properties__: ClassVar[list[str]] = ["factors", "weight"]

    def __init__(
        self,
        factorization: Factorization,
        factors: Factors,
        bias: Tensor | None = None,
        *,
        trainable: bool = True,
        transposed: bool = False,
        leaf: str = "weight",
    ) -> None:
        super().__init__()
        self.factorization, self.transposed = factorization, transposed
        self._attributes = {name: f"{leaf}_{name}" for name in factors}
        for name, value in factors.items():
            if value.is_floating_point():
                parameter = nn.Parameter(value.detach().clone(), requires_grad=trainable)
                self.register_parameter(self._attributes[name], parameter)
            else:
                self.register_buffer(self._attributes[name], value.clone())
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {name: getattr(self, attribute) for name, attribute in self._attributes.items()}

    @property
    def weight(self) -> Tensor:
        """The dense weight that the factors stand for, as it was stored; for code that looks at it."""
        dense = self.factorization.to_dense(self.factors)
        return dense.t() if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        """Apply the factors; ``x`` is (..., in)."""
        y = self.factorization.apply(x, self.factors)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """The format and the shapes of its factors."""
        shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in self.factors.items())
        return f"{self.factorization}, {shapes}, bias={self.bias is not None}"


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
    choices: Mapping[str, tuple[Factorization, Factors]],
    aliases: Mapping[str, str] | None = None,
) -> nn.Module:
    """A copy of ``model`` in which the chosen weights W are given by their factors; ``model`` is unchanged.

    Every module that holds a chosen weight is replaced wherever it occurs; the dense weights are neither
    copied nor kept. Training mode, ``requires_grad``, hooks and all other ties stay as they are.

    Args:
        model: the eager model.
        choices: weight name -> format and factors; `Dense` leaves the weight alone.
        aliases: further names of a weight -> its name in ``choices``.

    Raises:
        ConfigError: a name is not a weight of ``model``, or its module is not a plain linear map.
    """
    memo: dict[int, Any] = {}
    owners = list(_owners(model))
    for name, (factorization, factors) in choices.items():
        if isinstance(factorization, Dense):
            continue
        weight = _find_weight(owners, name, aliases or {})
        for owner in owners:
            if owner.tensor is weight and id(owner.module) not in memo:
                memo[id(owner.module)] = _replacement(owner, factorization, factors, memo)
    return copy.deepcopy(model, memo)


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


def _replacement(
    owner: _Owner, factorization: Factorization, factors: Factors, memo: dict[int, Any]
) -> FactorizedLinear:
    weight = owner.tensor
    result = FactorizedLinear(
        factorization,
        {name: part.to(weight.device) for name, part in factors.items()},
        copy.deepcopy(owner.bias, memo),  # the memo keeps a bias tied that is tied
        trainable=weight.requires_grad,
        transposed=_is_transposed(owner),
        leaf=owner.leaf,
    )
    for hooks in _HOOKS:
        getattr(result, hooks).update(getattr(owner.module, hooks))
    return result.train(owner.module.training)


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
        f"module {owner.path!r} of class {type(owner.module).__name__} is not a plain linear map",
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
