"""An analysis on disk: moments, spectra and held-out batches, for any number of budgets later."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geofx import strict_json
from geofx.batches import Batch
from geofx.errors import ArtifactCorruptError
from geofx.folder import MANIFEST, real_folder, write_folder
from geofx.linalg import pack_symmetric, unpack_symmetric
from geofx.moments import Moments
from geofx.objective import NextToken, Objective, SquaredError
from geofx.spectrum import Spectrum
from geofx.tensor_file import describe, read_tensors, storable, write_tensors

if TYPE_CHECKING:
    from geofx.analysis import Analysis

TENSORS = "analysis.safetensors"
SCHEMA_VERSION = 1


def save_analysis(analysis: Analysis, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the folder ``path``: symmetric matrices as triangles, hashed, all or nothing.

    Raises:
        ArtifactError, ResourceError: the folder cannot be written.
    """
    tensors = storable(_tensors_of(analysis))
    moments = analysis.moments
    meta = {
        "schema_version": SCHEMA_VERSION,
        "model_hash": analysis.model_hash,
        "objective": type(analysis.objective).__name__,
        "seed": getattr(analysis.objective, "seed", 0),
        "mode": moments.mode,
        "unit": moments.unit,
        "input_of": dict(moments.input_of),
        "tokens": dict(moments.tokens),
        "loss_terms": moments.loss_terms,
        "dropped": dict(moments.dropped),
        "tensors": describe(tensors),
    }

    def manifest(file: Path) -> None:
        digest = hashlib.sha256((file.parent / TENSORS).read_bytes()).hexdigest()
        file.write_text(strict_json.dumps({**meta, "files": {TENSORS: {"sha256": digest}}}), encoding="utf-8")

    files = {TENSORS: lambda file: write_tensors(file, tensors), MANIFEST: manifest}
    return write_folder(
        path, files, overwrite=overwrite, needed_bytes=sum(part.nbytes for part in tensors.values())
    )


@dataclass(frozen=True, eq=False)
class StoredAnalysis:
    """What an analysis folder holds."""

    model_hash: str
    moments: Moments
    spectra: Mapping[str, Spectrum]
    example: Batch
    holdout: list[Batch]
    objective: Objective | None


def read_analysis(path: str | Path) -> StoredAnalysis:
    """What `save_analysis` wrote, hash checked; ``objective`` is None where it was a loss of the user's own.

    Raises:
        ArtifactCorruptError: the folder is damaged.
    """
    meta, stored = _read(real_folder(path))
    kinds: dict[str, Objective] = {
        NextToken.__name__: NextToken(),
        SquaredError.__name__: SquaredError(int(meta["seed"])),
    }
    return StoredAnalysis(
        model_hash=str(meta["model_hash"]),
        moments=_moments(meta, stored),
        spectra={name: Spectrum(value.numpy()) for name, value in _group(stored, "spectrum").items()},
        example=_batches(stored, "example")[0],
        holdout=_batches(stored, "holdout"),
        objective=kinds.get(meta["objective"]),
    )


def _tensors_of(analysis: Analysis) -> dict[str, Tensor]:
    moments = analysis.moments
    found = {f"input/{key}": pack_symmetric(value) for key, value in moments.inputs.items()}
    found |= {f"mean/{key}": value for key, value in moments.means.items()}
    found |= {f"output/{key}": pack_symmetric(value) for key, value in moments.outputs.items()}
    found |= {
        f"spectrum/{name}": torch.from_numpy(region.spectrum.squares)
        for name, region in analysis.regions.items()
    }
    for kind, batches in (("example", [dict(analysis.original.example)]), ("holdout", analysis.holdout)):
        for index, batch in enumerate(batches):
            found |= {
                f"{kind}/{index}/{name}": value for name, value in batch.items() if isinstance(value, Tensor)
            }
    return found


def _read(root: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    meta = strict_json.loads((root / MANIFEST).read_bytes(), MANIFEST)
    try:
        digest, expected = meta["files"][TENSORS]["sha256"], meta["tensors"]
        if meta["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema {meta['schema_version']}")
    except (LookupError, TypeError, ValueError) as error:
        raise ArtifactCorruptError(f"not a saved analysis: {error}", where=str(root)) from error
    if hashlib.sha256((root / TENSORS).read_bytes()).hexdigest() != digest:
        raise ArtifactCorruptError(f"{TENSORS} is damaged", where=str(root), fix="analyze again")
    return meta, read_tensors(root / TENSORS, expected)


def _group(stored: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{kind}/"): value for name, value in stored.items() if name.startswith(f"{kind}/")
    }


def _batches(stored: Mapping[str, Tensor], kind: str) -> list[Batch]:
    found: dict[int, Batch] = {}
    for name, value in _group(stored, kind).items():
        index, _, key = name.partition("/")
        found.setdefault(int(index), {})[key] = value
    return [found[index] for index in sorted(found)]


def _moments(meta: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Moments:
    return Moments(
        inputs={key: unpack_symmetric(value) for key, value in _group(stored, "input").items()},
        means=_group(stored, "mean"),
        outputs={key: unpack_symmetric(value) for key, value in _group(stored, "output").items()},
        input_of=meta["input_of"],
        tokens=meta["tokens"],
        loss_terms=meta["loss_terms"],
        mode=meta["mode"],
        unit=meta["unit"],
        dropped=meta["dropped"],
    )
