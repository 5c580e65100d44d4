"""Every format that geofx knows: one file each, one entry here, one row in tests/factorization_cases.py."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from geofx.errors import ConfigError, PlanError
from geofx.factorizations.activation_subspace import ActivationSubspace as ActivationSubspace
from geofx.factorizations.block_tensor_train import BlockTensorTrain as BlockTensorTrain
from geofx.factorizations.block_term import BlockTerm as BlockTerm
from geofx.factorizations.butterfly import Butterfly as Butterfly
from geofx.factorizations.contract import Factored as Factored
from geofx.factorizations.contract import Factorization as Factorization
from geofx.factorizations.contract import Factors as Factors
from geofx.factorizations.contract import Growing as Growing
from geofx.factorizations.contract import Lookup as Lookup
from geofx.factorizations.contract import Narrowing as Narrowing
from geofx.factorizations.contract import Unfolding as Unfolding
from geofx.factorizations.contract import factor_name as factor_name
from geofx.factorizations.cp import CP as CP
from geofx.factorizations.dense import Dense as Dense
from geofx.factorizations.dropped_units import DroppedUnits as DroppedUnits
from geofx.factorizations.gauge_fixed import GaugeFixed as GaugeFixed
from geofx.factorizations.group_reduce import GroupReduce as GroupReduce
from geofx.factorizations.hybrid import Hybrid as Hybrid
from geofx.factorizations.kronecker import Kronecker as Kronecker
from geofx.factorizations.low_rank import LowRank as LowRank
from geofx.factorizations.low_rank_plus_sparse import LowRankPlusSparse as LowRankPlusSparse
from geofx.factorizations.monarch import Monarch as Monarch
from geofx.factorizations.shared_basis import SharedBasis as SharedBasis
from geofx.factorizations.shared_weight import SharedWeight as SharedWeight
from geofx.factorizations.tensor_train import TensorTrain as TensorTrain
from geofx.factorizations.token_mps import TokenMPS as TokenMPS
from geofx.factorizations.tucker import Tucker as Tucker

FACTORIZATIONS: tuple[type[Factorization], ...] = (
    Dense,
    LowRank,
    GaugeFixed,
    ActivationSubspace,
    LowRankPlusSparse,
    Kronecker,
    Monarch,
    BlockTensorTrain,
    Butterfly,
    TensorTrain,
    Tucker,
    CP,
    BlockTerm,
    Hybrid,
    SharedBasis,
    SharedWeight,
    DroppedUnits,
    GroupReduce,
    TokenMPS,
)

T = TypeVar("T", bound=Factorization)

_REGISTERED: dict[str, type[Factorization]] = {}


def register(member: type[T]) -> type[T]:
    """Make a format of one's own known by name, to plans and to saved results; a class decorator.

    It is planned with where it is named: ``analysis.plan(budget, formats=["low_rank", MyFormat])``. What
    holds it is read only where it has been registered. A class of the same name takes the earlier one's
    place.

    Raises:
        ConfigError: it is no frozen dataclass, lacks a part of `Factorization`, or has the name of one of
            geofx's formats.
    """
    contract = (*Factorization.__annotations__, *vars(Factorization))
    lacking = [name for name in contract if name[0] != "_" and not hasattr(member, name)]
    if lacking:
        fix = "define it; geofx.factorizations.Factorization says what it is"
        raise ConfigError(f"the format lacks {', '.join(lacking)}", where=member.__qualname__, fix=fix)
    settings = getattr(member, "__dataclass_params__", None)
    if settings is None or not settings.frozen:
        fix = "put @dataclass(frozen=True) on it, below @register"
        raise ConfigError("a format is a frozen dataclass", where=member.__qualname__, fix=fix)
    if member.name in {known.name for known in FACTORIZATIONS}:
        raise ConfigError(
            f"geofx has a format {member.name!r}", where=member.__qualname__, fix="give it another name"
        )
    _REGISTERED[member.name] = member
    return member


def known_formats() -> tuple[type[Factorization], ...]:
    """geofx's own formats, then those that were registered."""
    return (*FACTORIZATIONS, *_REGISTERED.values())


def to_json(factorization: Factorization) -> dict[str, Any]:
    """``{"name": "low_rank", "rank": 64, ...}``, nested where a setting is a format; see `from_json`."""
    data: dict[str, Any] = {"name": factorization.name}
    for field in fields(factorization):  # type: ignore[arg-type]
        value = getattr(factorization, field.name)
        data[field.name] = to_json(value) if isinstance(value, Factorization) else value
    return data


def from_json(data: dict[str, Any], where: str = "") -> Factorization:
    """The format that ``data`` names, of `known_formats` only; parts of a sum are no sums.

    Raises:
        PlanError: unknown name, or settings that the format does not have.
    """
    return _read(data, where, known_formats())


def _read(data: Any, where: str, formats: tuple[type[Factorization], ...]) -> Factorization:
    known = {member.name: member for member in formats}
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in known:
        fix = f"use one of {', '.join(sorted(known))}, or register your own before it is read"
        raise PlanError(f"unknown factorization {name!r}", where=where, fix=fix)
    settings = {key: value for key, value in data.items() if key != "name"}
    unknown = sorted(settings.keys() - {field.name for field in fields(known[name])})  # type: ignore[arg-type]
    if unknown:
        raise PlanError(f"{name} has no setting {unknown[0]!r}", where=where, fix="remove it")
    parts = tuple(member for member in formats if member is not Hybrid)
    context = {"read": lambda part: _read(part, where, parts)}
    try:
        return TypeAdapter(known[name]).validate_json(json.dumps(settings), strict=True, context=context)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{name}: {field}: {first['msg']}", where=where, fix="mend the setting") from error
