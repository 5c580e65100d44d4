"""A saved result: JSON and safetensors with hashes, written whole or not at all, read without running any."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from geofx import strict_json
from geofx.environment import version_of
from geofx.errors import ArtifactCorruptError, ArtifactError, ArtifactVersionError
from geofx.export.staging import staging
from geofx.folder import MANIFEST, Content, check_target, real_folder, write_folder
from geofx.graph_json import graph_from_json, graph_tensors, graph_to_json
from geofx.program import Program
from geofx.stand_in import with_stand_in
from geofx.tensor_file import describe, read_tensors, require_finite, storable, write_tensors

SCHEMA_VERSION = 1
GRAPH, PLAN, REPORT, WEIGHTS, CONFIG = (
    "graph.json",
    "plan.json",
    "report.json",
    "geofx.safetensors",
    "config.json",
)
_OWN = (MANIFEST, GRAPH, PLAN, REPORT, WEIGHTS, CONFIG)
_REQUIRED = frozenset((GRAPH, PLAN, REPORT, WEIGHTS))
_EXTRA_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9_+-]*(\.[A-Za-z0-9_+-]+)*"
    r"\.(json|txt|model|jinja|md|bpe|tiktoken|spm|vocab|codes|tokenizer)"
)
# transformers follows adapter_config.json to another model's weights.
_RESERVED = frozenset((*_OWN, "adapter_config.json"))
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class Artifact:
    """What a saved folder holds.

    Attributes:
        program: the graph with its weights and a stand-in for its example.
        plan_json: text of plan.json, not yet validated.
        report_json: text of report.json, not yet validated.
        config: the model's Hugging Face configuration, if it had one.
        files: further files, such as the tokenizer's.
        manifest: version, hashes, and every tensor's dtype and shape.
    """

    program: Program
    plan_json: str
    report_json: str
    config: dict[str, Any] | None
    files: dict[str, bytes]
    manifest: dict[str, Any]

    @property
    def report(self) -> Any:
        """The report as a JSON value."""
        return strict_json.loads(self.report_json, REPORT)


def save(
    path: str | Path,
    program: Program,
    plan_json: str,
    report: str | Mapping[str, Any],
    *,
    extra: Mapping[str, bytes] | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the folder ``path``; the same result gives the same bytes.

    The example is replaced by a stand-in of the same shapes: no data that the model was traced on is kept.

    Args:
        path: the folder; its parent must exist.
        program: the graph and its weights.
        plan_json: the plan as JSON.
        report: the report as JSON or as what JSON can hold.
        extra: further files by plain name, such as the tokenizer's.
        config: the model's Hugging Face configuration; kept inside one that plain transformers refuses.
        overwrite: replace a folder that geofx wrote.

    Raises:
        ArtifactError: the place cannot be used, or the graph holds what a file cannot.
        NumericsError: a tensor holds values that are not finite; infinities in a buffer are the model's own.
        ResourceError: the disk is too small.
    """
    check_target(path, overwrite=overwrite)
    for name in extra or {}:
        check_file_name(name)
    program = with_stand_in(program)
    tensors = storable(graph_tensors(program))
    _require_finite(program, tensors)
    known = _documents(program, plan_json, report, config) | dict(extra or {})
    files: dict[str, Content] = {
        **known,
        WEIGHTS: lambda file: write_tensors(file, tensors),
        MANIFEST: lambda file: _write_manifest(file, known, tensors),
    }
    needed = sum(tensor.nbytes for tensor in tensors.values()) + 1024 * len(tensors)
    return write_folder(path, files, overwrite=overwrite, needed_bytes=needed)


def load(path: str | Path) -> Artifact:
    """What `save` wrote to ``path``, every byte checked against the manifest.

    Raises:
        ArtifactError: there is no such folder.
        ArtifactVersionError: a newer geofx wrote it.
        ArtifactCorruptError: a file is missing, damaged, or not what the manifest says; names the file.
    """
    root = real_folder(path)
    manifest = _manifest(root)
    contents = {name: _checked(root, name, entry) for name, entry in manifest["files"].items()}
    tensors = read_tensors(root / WEIGHTS, manifest["tensors"])
    program = graph_from_json(strict_json.loads(contents[GRAPH], GRAPH), tensors)
    return Artifact(
        program,
        _text(contents[PLAN], PLAN),
        _text(contents[REPORT], REPORT),
        _inner_config(contents.get(CONFIG)),
        {name: content for name, content in contents.items() if name not in _OWN},
        manifest,
    )


def bytes_on_disk(program: Program, near: Path) -> int:
    """Bytes of the weights file that `save` writes for ``program``, written beside ``near`` and removed.

    Raises:
        ResourceError: the disk is too small.
        ArtifactError: the graph holds what a file cannot.
    """
    tensors = storable(graph_tensors(with_stand_in(program)))
    with staging(near, sum(tensor.nbytes for tensor in tensors.values())) as folder:
        write_tensors(folder / WEIGHTS, tensors)
        return (folder / WEIGHTS).stat().st_size


def check_file_name(name: str) -> None:
    """Raises ArtifactError unless `save` keeps a further file of this name: plain, and no code."""
    if not _EXTRA_NAME.fullmatch(name) or len(name) > 128 or name.lower() in _RESERVED:
        what = f"{name[:200]!r} cannot be the name of a further file"
        raise ArtifactError(
            what, where=name[:200], fix="pass plain names of data files, such as tokenizer.json"
        )


# --- writing


def _documents(
    program: Program, plan_json: str, report: str | Mapping[str, Any], config: Mapping[str, Any] | None
) -> dict[str, bytes]:
    """The JSON files, each as bytes that `strict_json` reads."""
    documents = {
        GRAPH: _dumps(graph_to_json(program), GRAPH),
        PLAN: plan_json,
        REPORT: report if isinstance(report, str) else _dumps(dict(report), REPORT),
    }
    if config is not None:
        wrapped = {
            "model_type": "geofx",
            "architectures": ["GeofxProgram"],
            "geofx_config": without_paths(config),
        }
        documents[CONFIG] = _dumps(wrapped, CONFIG)
    for name, text in documents.items():
        strict_json.loads(text, name)
    return {name: text.encode() for name, text in documents.items()}


def _dumps(value: Any, name: str) -> str:
    try:
        return strict_json.dumps(value)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{name} cannot be written as JSON: {error}", where=name) from error


def without_paths(config: Any) -> Any:
    """``config`` without the folder that it was read from."""
    if isinstance(config, Mapping):
        return {key: without_paths(value) for key, value in config.items() if key != "_name_or_path"}
    return config


def _require_finite(program: Program, tensors: Mapping[str, Tensor]) -> None:
    parameters = {name for name, tensor in program.tensors() if isinstance(tensor, nn.Parameter)}
    for name, tensor in tensors.items():
        require_finite(name, tensor, allow_infinity=name not in parameters)


def _write_manifest(file: Path, known: Mapping[str, bytes], tensors: Mapping[str, Tensor]) -> None:
    entries = {}
    for name in (*known, WEIGHTS):
        digest = _sha256(file.parent / name)
        if name in known and digest != hashlib.sha256(known[name]).hexdigest():
            raise ArtifactError(
                "the file does not read back as it was written", where=name, fix="check the disk"
            )
        entries[name] = {"sha256": digest, "bytes": (file.parent / name).stat().st_size}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "geofx_version": version_of("geofx"),
        "files": entries,
        "tensors": describe(tensors),
    }
    file.write_text(strict_json.dumps(manifest), encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# --- reading


def _manifest(root: Path) -> dict[str, Any]:
    if not (root / MANIFEST).is_file():
        raise ArtifactError(
            f"the folder has no {MANIFEST}", where=str(root), fix="pass a folder that geofx saved"
        )
    manifest = strict_json.loads(_read(root, MANIFEST, strict_json.MAX_BYTES), MANIFEST)
    if not isinstance(manifest, dict):
        raise _corrupt("the manifest is not an object", MANIFEST)
    version = manifest.get("schema_version")
    if type(version) is not int or version < 1:
        raise _corrupt("the manifest has no schema version", MANIFEST)
    if version > SCHEMA_VERSION:
        writer = f"made by geofx {manifest.get('geofx_version')} with schema {version}"
        what = f"{writer}; this geofx reads up to {SCHEMA_VERSION}"
        raise ArtifactVersionError(what, where=str(root), fix="install a newer geofx")
    try:
        _check_manifest(manifest)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _corrupt(f"the manifest is not well formed: {error}", MANIFEST) from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    if manifest.keys() != {"schema_version", "geofx_version", "files", "tensors"}:
        raise ValueError(f"keys {sorted(manifest)}")
    files = manifest["files"]
    if _REQUIRED - files.keys() or len({name.lower() for name in files}) < len(files):
        raise ValueError("a file is missing or listed twice")
    for name, entry in files.items():
        if name not in (*_REQUIRED, CONFIG):
            _check_listed(name)
        if not _SHA256.fullmatch(entry["sha256"]) or type(entry["bytes"]) is not int or entry["bytes"] < 0:
            raise ValueError(f"entry of {name!r}")
    for name, entry in manifest["tensors"].items():
        if entry.keys() != {"dtype", "shape"}:
            raise ValueError(f"entry of tensor {name!r}")


def _check_listed(name: str) -> None:
    try:
        check_file_name(name)
    except ArtifactError as error:
        raise ValueError(str(error)) from error


def _checked(root: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file, those of the weights only hashed.

    Raises:
        ArtifactCorruptError: it is no plain file in the folder, or its size or hash differ.
    """
    digest = hashlib.sha256()
    content = _read(root, name, entry["bytes"], exactly=True, digest=digest, keep=name != WEIGHTS)
    if digest.hexdigest() != entry["sha256"]:
        raise _corrupt(f"{name} is damaged: its SHA-256 is {digest.hexdigest()}, not {entry['sha256']}", name)
    return content


def _read(
    root: Path, name: str, size: int, *, exactly: bool = False, digest: Any = None, keep: bool = True
) -> bytes:
    """A plain file of at most (or exactly) ``size`` bytes, no link of either kind."""
    try:
        file = open(root / name, "rb", opener=_open_no_link)  # noqa: SIM115
    except OSError as error:
        raise _corrupt(f"{name} cannot be opened: {error.strerror}", name) from error
    with file as opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise _corrupt(f"{name} is a link or not a plain file", name)
        if found.st_size > size or (exactly and found.st_size != size):
            raise _corrupt(f"{name} has {found.st_size} bytes, and {size} are expected", name)
        kept = bytearray()
        while chunk := opened.read(_CHUNK):
            if digest is not None:
                digest.update(chunk)
            if keep:
                kept += chunk
    return bytes(kept)


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _text(content: bytes, name: str) -> str:
    strict_json.loads(content, name)
    return content.decode()


def _inner_config(content: bytes | None) -> dict[str, Any] | None:
    if content is None:
        return None
    config = strict_json.loads(content, CONFIG)
    inner = config.get("geofx_config") if isinstance(config, dict) else None
    if not isinstance(inner, dict):
        raise _corrupt("config.json holds no geofx_config", CONFIG)
    return inner


def _corrupt(what: str, where: str) -> ArtifactCorruptError:
    return ArtifactCorruptError(what, where=where, fix="take the folder from its source again")
