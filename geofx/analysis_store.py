"""An analysis on disk: moments, spectra and held-out batches, for any number of budgets later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor

from geofx import strict_json
from geofx.batches import Batch
from geofx.errors import ArtifactCorruptError, ArtifactVersionError, GeofxError
from geofx.folder import MANIFEST, real_folder, write_folder
from geofx.graph_json import constant_from_json, constant_to_json
from geofx.linalg import pack_symmetric, unpack_symmetric
from geofx.moments import Mode, Moments
from geofx.objective import NextToken, Objective, SquaredError
from geofx.spectrum import Spectrum
from geofx.tensor_file import describe, read_tensors, storable, write_tensors

TENSORS = "analysis.safetensors"
SCHEMA_VERSION = 1
_BY_ROW = ("lookups", "lookup_batches", "lookup_energies")


_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError)


@dataclass(frozen=True)
class _Meta:
    """The manifest of an analysis folder."""

    schema_version: int
    model_hash: str
    objective: str
    seed: int
    ids: str
    mode: Mode
    unit: str
    input_of: dict[str, str]
    tokens: dict[str, int]
    loss_terms: int
    dropped: dict[str, int]
    holdout_is_calibration: bool
    refines: bool
    loss_ratio: float
    constants: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    files: dict[str, dict[str, str]]

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, eq=False)
class StoredAnalysis:
    """What an analysis folder holds.

    Attributes:
        objective: None, on reading, where it was a loss of the user's own.
    """

    model_hash: str
    moments: Moments
    spectra: Mapping[str, Spectrum]
    example: Batch
    holdout: list[Batch]
    holdout_is_calibration: bool
    objective: Objective | None
    validation: list[Batch] = field(default_factory=list)
    calibration: list[Batch] = field(default_factory=list)
    written: list[Batch] = field(default_factory=list)
    refines: bool = False
    loss_ratio: float = 1.0


@dataclass(frozen=True)
class Heading:
    """What can be told of an analysis folder before its tensors are read.

    Attributes:
        held_out: whether it has batches to measure results on.
    """

    mode: Mode
    held_out: bool


def save_analysis(analysis: StoredAnalysis, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the folder ``path``: symmetric matrices as triangles, hashed, all or nothing.

    It holds the example and the batches that later budgets are refined, validated and verified on.

    Raises:
        ArtifactError, ResourceError: the folder cannot be written, or a batch holds more than plain data.
    """
    tensors = storable(_tensors_of(analysis))
    moments = analysis.moments
    meta = {
        "schema_version": SCHEMA_VERSION,
        "model_hash": analysis.model_hash,
        "objective": type(analysis.objective).__name__,
        "seed": getattr(analysis.objective, "seed", 0),
        "ids": getattr(analysis.objective, "ids", ""),
        "mode": moments.mode,
        "unit": moments.unit,
        "input_of": dict(moments.input_of),
        "tokens": dict(moments.tokens),
        "loss_terms": moments.loss_terms,
        "dropped": dict(moments.dropped),
        "holdout_is_calibration": analysis.holdout_is_calibration,
        "refines": analysis.refines,
        "loss_ratio": analysis.loss_ratio,
        "constants": {
            name: constant_to_json(value, name)
            for name, value in _batch_values(analysis)
            if not isinstance(value, Tensor)
        },
        "tensors": describe(tensors),
    }

    def manifest(file: Path) -> None:
        digest = hashlib.sha256((file.parent / TENSORS).read_bytes()).hexdigest()
        file.write_text(strict_json.dumps({**meta, "files": {TENSORS: {"sha256": digest}}}), encoding="utf-8")

    files = {TENSORS: lambda file: write_tensors(file, tensors), MANIFEST: manifest}
    return write_folder(
        path, files, overwrite=overwrite, needed_bytes=sum(part.nbytes for part in tensors.values())
    )


def read_analysis(path: str | Path) -> StoredAnalysis:
    """What `save_analysis` wrote, hash checked; ``objective`` is None where it was a loss of the user's own.

    Raises:
        ArtifactVersionError: a newer geofx wrote it.
        ArtifactCorruptError: the folder is damaged.
    """
    root = real_folder(path)
    with _typed_errors(root):
        return _stored(*_read(root))


def read_heading(path: str | Path) -> Heading:
    """From the manifest alone, which no hash covers: `read_analysis` checks the rest.

    Raises:
        ArtifactVersionError: a newer geofx wrote it.
        ArtifactCorruptError: it is no analysis.
    """
    root = real_folder(path)
    with _typed_errors(root):
        meta = _meta(root)
        return Heading(meta.mode, bool(_group({**meta.tensors, **meta.constants}, "holdout")))


@contextmanager
def _typed_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except GeofxError:
        raise
    except _MALFORMED as error:
        reason = " ".join(str(error).split())[:200]
        what = f"not a saved analysis: {type(error).__name__}: {reason}"
        raise ArtifactCorruptError(what, where=str(root), fix="analyze again") from error


def _stored(meta: _Meta, stored: Mapping[str, Tensor]) -> StoredAnalysis:
    kinds: dict[str, Objective] = {
        NextToken.__name__: NextToken(meta.ids),
        SquaredError.__name__: SquaredError(meta.seed),
    }
    constants = {name: constant_from_json(value) for name, value in meta.constants.items()}
    (example,) = _batches({**stored, **constants}, "example")
    return StoredAnalysis(
        model_hash=meta.model_hash,
        moments=_moments(meta, stored),
        spectra={name: Spectrum(value.numpy()) for name, value in _group(stored, "spectrum").items()},
        example=example,
        holdout=_batches({**stored, **constants}, "holdout"),
        holdout_is_calibration=meta.holdout_is_calibration,
        validation=_batches({**stored, **constants}, "validation"),
        calibration=_batches({**stored, **constants}, "calibration"),
        written=_batches({**stored, **constants}, "written"),
        refines=meta.refines,
        loss_ratio=meta.loss_ratio,
        objective=kinds.get(meta.objective),
    )


def _tensors_of(analysis: StoredAnalysis) -> dict[str, Tensor]:
    moments = analysis.moments
    found = {f"input/{key}": pack_symmetric(value) for key, value in moments.inputs.items()}
    for key, value in moments.outputs.items():
        whole = value.dim() == 2
        found[f"{'output' if whole else 'output_diagonal'}/{key}"] = pack_symmetric(value) if whole else value
    for rows in _BY_ROW:
        found |= {f"{rows}/{key}": value for key, value in getattr(moments, rows).items()}
    found |= {f"lookup_output/{key}": pack_symmetric(value) for key, value in moments.lookup_outputs.items()}
    found |= {f"direction/{key}": pack_symmetric(value) for key, value in moments.directions.items()}
    found |= {f"spectrum/{name}": torch.from_numpy(value.squares) for name, value in analysis.spectra.items()}
    return found | {name: value for name, value in _batch_values(analysis) if isinstance(value, Tensor)}


def _batch_values(analysis: StoredAnalysis) -> Iterator[tuple[str, Any]]:
    """``(kind/index/name, value)`` of everything in the batches."""
    kinds = {
        "example": [analysis.example],
        "holdout": analysis.holdout,
        "validation": analysis.validation,
        "calibration": analysis.calibration,
        "written": analysis.written,
    }
    for kind, batches in kinds.items():
        for index, batch in enumerate(batches):
            for name, value in batch.items():
                yield f"{kind}/{index}/{name}", value


def _read(root: Path) -> tuple[_Meta, dict[str, Tensor]]:
    meta = _meta(root)
    if hashlib.sha256((root / TENSORS).read_bytes()).hexdigest() != meta.files[TENSORS]["sha256"]:
        raise ArtifactCorruptError(f"{TENSORS} is damaged", where=str(root), fix="analyze again")
    return meta, read_tensors(root / TENSORS, meta.tensors)


def _meta(root: Path) -> _Meta:
    text = (root / MANIFEST).read_bytes()
    data = strict_json.loads(text, MANIFEST)
    if not isinstance(data, dict) or type(data.get("schema_version")) is not int or "mode" not in data:
        raise ValueError("the manifest is that of something else")
    if data["schema_version"] > SCHEMA_VERSION:
        what = f"an analysis with schema {data['schema_version']}; this geofx reads up to {SCHEMA_VERSION}"
        raise ArtifactVersionError(what, where=str(root), fix="install a newer geofx")
    return TypeAdapter(_Meta).validate_json(text)


def _group(stored: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {
        name.removeprefix(f"{kind}/"): value for name, value in stored.items() if name.startswith(f"{kind}/")
    }


def _batches(stored: Mapping[str, Any], kind: str) -> list[Batch]:
    found: dict[int, Batch] = {}
    for name, value in _group(stored, kind).items():
        index, _, key = name.partition("/")
        found.setdefault(int(index), {})[key] = value
    return [found[index] for index in sorted(found)]


def _moments(meta: _Meta, stored: Mapping[str, Tensor]) -> Moments:
    inputs = _group(stored, "input")
    missing = {key for key, count in meta.tokens.items() if count > 0} - inputs.keys()
    if missing:
        raise ValueError(f"no moments of {sorted(missing)[0]!r}")
    return Moments(
        inputs=_unpacked(inputs),
        outputs={**_unpacked(_group(stored, "output")), **_group(stored, "output_diagonal")},
        input_of=meta.input_of,
        tokens=meta.tokens,
        **{rows: _group(stored, rows) for rows in _BY_ROW},
        lookup_outputs=_unpacked(_group(stored, "lookup_output")),
        directions=_unpacked(_group(stored, "direction")),
        loss_terms=meta.loss_terms,
        mode=meta.mode,
        unit=meta.unit,
        dropped=meta.dropped,
    )


def _unpacked(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: unpack_symmetric(value) for key, value in packed.items()}
