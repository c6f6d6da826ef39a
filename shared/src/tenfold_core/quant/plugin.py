# SPDX-License-Identifier: Apache-2.0
"""Base classes by which diffusers' ``from_pretrained`` and ``save_pretrained`` take packed models.

A package derives a :class:`PackedConfig` (a name, a format, its own settings) and a
:class:`PackedQuantizer` (how one module's description becomes an empty packed module), and calls
:func:`register` once. Its users then load a quantized folder as any other. What a loaded model may
rely on: every tensor was there, of the expected shape; **buffers** of packed modules have exactly
the dtype and the bits that were saved, while **parameters** (a bias) follow the dtype asked for.

Written for diffusers 0.42: the hooks used here are not a documented interface.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tenfold_core.errors import ConfigError, InputError, MissingExtraError
from tenfold_core.quant.state import (
    check_files,
    check_numbers,
    find_module,
    replace_module,
    tied_names,
)

try:
    from diffusers.quantizers import auto  # pyrefly: ignore[missing-import]
    from diffusers.quantizers.base import DiffusersQuantizer  # pyrefly: ignore[missing-import]
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin  # pyrefly: ignore[missing-import]
except ImportError as error:
    raise MissingExtraError(
        "tenfold_core.quant.plugin needs diffusers: pip install 'diffusers>=0.42' accelerate "
        f"({error})"
    ) from error

__all__ = ["PackedConfig", "PackedQuantizer", "attach", "register", "replace_module"]

_WHERE = "config.json: quantization_config"


@dataclass(kw_only=True, eq=True)
class PackedConfig(QuantizationConfigMixin):
    """What is written to ``config.json`` and read back from it.

    A package derives a ``@dataclass(kw_only=True)`` with its settings as fields of JSON types and
    the three class variables. Fields are the format: an unknown or missing one is an error.
    """

    method: ClassVar[Enum]
    """A member of a ``str`` enumeration; diffusers reads its ``.value``."""
    format_version: ClassVar[int] = 1
    quantize_command: ClassVar[str]
    """The command that makes such a model, for the error of loading one that is not quantized."""

    quant_method: Any = field(init=False, repr=False)
    modules: dict[str, dict[str, Any]] = field(repr=False)
    """What the builder needs to know of each replaced module, by the module's dotted name."""
    tied: dict[str, str] = field(default_factory=dict, repr=False)
    """Further names of tensors stored once, to their first name; :func:`attach` fills it."""

    def __post_init__(self) -> None:
        self.quant_method = type(self).method
        for name, kind in (("modules", dict), ("tied", str)):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(
                isinstance(key, str) and isinstance(part, kind) for key, part in value.items()
            ):
                raise ConfigError(
                    f"{_WHERE}: field {name!r} is {_short(value)}, expected names with "
                    f"{'a description each' if kind is dict else 'the names they are tied to'}"
                )
        try:
            self.modules = json.loads(json.dumps(dict(self.modules), allow_nan=False))
            self.to_dict()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{_WHERE}: cannot be written as JSON: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return a copy in JSON types, with the method's name and the format's number."""
        found = {"quant_method": self.quant_method.value, "format": self.format_version}
        for item in fields(self):
            if item.init and (item.name != "tied" or self.tied):
                found[item.name] = getattr(self, item.name)
        return json.loads(json.dumps(found, allow_nan=False))

    def to_diff_dict(self) -> dict[str, Any]:
        """Return :meth:`to_dict`; diffusers calls it to print a config and does not define it."""
        return self.to_dict()

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Read what :meth:`to_dict` gave.

        Raises:
            InputError: The method, the format or the fields are not this class's.
            ConfigError: A field's value is not allowed, or an argument that has no meaning here.
        """
        if kwargs and not return_unused_kwargs:
            raise ConfigError(f"{cls.__name__} takes no arguments beside the file: {list(kwargs)}")
        settings = dict(config_dict)
        for key, expected in (("quant_method", cls.method.value), ("format", cls.format_version)):
            found = settings.pop(key, None)
            if found != expected:
                raise InputError(
                    f"{_WHERE}: {key} is {_short(found)}, expected {expected!r}; the file is from "
                    "another version or another package"
                )
        known = {item.name: item for item in fields(cls) if item.init}
        required = [
            name
            for name, item in known.items()
            if item.default is MISSING and item.default_factory is MISSING
        ]
        unknown = [name for name in settings if name not in known]
        missing = [name for name in required if name not in settings]
        if unknown or missing:
            verb, name = ("unknown", unknown[0]) if unknown else ("missing", missing[0])
            raise InputError(
                f"{_WHERE}: {verb} field {name!r}, expected {', '.join(known)} "
                f"(required: {', '.join(required)})"
            )
        config = cls(**settings)
        return (config, kwargs) if return_unused_kwargs else config


class PackedQuantizer(DiffusersQuantizer):
    """What diffusers asks while it loads or saves a packed model.

    A package derives it and writes :meth:`build`; :meth:`finish` if its model needs hooks.
    """

    requires_calibration = True
    use_keep_in_fp32_modules = True  # without it diffusers casts even what a model class excepts

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            name = quantization_config.quant_method.value
            raise ConfigError(
                f"quantization_config: the weights to load are not quantized, and {name} cannot "
                f"quantize while loading; run `{quantization_config.quantize_command}` and load "
                "the folder it writes, without quantization_config"
            )
        super().__init__(quantization_config, **kwargs)
        self._files: list[str] | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._names: dict[str, list[str]] = {}

    @abstractmethod
    def build(self, module: nn.Module, entry: dict[str, Any]) -> nn.Module:
        """Return the packed module for ``module``, with empty tensors; called on the meta device.

        Everything that is saved must be a parameter or a persistent buffer, of a shape that
        follows from the two arguments. An entry that makes no sense is an error of the kinds
        KeyError, TypeError or ValueError, which names the module when it reaches the user.

        Args:
            module: The module to replace, its tensors on the meta device.
            entry: Its description in the config.
        """

    def finish(self, model: nn.Module) -> None:
        """Complete a model whose tensors are there: verify values, fill caches, add hooks.

        Called after loading and by :func:`attach`; does nothing unless a package overrides it.
        """

    @property
    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to leave modules on disk: accelerate brings their parameters back, not buffers."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ConfigError(
                "device_map: 'disk' is not possible for packed modules; use 'cpu' or a device"
            )

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """Remember the files, the only place where diffusers names them; change nothing."""
        self._files = list(checkpoint_files)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._files is None:
            raise ConfigError("this diffusers does not name the files it reads; use 0.42 or newer")
        self._replace_modules(model)
        state = model.state_dict(keep_vars=True)
        tied = self.quantization_config.tied
        for name, first in tied.items():
            if name not in state or first not in state or first in tied:
                raise InputError(f"{_WHERE}: tied: {name!r} to {first!r}, not two tensors' names")
            if (state[name].shape, state[name].dtype) != (state[first].shape, state[first].dtype):
                raise InputError(f"{_WHERE}: tied: {name!r} has not the shape of {first!r}")
            self._names.setdefault(first, [first]).append(name)
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        check_files(self._files, state, exact=self._dtypes, absent=tied, ignored=ignored)

    def _replace_modules(self, model: nn.Module) -> None:
        replaced: dict[int, str] = {}
        for name, entry in self.quantization_config.modules.items():
            try:
                module = find_module(model, name)
            except InputError as error:
                raise InputError(f"{_WHERE}: {error}") from error
            if id(module) in replaced:
                other = replaced[id(module)]
                raise InputError(
                    f"{_WHERE}: modules {other!r} and {name!r} are one; keep the first"
                )
            check_numbers(name, entry, module)
            try:
                with torch.device("meta"):
                    packed = self.build(module, entry)
            except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise InputError(
                    f"{_WHERE}: module {name!r} ({type(module).__name__}): "
                    f"{type(error).__name__}: {error}"
                ) from error
            _require_saved_state(name, packed)
            replace_module(model, name, packed)
            replaced[id(packed)] = name
            self._dtypes |= {f"{name}.{key}": part.dtype for key, part in packed.named_buffers()}

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Say whether :meth:`create_quantized_param` places this tensor instead of diffusers."""
        return param_name in self._dtypes or param_name in self._names

    def check_quantized_param_shape(self, param_name: str, expected: Tensor, found: Tensor) -> bool:
        """Refuse a tensor of another shape; the headers were checked, so the file has changed."""
        if expected.shape != found.shape:
            raise InputError(
                f"tensor {param_name!r} has shape {tuple(found.shape)}, expected "
                f"{tuple(expected.shape)}; the file changed while it was read"
            )
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Place a packed or tied tensor: a buffer as it is in the file, before diffusers' cast."""
        value = state_dict[param_name] if param_name in self._dtypes else param_value
        value = value.to(target_device)
        owner, leaf = _owner(model, param_name)
        old = getattr(owner, leaf)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        for name in self._names.get(param_name, [param_name]):
            owner, leaf = _owner(model, name)
            setattr(owner, leaf, value)

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """Leave out the further names of tied tensors, which are stored once."""
        return [key for key in missing_keys if key not in self.quantization_config.tied]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.finish(model)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what to save: each tied tensor once.

        Raises:
            ConfigError: Not safetensors, or tensors that were tied have become different.
        """
        if not safe_serialization:
            raise ConfigError("packed models are saved as safetensors; use safe_serialization=True")
        tied = self.quantization_config.tied
        for name, first in tied.items():
            if not torch.equal(state_dict[name], state_dict[first]):
                raise ConfigError(f"tensors {name!r} and {first!r} were tied and now differ")
        return {name: part for name, part in state_dict.items() if name not in tied}, {}


def register(config_class: type[PackedConfig], quantizer_class: type[PackedQuantizer]) -> None:
    """Make diffusers know a method's two classes; again with the same classes changes nothing.

    Raises:
        ConfigError: The method is no member of a ``str`` enumeration, or its name is taken.
    """
    method = getattr(config_class, "method", None)
    if not isinstance(method, Enum) or not isinstance(method, str):
        raise ConfigError(
            f"{config_class.__name__}.method is {method!r}, expected a member of a class derived "
            "from str and Enum"
        )
    taken = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.get(method.value)
    if taken is not None and _path(taken) != _path(config_class):
        raise ConfigError(f"method {method.value!r} is already registered by {_path(taken)}")
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method.value] = config_class
    auto.AUTO_QUANTIZER_MAPPING[method.value] = quantizer_class


def attach(model: Any, config: PackedConfig) -> None:
    """Make a diffusers model whose modules were packed in memory behave as a loaded one.

    It can then be saved by ``save_pretrained``, alone or in its pipeline, and refuses casts.

    Raises:
        ConfigError: The model has a quantizer already, or the method is not registered.
        InputError: The config names a module that the model does not have.
    """
    if getattr(model, "is_quantized", False):
        raise ConfigError(
            f"{type(model).__name__} is already quantized by {model.quantization_method.value}; "
            "start from the original weights"
        )
    quantizer_class = auto.AUTO_QUANTIZER_MAPPING.get(config.quant_method.value)
    if quantizer_class is None:
        raise ConfigError(f"method {config.quant_method.value!r} is not registered; call register")
    for name in config.modules:
        _require_saved_state(name, find_module(model, name))
    config = replace(config, tied=tied_names(model))
    quantizer = quantizer_class(config, pre_quantized=True)
    quantizer.finish(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.register_to_config(quantization_config=config.to_dict())


def _require_saved_state(name: str, module: nn.Module) -> None:
    held = {key for key, _ in (*module.named_parameters(), *module.named_buffers())}
    if forgotten := held - set(module.state_dict()):
        raise TypeError(
            f"module {name!r} ({type(module).__name__}): {', '.join(sorted(forgotten))} would not "
            "be saved; make it persistent, or create it in finish()"
        )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
