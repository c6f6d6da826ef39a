# SPDX-License-Identifier: Apache-2.0
"""The tensors of a model whose modules were replaced by packed ones, in memory and in files.

Nothing here knows how weights are packed, and nothing needs more than torch.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tenfold_core.errors import InputError
from tenfold_core.run.checkpoint import TensorInfo, read_header

__all__ = [
    "bits_of",
    "check_files",
    "check_numbers",
    "find_module",
    "float_of",
    "replace_module",
    "stored_bytes",
    "tied_names",
]

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CODES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16",
    torch.int16: "I16", torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
    torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}  # fmt: skip
_SMALL_NUMBER = 1 << 16  # a number this small harms no builder, whatever it counts


def bits_of(values: Tensor) -> Tensor:
    """View floats as integers of the same width, which no loader and no ``.to(dtype)`` casts.

    Raises:
        InputError: The values are not floats.

    Example:
        >>> bits_of(torch.tensor([1.0, -2.0], dtype=torch.float16))
        tensor([ 15360, -16384], dtype=torch.int16)
    """
    if not values.is_floating_point():
        raise InputError(f"values are {values.dtype}, expected floats to view as integers")
    return values.view(_INTEGER[values.dtype.itemsize])


def float_of(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """View the integers that :func:`bits_of` gave as the floats they came from.

    Raises:
        InputError: The integers are not as wide as ``dtype``.
    """
    if bits.dtype != _INTEGER[dtype.itemsize]:
        raise InputError(f"bits are {bits.dtype}, expected {_INTEGER[dtype.itemsize]} for {dtype}")
    return bits.view(dtype)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule of that dotted name.

    Raises:
        InputError: There is none; the text says up to where the name is right.
    """
    found = model
    for depth, part in enumerate(name.split(".")):
        child = getattr(found, part, None)  # named_children would leave out second names
        if not isinstance(child, nn.Module):
            known = ".".join(name.split(".")[:depth]) or type(model).__name__
            parts = [key for key, _ in found.named_children()][:8]
            raise InputError(
                f"module {name!r}: {known} has no part {part!r}, only "
                f"{', '.join(parts) or 'no parts at all'}; "
                "the names must be those of the model that was quantized"
            )
        found = child
    return found


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` is, and wherever else the model uses that same module.

    Raises:
        InputError: The model has no such submodule.
    """
    old = find_module(model, name)
    places = [place for place, found in model.named_modules(remove_duplicate=False) if found is old]
    for place in places:
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Map each further name of a tensor in the state dict to the first name it has."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return tied


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of the state dict, each tied tensor once: what a file's data section has."""
    tied = tied_names(model)
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in tied
    )


def check_numbers(name: str, entry: Any, module: nn.Module) -> None:
    """Refuse a description with a number that no module of this size can have.

    A builder may loop over what a file claims; this bounds it before it starts.

    Raises:
        InputError: A number exceeds both the module's own size and 65,536.
    """
    limit = max(sum(tensor.numel() for tensor in module.parameters()), _SMALL_NUMBER)
    pending = [entry]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
        elif isinstance(value, (int, float)) and not abs(value) <= limit:
            raise InputError(
                f"config.json: quantization_config: module {name!r} claims {value}, "
                f"expected at most {limit}, its number of weights"
            )


def check_files(
    files: Iterable[str | os.PathLike[str]],
    expected: Mapping[str, Tensor],
    *,
    exact: Iterable[str] = (),
    absent: Iterable[str] = (),
    ignored: Iterable[str] = (),
) -> None:
    """Compare the headers of tensor files with what a model expects, before reading any data.

    Args:
        files: All safetensors files of one checkpoint.
        expected: The model's state dict; its tensors may be on the meta device.
        exact: Names whose dtype must be the expected one; elsewhere a loader may cast floats.
        absent: Names that need not be in the files.
        ignored: Patterns of names that may be in the files without being expected.

    Raises:
        InputError: A tensor is missing, unknown, stored twice, or of another shape or dtype.
        CheckpointError: A file's header is damaged.
    """
    files, exact, absent = [os.fspath(path) for path in files], set(exact), set(absent)
    found: dict[str, tuple[str, TensorInfo]] = {}
    for path in files:
        if not path.endswith(".safetensors"):
            raise InputError(f"{path}: expected a .safetensors file; other formats are not read")
        for name, info in read_header(path).tensors.items():
            if name in found:
                raise InputError(f"{path}: tensor {name!r} is also in {found[name][0]}")
            found[name] = (path, info)
    missing = [name for name in expected if name not in found and name not in absent]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{', '.join(files)}: tensor {missing[0]!r}{more} is missing, expected "
            f"{_text(_code(expected[missing[0]]), expected[missing[0]].shape)}"
        )
    for name, (path, info) in found.items():
        text = f"{path}: tensor {name!r}: found {_text(info.dtype, info.shape)}"
        if name not in expected:
            if any(re.search(pattern, name) for pattern in ignored):
                continue
            raise InputError(f"{text}, expected no tensor of that name")
        tensor = expected[name]
        same = info.dtype == _code(tensor) or (name not in exact and _castable(info, tensor))
        if not same or info.shape != tuple(tensor.shape):
            raise InputError(
                f"{text}, expected {_text(_code(tensor), tensor.shape)}; "
                "the file and its config.json are not from one run"
            )


def _castable(info: TensorInfo, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and "F" in info.dtype


def _code(tensor: Tensor) -> str:
    return _CODES.get(tensor.dtype, str(tensor.dtype))


def _text(code: str, shape: Iterable[int]) -> str:
    return f"{code} {tuple(shape)}"
