# SPDX-License-Identifier: Apache-2.0
"""Tensor files that are checked before they are trusted, and tokens for resuming.

A tensor file is a `safetensors` file: eight bytes with the header's length, a JSON header, the
data. It is written and mapped here with NumPy alone, so reading one needs no framework; the
safetensors library reads the same files.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from tenfold_core.errors import CheckpointError, InputError
from tenfold_core.run.atomic import atomic_directory, atomic_path

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "TensorFile",
    "TensorInfo",
    "atomic_directory",
    "atomic_path",
    "load_tensors",
    "read_header",
    "require_token",
    "resume_token",
    "save_tensors",
]

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself
_MAX_DIMS = 64  # NumPy's own limit
_NUMPY_NAME = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "F16": "float16", "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64",
    "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_SIZE = {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1} | {
    code: 1 if name == "bool" else int(name.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8
    for code, name in _NUMPY_NAME.items()
}
_CHECKSUM = "sha256"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes ``start`` to ``stop`` counted from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The checked header of a tensor file."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def save_tensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, "np.ndarray"],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays and string metadata as one safetensors file, atomically.

    The metadata gains the SHA-256 of the data section, which ``load_tensors(verify=True)`` checks.

    Raises:
        InputError: A dtype the format does not know, or metadata that is not text.
    """
    import numpy as np

    codes = {name: code for code, name in _NUMPY_NAME.items()}
    header: dict[str, Any] = {}
    blocks: list[np.ndarray] = []
    position = 0
    # Widest items first: every tensor then starts at a multiple of its item size.
    order = sorted(arrays, key=lambda name: (-np.asarray(arrays[name]).itemsize, name))
    for name in order:
        array = np.asarray(arrays[name])
        if array.dtype.name not in codes:
            raise InputError(
                f"{path}: tensor {name!r} has dtype {array.dtype}, "
                f"expected one of {', '.join(codes)}; convert it first"
            )
        little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        blocks.append(little)
        header[name] = {
            "dtype": codes[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, position + little.nbytes],
        }
        position += little.nbytes
    texts = dict(metadata or {})
    if any(not isinstance(part, str) for pair in texts.items() for part in pair):
        raise InputError(f"{path}: metadata must map text to text; encode the values as JSON")
    views = [block.reshape(-1).view(np.uint8) for block in blocks if block.size]
    digest = hashlib.sha256()
    for view in views:
        digest.update(view.data)
    header["__metadata__"] = texts | {_CHECKSUM: digest.hexdigest()}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for view in views:
            file.write(view.data)


def read_header(path: str | os.PathLike[str]) -> TensorFile:
    """Read and check a tensor file's header before anything of its claimed size is allocated.

    Raises:
        CheckpointError: The file is truncated or its header is not consistent; the text names
            the field.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise CheckpointError(
                    f"{path}: header length {length} does not fit a file of {size} bytes; "
                    "the file is truncated or not a safetensors file"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: field '__metadata__' must map text to text")
    base = 8 + length
    tensors = {name: _tensor_info(path, name, entry, base) for name, entry in header.items()}
    _check_tiling(path, tensors, base, size)
    return TensorFile(path, tensors, metadata, base)


def load_tensors(
    path: str | os.PathLike[str], *, mmap: bool = True, verify: bool = False
) -> tuple[dict[str, "np.ndarray"], dict[str, str]]:
    """Return the tensors as NumPy arrays, read-only views of the file with ``mmap``, and metadata.

    Raises:
        CheckpointError: As :func:`read_header`; a dtype NumPy does not have; with ``verify``, a
            missing or different checksum.
    """
    import numpy as np

    found = read_header(path)
    for name, info in found.tensors.items():
        if info.dtype not in _NUMPY_NAME:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {info.dtype}, which NumPy does not have; "
                "read the file with safetensors.torch"
            )
    size = max((info.stop for info in found.tensors.values()), default=found.data_start)
    if size == found.data_start:
        raw = np.empty(size, np.uint8)
    elif mmap:
        raw = np.memmap(path, np.uint8, mode="r", shape=(size,))
    else:
        raw = np.fromfile(path, np.uint8, count=size)
    if verify:
        expected = found.metadata.get(_CHECKSUM)
        if hashlib.sha256(raw[found.data_start :].data).hexdigest() != expected:
            raise CheckpointError(
                f"{path}: the data do not have the recorded {_CHECKSUM} {expected}; "
                "the file was changed after it was written, make it again"
            )
    return {name: _view(raw, info) for name, info in found.tensors.items()}, found.metadata


def resume_token(*parts: Any) -> str:
    """Return a short fingerprint of the settings and inputs that a resumed run must share."""
    from tenfold_core.run.rows import plain

    text = json.dumps(plain(list(parts)), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_token(path: str | os.PathLike[str], found: str | None, expected: str) -> None:
    """Refuse to continue a run whose settings or inputs differ.

    Raises:
        CheckpointError: The tokens differ.
    """
    if found != expected:
        raise CheckpointError(
            f"{path}: written by a run with other settings or inputs (token {found}, now "
            f"{expected}); repeat the old command or start without --resume"
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    def fail(field: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: tensor {name!r}: {field} is {value!r}, expected {expected}"
        )

    if not isinstance(entry, dict):
        raise fail("entry", entry, "an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _SIZE:
        raise fail("dtype", dtype, f"one of {', '.join(_SIZE)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise fail("shape", shape, f"a list of at most {_MAX_DIMS} counts")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("data_offsets", offsets, "two ascending counts")
    if math.prod(shape) * _SIZE[dtype] != offsets[1] - offsets[0]:
        expected = f"{math.prod(shape) * _SIZE[dtype]} bytes for {dtype} {shape}"
        raise fail("data_offsets", offsets, expected)
    return TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        for value in values
    )


def _check_tiling(path: Path, tensors: dict[str, TensorInfo], base: int, size: int) -> None:
    """Require that the tensors fill the data section without a gap or an overlap."""
    position = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            raise CheckpointError(
                f"{path}: tensor {name!r}: data_offsets start at {info.start - base}, "
                f"expected {position - base}; tensors overlap or leave a gap"
            )
        position = info.stop
    if position != size:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes, the file has {size}; "
            "it was truncated or something was appended"
        )


def _view(raw: "np.ndarray", info: TensorInfo) -> "np.ndarray":
    import numpy as np

    dtype = np.dtype(_NUMPY_NAME[info.dtype]).newbyteorder("<")
    flat = np.frombuffer(raw, np.uint8)[info.start : info.stop].view(dtype)
    return flat.reshape(info.shape)
