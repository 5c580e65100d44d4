"""Every format that geofx knows: one file each, one entry here, one row in tests/factorization_cases.py."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from geofx.errors import PlanError
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


def to_json(factorization: Factorization) -> dict[str, Any]:
    """``{"name": "low_rank", "rank": 64, ...}``, nested where a setting is a format; see `from_json`."""
    data: dict[str, Any] = {"name": factorization.name}
    for field in fields(factorization):  # type: ignore[arg-type]
        value = getattr(factorization, field.name)
        data[field.name] = to_json(value) if isinstance(value, Factorization) else value
    return data


def from_json(data: dict[str, Any], where: str = "") -> Factorization:
    """The format that ``data`` names, from this closed registry only; parts of a sum are no sums.

    Raises:
        PlanError: unknown name, or settings that the format does not have.
    """
    return _read(data, where, FACTORIZATIONS)


def _read(data: Any, where: str, formats: tuple[type[Factorization], ...]) -> Factorization:
    known = {member.name: member for member in formats}
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in known:
        raise PlanError(
            f"unknown factorization {name!r}", where=where, fix=f"use one of {', '.join(sorted(known))}"
        )
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
