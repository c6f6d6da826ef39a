# SPDX-License-Identifier: Apache-2.0
"""Packed models in diffusers: `from_pretrained` and `save_pretrained` take them as any other.

`import mpq_dm` registers the two classes here with diffusers. A pipeline's `quant_mapping` takes
`MPQDMQuantConfig`; the weights must be quantized already.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant.activations import TimestepContext
from tenfold_core.quant.plugin import PackedConfig, PackedQuantizer, attach, register
from tenfold_core.quant.state import find_module, replace_module
from tenfold_core.run.checkpoint import read_header
from torch import Tensor, nn

from mpq_dm.packed import MODES, PackedLayer, packed_layers
from mpq_dm.plan import LayerPlan
from mpq_dm.roles import find_layers
from mpq_dm.temb_cache import TableLayer, table_layers

__all__ = [
    "MPQDMQuantConfig",
    "MPQDMQuantizer",
    "attach_packed",
    "empty_model",
    "load",
    "sampling_steps",
]

_WHERE = "config.json: quantization_config"
_CONTEXT = "mpqdm_timesteps"
_mode: ContextVar[str] = ContextVar("mode", default=MODES[0])  # of layers that are being loaded
_SHARED = ("qweight", "row_order", "scale", "zero", "smooth")


class Method(str, Enum):  # noqa: UP042  (diffusers reads `.value` and compares with text)
    """The name of the method in config files."""

    MPQDM = "mpq-dm"


@dataclass(kw_only=True)
class MPQDMQuantConfig(PackedConfig):
    """What `config.json` says of a packed model."""

    method = Method.MPQDM
    quantize_command = "mpq-dm quantize MODEL --out DIR"

    weight_bits: int
    """N, the average bits of a weight in the body of the network."""
    act_bits: int
    """Bits of the body's inputs."""
    timesteps: list[float]
    """Timesteps of the calibrated sampling steps, in sampling order."""
    prediction_type: str | None = None
    """What the scheduler took the model's output for, if it said so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_bits", "act_bits"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 8:
                raise ConfigError(f"{_WHERE}: {name} is {value!r}, expected 1 to 8")
        if not isinstance(self.prediction_type, (str, type(None))):
            raise ConfigError(
                f"{_WHERE}: prediction_type is {self.prediction_type!r}, expected text or null"
            )
        if not isinstance(self.timesteps, (list, tuple)) or not all(
            type(step) in (int, float) for step in self.timesteps
        ):
            raise ConfigError(
                f"{_WHERE}: timesteps is {str(self.timesteps)[:60]}, expected a list of numbers"
            )
        self.timesteps = [float(step) for step in self.timesteps]
        try:
            TimestepContext(self.timesteps)
        except ConfigError as error:
            raise ConfigError(f"{_WHERE}: {error}; found {str(self.timesteps)[:60]}") from error


class MPQDMQuantizer(PackedQuantizer):
    """Builds packed layers from their entries, verifies what was loaded and starts the model."""

    quantization_config: MPQDMQuantConfig

    def build(self, module: nn.Module, entry: dict[str, Any]) -> PackedLayer | TableLayer:
        """Return the empty layer that an entry of the config describes."""
        if "table" in entry:
            return TableLayer.empty(entry, len(self.quantization_config.timesteps))
        layer = PackedLayer.empty(module, entry, len(self.quantization_config.timesteps))
        layer.mode = _mode.get()
        return layer

    def replace_(self, model: nn.Module) -> None:
        """Replace the modules that the config names by empty packed layers."""
        self._replace_modules(model)

    def finish(self, model: nn.Module) -> None:
        """Verify all values, and give all layers one context that follows the model's calls.

        Raises:
            InputError: a stored value is not allowed; names file, tensor, expected and found.
        """
        layers = list(packed_layers(model))
        tables = list(table_layers(model))
        for name, layer in (*layers, *tables):
            try:
                layer.check(name)
            except InputError as error:
                raise InputError(f"{self._place(str(error).split(':')[0])}{error}") from error
        context = TimestepContext(self.quantization_config.timesteps)
        if layers:
            context.to(layers[0][1].qweight.device)
        context.attach(model)
        model.add_module(_CONTEXT, context)
        for _, layer in layers:
            layer.bind_(context)
            layer.prepare_()
        for _, table in tables:
            table.bind_(context)

    def _place(self, tensor: str) -> str:
        """Return the file that holds a tensor, as the beginning of a message."""
        for path in self._files or []:
            if tensor in read_header(path).tensors:
                return f"{path}: "
        return ""


def attach_packed(
    model: Any,
    layers: Mapping[str, tuple[LayerPlan, UInt8[Tensor, "out in *kernel"]]],
    *,
    timesteps: Sequence[int | float],
    weight_bits: int,
    act_bits: int,
    prediction_type: str | None = None,
    halves: Iterable[str] = (),
    mode: str = MODES[0],
) -> None:
    """Replace layers of a model by packed ones, in place; it then saves and runs as a loaded one.

    Args:
        model: a diffusers model; tables that it has (`mpq_dm.temb_cache`) are stored as they are.
        layers: plan and codes by layer. Layers that share one weight share its codes.
        timesteps: timesteps of the calibrated sampling steps, in sampling order.
        weight_bits: average bits of a weight in the body.
        act_bits: bits of the body's inputs.
        prediction_type: what the scheduler takes the model's output for.
        halves: layers to keep in half precision.
        mode: how products are computed, one of `mpq_dm.packed.MODES`.

    Raises:
        ConfigError: the model is quantized already, layers of one weight have different codes, or
            there is no such mode.
        InputError: a plan does not fit its layer, or there is no such layer.
    """
    _check_mode(mode)
    packed = _pack(model, layers, halves, TimestepContext(timesteps))
    config = MPQDMQuantConfig(
        weight_bits=weight_bits,
        act_bits=act_bits,
        timesteps=[float(step) for step in timesteps],
        prediction_type=prediction_type,
        modules={name: layer.entry.to_dict() for name, layer in packed.items()}
        | {name: table.entry() for name, table in table_layers(model)},
    )
    for name, layer in packed.items():
        layer.mode = mode
        replace_module(model, name, layer)
    attach(model, config)


def _pack(
    model: nn.Module,
    layers: Mapping[str, tuple[LayerPlan, Tensor]],
    halves: Iterable[str],
    context: TimestepContext,
) -> dict[str, PackedLayer]:
    """Return the packed layers by name; the model stays as it is."""
    roles = {layer.name: layer.role for layer in find_layers(model)[0]}
    packed: dict[str, PackedLayer] = {}
    first: dict[int, str] = {}
    for name in (*layers, *halves):
        module = find_module(model, name)
        try:
            if name in layers:
                layer = PackedLayer.from_plan(module, *layers[name], context)
            else:
                layer = PackedLayer.from_half(module, roles.get(name, "body"))
        except (InputError, ConfigError) as error:
            raise type(error)(f"layer {name!r}: {error}") from error
        other = first.setdefault(id(module.weight), name)
        if other != name:
            _share(packed[other], layer, (other, name))
        packed[name] = layer
    return packed


def _share(first: PackedLayer, second: PackedLayer, names: tuple[str, str]) -> None:
    """Let two layers of one weight have one set of codes, so that it is stored once."""
    for key in _SHARED:
        ours, theirs = getattr(first, key, None), getattr(second, key, None)
        if ours is None and theirs is None:
            continue
        if ours is None or theirs is None or not torch.equal(ours, theirs):
            raise ConfigError(
                f"layers {names[0]!r} and {names[1]!r} share one weight and differ in {key}; "
                "plan them alike, or leave both as they are"
            )
        setattr(second, key, ours)


def sampling_steps(model: nn.Module) -> TimestepContext:
    """Return the context that knows at which sampling step a packed model is.

    Raises:
        ConfigError: the model is not packed.
    """
    context = getattr(model, _CONTEXT, None)
    if not isinstance(context, TimestepContext):
        raise ConfigError(f"{type(model).__name__} is not quantized by {Method.MPQDM.value}")
    return context


def load(path: str | Path, *, mode: str = MODES[0], **settings: Any) -> Any:
    """Load a quantized model, or a pipeline that has one, from a folder.

    Args:
        path: folder of the model or of the pipeline.
        mode: how products are computed, one of `mpq_dm.packed.MODES`.
        settings: further arguments of diffusers' `from_pretrained`.

    Raises:
        InputError: the folder holds no quantized model, or a damaged one.
        ConfigError: no such mode.
    """
    import diffusers

    folder = Path(path)
    _check_mode(mode)
    pipeline, parts = _quantized_parts(folder)
    for part in parts:
        for file in sorted(part.glob("*.safetensors")):
            read_header(file)  # a truncated file is told apart before gigabytes are read
    kind: Any = diffusers.DiffusionPipeline
    if not pipeline:
        kind = _model_class(folder)
    token = _mode.set(mode)
    try:
        return kind.from_pretrained(folder, **settings)
    finally:
        _mode.reset(token)


def empty_model(folder: Path) -> Any:
    """Return the packed model that a folder's config describes, its tensors on the meta device.

    Raises:
        InputError: the config is not that of a packed model.
    """
    _, parts = _quantized_parts(folder)
    kind = _model_class(folder)
    about = dict(_json(parts[0] / "config.json"))
    config = MPQDMQuantConfig.from_dict(about.pop("quantization_config"))
    with torch.device("meta"):
        model = kind.from_config(about)
    model.hf_quantizer = MPQDMQuantizer(config)
    model.hf_quantizer.replace_(model)
    return model


def _model_class(folder: Path) -> Any:
    import diffusers

    name = _json(folder / "config.json").get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise InputError(
            f"{folder / 'config.json'}: _class_name is {name!r}, expected a model of diffusers "
            f"{diffusers.__version__}"
        )
    return kind


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}, expected {', '.join(MODES)}")


def _quantized_parts(folder: Path) -> tuple[bool, list[Path]]:
    """Return whether a folder is a pipeline, and the folders of its quantized models."""
    pipeline = (folder / "model_index.json").is_file()
    places = sorted(folder.glob("*/config.json")) if pipeline else [folder / "config.json"]
    if not pipeline and not places[0].is_file():
        raise InputError(
            f"{folder}: neither config.json nor model_index.json, expected the folder of a "
            "diffusers model or pipeline"
        )
    parts = []
    for place in places:
        about = _json(place).get("quantization_config")
        if isinstance(about, dict) and about.get("quant_method") == Method.MPQDM.value:
            parts.append(place.parent)
    if not parts:
        raise InputError(
            f"{folder}: no model quantized by {Method.MPQDM.value}; run "
            f"`{MPQDMQuantConfig.quantize_command}` first"
        )
    return pipeline, parts


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: found {type(found).__name__}, expected an object")
    return found


register(MPQDMQuantConfig, MPQDMQuantizer)
