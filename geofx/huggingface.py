"""Factorized models as Hugging Face checkpoints, saved and loaded by the model's own class.

transformers rebuilds a model whose layers differ from its class by a quantizer that ``config.json`` names,
so geofx registers one. The layers are described in the configuration; the factors lie in the weights file
under their own names. Where geofx is not imported, a weight of no entries under the name of a dense one
makes the loading fail: transformers would initialize a missing weight at random.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from geofx.errors import ArtifactCorruptError, ArtifactMismatchError, first_line
from geofx.factorizations import from_json, to_json
from geofx.factorized_module import FactorizedEmbedding, FactorizedLayer, FactorizedLinear

logger = logging.getLogger(__name__)

METHOD = "geofx"
SCHEMA = 1


class _Layer(BaseModel):
    """One layer of a model: its place, its format, and dtype and shape of each factor.

    ``shape`` is (out, in) of a linear map; a lookup has none.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str
    leaf: str
    transposed: bool
    shape: tuple[int, int] | None
    factorization: dict[str, Any]
    factors: dict[str, tuple[str, list[int]]]


class _Description(BaseModel):
    """The layers of a model, and which factors are one tensor: name -> the first name of it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    layers: list[_Layer]
    ties: dict[str, str] = {}


@register_quantization_config(METHOD)
class GeofxConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a factorized model.

    Raises:
        ArtifactCorruptError: it is not such a description, or of a newer geofx.
    """

    def __init__(self, layers: Any, ties: Any = None, schema_version: Any = SCHEMA, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.schema_version = schema_version
        if schema_version != SCHEMA:
            raise ArtifactCorruptError(
                f"the factorized layers are written in schema {schema_version!r}, this geofx reads {SCHEMA}",
                where="quantization_config",
                fix="update geofx",
            )
        try:
            self.described = _Description.model_validate_json(
                json.dumps({"layers": layers, "ties": ties or {}})
            )
        except (ValidationError, ValueError, TypeError) as error:
            raise ArtifactCorruptError(
                f"config.json does not describe factorized layers: {first_line(error)}",
                where="quantization_config",
                fix="save the model again",
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        described = self.described.model_dump(mode="json")
        return {"quant_method": METHOD, "schema_version": SCHEMA, **described}

    def to_diff_dict(self) -> dict[str, Any]:
        """Likewise: nothing has a default."""
        return self.to_dict()


@register_quantizer(METHOD)
class GeofxQuantizer(HfQuantizer):
    """Puts factorized layers into a skeleton before its weights are loaded, and a guard among saved ones."""

    requires_calibration = True
    quantization_config: GeofxConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        described = self.quantization_config.described
        for layer in described.layers:
            _replace(model, layer)
        declare_ties(model, described.ties)
        _warn_of_rounding(model, described)
        model._keys_to_ignore_on_load_unexpected = {
            *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
            *(rf"^{guard}$" for guard in _guards(described)),
        }

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.is_quantized = False  # factors are cast like other parameters
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors to save, the guard among them; they are described anew, as tables may have grown."""
        described = _described(model)
        for config in (self.quantization_config, model.config.quantization_config):
            config.described = described
        guards = {name: torch.zeros(0) for name in _guards(described)}
        return {**model.state_dict(), **guards}, {}

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are parameters like others."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Likewise, without adapters."""
        return True


def attach(model: Any) -> None:
    """Make ``model``, whose layers geofx factorized, save itself so that its own class can load it again."""
    described = _described(model)
    if not described.layers:
        return
    config = GeofxConfig(**described.model_dump(mode="json"))
    model.config.quantization_config = config
    model.hf_quantizer = GeofxQuantizer(config, pre_quantized=True)
    model.is_quantized = False  # factors are cast like other parameters
    model.quantization_method = METHOD
    declare_ties(model, described.ties)


def declare_ties(model: Any, ties: Mapping[str, str]) -> None:
    """Tell transformers which factors are one tensor, and that rewritten tables are tied no longer."""
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    left = {target: source for target, source in declared.items() if {target, source} <= known}
    if left.keys() != declared.keys():
        model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {**left, **ties}
    model._tied_weights_keys = {
        **(left if left.keys() != declared.keys() else getattr(model, "_tied_weights_keys", None) or {}),
        **ties,
    }


def _warn_of_rounding(model: nn.Module, described: _Description) -> None:
    """Formats and their settings were chosen for the dtype that they were fitted in."""
    fitted = {getattr(torch, dtype) for layer in described.layers for dtype, _ in layer.factors.values()}
    wanted = {part.dtype for part in model.parameters() if part.is_floating_point()}
    finest = min((torch.finfo(dtype).eps for dtype in fitted if dtype.is_floating_point), default=1.0)
    coarser = [str(dtype) for dtype in wanted if torch.finfo(dtype).eps > finest]
    if coarser:
        logger.warning(
            "the factors were fitted for finer numbers than %s: optimize the model in the dtype it runs in",
            ", ".join(sorted(coarser)),
        )


def _described(model: nn.Module) -> _Description:
    return _Description(layers=list(_layers(model)), ties=_ties(model))


def _layers(model: nn.Module) -> Iterator[_Layer]:
    for path, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            yield _Layer(
                path=path,
                leaf=module.leaf,
                transposed=module.transposed,
                shape=(module.out_features, module.in_features)
                if isinstance(module, FactorizedLinear)
                else None,
                factorization=to_json(module.factorization),
                factors={
                    name: (str(part.dtype).removeprefix("torch."), list(part.shape))
                    for name, part in module.factors.items()
                },
            )


def _ties(model: nn.Module) -> dict[str, str]:
    """Further names of each factor that several layers hold -> its first name."""
    first: dict[int, str] = {}
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, FactorizedLayer):
            for name, part in module.named_parameters(recurse=False):
                source = first.setdefault(id(part), f"{path}.{name}")
                if source != f"{path}.{name}":
                    found[f"{path}.{name}"] = source
    return found


def _guards(described: _Description) -> list[str]:
    """The name of one dense weight that is no more."""
    return [f"{layer.path}.{layer.leaf}" for layer in described.layers[:1]]


def _skeleton(shape: list[int], saved: torch.dtype, wanted: torch.dtype) -> Tensor:
    """A tensor without values, in the dtype that the model is loaded in where it is floating point."""
    return torch.empty(shape, dtype=wanted if saved.is_floating_point else saved, device="meta")


def _replace(model: nn.Module, layer: _Layer) -> None:
    """A factorized layer without values wherever ``model`` holds the layer at this place."""
    try:
        old = model.get_submodule(layer.path)
        form = from_json(layer.factorization)
        factors = {
            name: _skeleton(shape, getattr(torch, dtype), getattr(old, layer.leaf).dtype)
            for name, (dtype, shape) in layer.factors.items()
        }
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ArtifactMismatchError(
            f"the model has no layer for these factors: {error}",
            where=layer.path,
            fix="load the checkpoint with its own config.json",
        ) from error
    new: FactorizedLayer
    if layer.shape is None:
        new = FactorizedEmbedding(form, factors, leaf=layer.leaf)
    else:
        bias = getattr(old, "bias", None)
        new = FactorizedLinear(
            form, factors, bias, shape=layer.shape, transposed=layer.transposed, leaf=layer.leaf
        )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
