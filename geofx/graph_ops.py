"""The closed set of functions that a saved graph may call; a name in a file is only ever looked up here."""

from __future__ import annotations

import builtins
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from geofx.errors import ArtifactCorruptError, ArtifactError

_OPERATORS = """getitem add sub mul floordiv truediv mod pow neg pos abs index and_ or_ xor invert not_
    lshift rshift eq ne lt le gt ge"""
_SYMBOLIC = "sym_not sym_and sym_or sym_float sym_int sym_max sym_min sym_ite sym_sum sym_sqrt"
_MATH, _BUILTIN = "ceil floor trunc sqrt log2", "max min round"
_MODULES = ((operator, _OPERATORS), (math, _MATH), (builtins, _BUILTIN), (torch, _SYMBOLIC))
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in _MODULES
    for name in names.split()
    if hasattr(module, name)
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}

_ATEN = re.compile(r"aten\.([A-Za-z_][A-Za-z0-9_]{0,99})\.([A-Za-z_][A-Za-z0-9_]{0,99})")
_DUNDER = re.compile(r"__i?(and|or|xor|lshift|rshift)__")
_PLAIN_TYPE = re.compile(
    r"(Optional\[|List\[)*(Tensor|number|int|float|bool|complex|str|Device|Generator)\]*"
)
# Files, the process's streams and random state, or memory that is not a tensor's own.
_DENIED = "from_file save warn manual_seed seed initial_seed set set_ set_data data backward record_stream"
# A leading underscore may stand for unchecked: only what tracing and decomposition emit.
_PRIVATE = """_adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async _assert_scalar _assert_tensor_metadata
    _conj _conj_physical _convolution _fft_c2c _fft_c2r _fft_r2c _fused_rms_norm _functional_assert_scalar
    _grouped_mm _int_mm _is_all_true _is_any_true _local_scalar_dense _log_softmax _native_batch_norm_legit
    _native_batch_norm_legit_no_training _neg_view _prelu_kernel _safe_softmax _scaled_mm _softmax
    _scaled_dot_product_attention_math _scaled_dot_product_efficient_attention
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _to_copy _trilinear
    _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _weight_norm"""
_DENIED_NAMES, _PRIVATE_NAMES = frozenset(_DENIED.split()), frozenset(_PRIVATE.split())


def function_name(target: Any, where: str) -> str:
    """The name under which `named_function` finds ``target``; ``where`` is the node that calls it.

    Raises:
        ArtifactError: it is outside the closed set.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        if _aten(name) is target:
            return name
    elif isinstance(target, Callable) and target in _NAMES:  # type: ignore[arg-type]
        return _NAMES[target]
    raise ArtifactError(
        f"the graph calls {target}, which a saved folder cannot hold",
        where=where,
        fix="only aten operators and integer arithmetic are saved; decompose or remove this call",
    )


def named_function(name: str) -> Callable[..., Any]:
    """The function called ``name`` in the closed set.

    Raises:
        ArtifactCorruptError: there is none.
    """
    found = _FUNCTIONS.get(name) or _aten(name)
    if found is None:
        raise ArtifactCorruptError(
            f"the graph calls {name[:120]!r}, which is not a tensor operator", where="graph.json"
        )
    return found


def _aten(name: str) -> torch._ops.OpOverload | None:
    match = _ATEN.fullmatch(name)
    if match is None or not _allowed(match[1]):
        return None
    overload = getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
    if not isinstance(overload, torch._ops.OpOverload):
        return None
    values = (*overload._schema.arguments, *overload._schema.returns)
    return overload if all(_PLAIN_TYPE.fullmatch(str(value.type)) for value in values) else None


def _allowed(operator_name: str) -> bool:
    if operator_name.startswith("__"):
        return _DUNDER.fullmatch(operator_name) is not None
    if operator_name.startswith("_"):
        return operator_name in _PRIVATE_NAMES
    return operator_name not in _DENIED_NAMES
