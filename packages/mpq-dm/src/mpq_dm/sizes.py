# SPDX-License-Identifier: Apache-2.0
"""What a packed model costs: every byte of its file by layer, role and kind.

Everything is counted: codes, scales and zero points, orders of rows, divisors, activation scales,
biases, and all that was not quantized. What is accounted follows from the config and the shapes of
the model alone, and must be what the file holds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tenfold_core.errors import InputError
from tenfold_core.run.checkpoint import TensorInfo, read_header
from torch import nn

from mpq_dm.models import model_folder

__all__ = ["KINDS", "DiskSize", "LayerSize", "RoleSize", "SizeReport", "account"]

KINDS = {
    "qweight": "codes",
    "scale": "scales",
    "zero": "scales",
    "row_order": "order",
    "smooth": "smooth",
    "act_scale": "acts",
    "act_zero": "acts",
    "bias": "bias",
}
"""Kinds of bytes, by the name of a packed layer's tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """The bytes of one packed layer; tensors that an earlier layer shares count there."""

    layer: str
    role: str
    weights: int
    bits: float
    """Average width of the codes; 16 for a weight in half precision."""
    codes: int
    scales: int
    """Scales and zero points of the rows."""
    order: int
    smooth: int
    acts: int
    """Scales and zero points of the input, of all sampling steps."""
    bias: int

    @property
    def bytes(self) -> int:
        """All bytes of the layer."""
        return self.codes + self.scales + self.order + self.smooth + self.acts + self.bias


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSize:
    """The sums over the layers of one role."""

    role: str
    layers: int
    weights: int
    bits: float
    """Average width of a weight's code."""
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSize:
    """What the tensor files take."""

    files: int
    data: int
    """Bytes of the files' data sections."""
    headers: int
    """Bytes before them: names, types, shapes and places of the tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeReport:
    """The bytes of a packed model; `accounted` must equal `disk.data`."""

    layers: list[LayerSize]
    roles: list[RoleSize]
    other: int
    """Bytes of everything outside packed layers."""
    weights: int
    """Weights of packed layers, and of all other tensors of two or more dimensions."""
    accounted: int
    bits: float
    """Average width of the codes of packed layers."""
    bits_per_weight: float
    """All accounted bytes in bits, over `weights`."""
    disk: DiskSize | None
    """What the files hold; None for a model in memory."""

    @property
    def agrees(self) -> bool:
        """Whether the files hold what is accounted; true for a model in memory."""
        return self.disk is None or self.disk.data == self.accounted


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    bytes: int


def account(source: nn.Module | str | Path) -> SizeReport:
    """Count the bytes of a packed model, in memory or in a folder (its own, or its pipeline's).

    A folder is not loaded: shapes come from its configs, types of plain tensors from the headers.

    Raises:
        InputError: the model is not packed, or the folder holds none.
        CheckpointError: a file's header is damaged.
    """
    if isinstance(source, nn.Module):
        return _report(source, _state(source), None)
    folder = model_folder(source)
    files = [read_header(path) for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise InputError(f"{folder}: no .safetensors file, expected the tensors of a packed model")
    headers = sum(file.data_start for file in files)
    disk = DiskSize(
        files=len(files),
        data=sum(file.path.stat().st_size for file in files) - headers,
        headers=headers,
    )
    found = {name: info for file in files for name, info in file.tensors.items()}
    model = _empty_model(folder)
    return _report(model, _state(model, found), disk)


def _empty_model(folder: Path) -> Any:
    """Return the packed model that the configs of a folder describe, without its tensors."""
    from mpq_dm.plugin import empty_model

    return empty_model(folder)


def _state(model: Any, found: Mapping[str, TensorInfo] | None = None) -> dict[str, _Tensor]:
    """Return what is stored, each tied tensor once; plain floats as wide as the file has them."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        raise InputError(f"{type(model).__name__}: not packed; expected a model that mpq-dm packed")
    tied = quantizer.quantization_config.tied
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tied:
            continue
        size = tensor.element_size()
        if found is not None and tensor.is_floating_point() and name in found:
            info = found[name]
            size = (info.stop - info.start) // max(1, prod(info.shape))
        state[name] = _Tensor(tuple(tensor.shape), tensor.numel() * size)
    return state


def _report(model: nn.Module, state: dict[str, _Tensor], disk: DiskSize | None) -> SizeReport:
    from mpq_dm.packed import packed_layers

    layers, rest = [], dict(state)
    for name, layer in packed_layers(model):
        parts = dict.fromkeys(KINDS.values(), 0)
        for leaf, kind in KINDS.items():
            tensor = rest.pop(f"{name}.{leaf}", None)
            parts[kind] += 0 if tensor is None else tensor.bytes
        columns = prod(layer.shape[1:])
        bits = sum(width * rows for width, rows in layer.entry.groups) / layer.shape[0]
        stored = f"{name}.qweight" in state
        layers.append(
            LayerSize(
                layer=name,
                role=layer.entry.role,
                weights=layer.shape[0] * columns if stored else 0,
                bits=bits,
                **parts,
            )
        )
    if not layers:
        raise InputError(f"{type(model).__name__}: no packed layers")
    other = sum(tensor.bytes for tensor in rest.values())
    plain = sum(prod(tensor.shape) for tensor in rest.values() if len(tensor.shape) > 1)
    accounted = other + sum(layer.bytes for layer in layers)
    weights = plain + sum(layer.weights for layer in layers)
    return SizeReport(
        layers=layers,
        roles=_roles(layers),
        other=other,
        weights=weights,
        accounted=accounted,
        bits=_average(layers),
        bits_per_weight=8 * accounted / weights,
        disk=disk,
    )


def _roles(layers: list[LayerSize]) -> list[RoleSize]:
    found = []
    for role in dict.fromkeys(layer.role for layer in layers):
        members = [layer for layer in layers if layer.role == role]
        found.append(
            RoleSize(
                role=role,
                layers=len(members),
                weights=sum(layer.weights for layer in members),
                bits=_average(members),
                bytes=sum(layer.bytes for layer in members),
            )
        )
    return found


def _average(layers: Iterable[LayerSize]) -> float:
    layers = list(layers)
    weights = sum(layer.weights for layer in layers)
    return sum(layer.bits * layer.weights for layer in layers) / weights if weights else 0.0
