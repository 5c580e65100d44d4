"""Tensors in one safetensors file; its header must be as expected before a byte is allocated."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geofx import strict_json
from geofx.errors import ArtifactCorruptError, ArtifactError, NumericsError

MAX_TENSORS = 100_000
_LENGTH_BYTES = 8
_CHUNK = 2**24
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` on the CPU, contiguous, none sharing memory with another.

    Raises:
        ArtifactError: one is sparse or of a type that the file cannot hold.
    """
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES.values():
            what = f"a {tensor.layout} tensor of {tensor.dtype} on {tensor.device.type} cannot be saved"
            raise ArtifactError(what, where=name, fix="convert it to a dense tensor of a common type")
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result


def require_finite(name: str, tensor: Tensor, *, allow_infinity: bool) -> None:
    """Check that ``tensor`` (contiguous) holds no NaN, and no infinity unless allowed.

    Raises:
        NumericsError: it does.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    for part in torch.split(tensor.view(-1), _CHUNK):
        values = part.float() if part.element_size() == 1 else part
        bad = torch.isnan(values) if allow_infinity else ~torch.isfinite(values)
        if bad.any():
            what = f"{int(bad.sum())} values are not finite"
            raise NumericsError(
                what, where=name, fix="nothing was saved; look at how this tensor was computed"
            )


def describe(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Name -> dtype and shape, as the manifest lists them."""
    return {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors``, made `storable`, and check that the same bits are read back.

    Raises:
        OSError: the disk is full.
        ArtifactError: the file could not be written, or does not read back.
    """
    try:
        save_file(dict(tensors), file)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error):
            raise OSError(errno.ENOSPC, "no space left on device") from error
        raise ArtifactError(f"cannot write the tensors: {error}", where=file.name) from error
    with safe_open(file, framework="pt") as stored:
        for name, tensor in tensors.items():
            if not torch.equal(
                stored.get_tensor(name).view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)
            ):
                raise ArtifactError(
                    "the tensor does not read back as it was written", where=name, fix="check the disk"
                )


def read_tensors(file: Path, expected: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors in ``file``, which must be exactly those of ``expected`` (as `describe` gives them).

    Raises:
        ArtifactCorruptError: names, types, shapes or sizes differ, or the file is not well formed.
    """
    found = _header(file)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            held, wanted = found.get(name, "nothing"), expected.get(name, "nothing")
            raise _corrupt(f"{file.name} holds {held}, and {wanted} is expected", name)
    try:
        with safe_open(file, framework="pt") as stored:  # copied: the map must not outlive the file
            return {name: stored.get_tensor(name).clone() for name in expected}
    except (SafetensorError, RuntimeError, OverflowError) as error:
        raise _corrupt(f"{file.name} is not well formed: {error}", file.name) from error


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Each tensor's dtype and shape; its offsets and size are checked by the library, on opening."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if length > min(size - _LENGTH_BYTES, strict_json.MAX_BYTES):
            raise _corrupt(f"{file.name} has a header of {length} bytes in a file of {size}", file.name)
        header = strict_json.loads(opened.read(length), file.name)
    try:
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"{len(header)} tensors")
        return {name: _entry(entry["dtype"], entry["shape"]) for name, entry in header.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _corrupt(f"{file.name} has a header that is not well formed: {error}", file.name) from error


def _entry(dtype: str, shape: list[int]) -> dict[str, Any]:
    return {"dtype": str(_DTYPES[dtype]).removeprefix("torch."), "shape": shape}


def _corrupt(what: str, where: str) -> ArtifactCorruptError:
    return ArtifactCorruptError(what, where=where, fix="take the file from its source again")
