# SPDX-License-Identifier: Apache-2.0
"""SciPy's ``.npz`` archives; sizes are checked before they are believed, nothing is unpickled."""

import math
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import dia_array

from hbp_spmv.errors import ReadError
from hbp_spmv.readers.compressed import compressed_raw
from hbp_spmv.readers.finish import Options, Raw, check_memory, memory_bound

__all__ = ["read_npz"]

_NPZ_KEYS = {
    "csr": ("indptr", "indices", "data"),
    "csc": ("indptr", "indices", "data"),
    "bsr": ("indptr", "indices", "data"),
    "coo": ("row", "col", "data"),
    "dia": ("offsets", "data"),
}
_ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)


def read_npz(path: Path, options: Options) -> Raw:
    """Read a matrix written by ``scipy.sparse.save_npz``; nothing is ever unpickled.

    Raises:
        ReadError: Not such an archive, a key is missing, or the arrays do not fit together.
    """
    limit = memory_bound(options.max_memory)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            total = sum(info.file_size for info in members.values())
            if total > limit:
                raise ReadError(
                    f"{path}: {total / 1e9:.3g} GB when unpacked, the limit is "
                    f"{limit / 1e9:.3g} GB; raise --max-memory if that is meant"
                )
            kind = _format_name(path, archive, members)
            names = ("shape", *_NPZ_KEYS[kind])
            arrays = {name: _member(path, archive, members, name) for name in names}
    except _ZIP_FAULTS as error:
        raise ReadError(f"{path}: the archive is damaged ({error}); write it again") from error
    shape = arrays["shape"]
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or shape.min() < 0:
        raise ReadError(
            f"{path}: shape is {shape.tolist()}, expected two counts that are not negative"
        )
    size = (int(shape[0]), int(shape[1]))
    check_memory(str(path), size, arrays["data"].size, arrays["data"].dtype, limit)
    where, header = str(path), f"scipy.sparse {kind} {size[0]} x {size[1]}"
    return _npz_raw(kind, arrays, where=where, header=header, shape=size)


def _npz_raw(kind: str, arrays: dict[str, npt.NDArray], **known: Any) -> Raw:
    found, expected = arrays["data"].ndim, {"bsr": 3, "dia": 2}.get(kind, 1)
    if found != expected:
        raise ReadError(f"{known['where']}: data is {found}-D, expected {expected}-D for {kind}")
    if kind == "dia":
        try:
            matrix = dia_array((arrays["data"], arrays["offsets"]), shape=known["shape"])
        except (ValueError, TypeError, IndexError) as error:
            raise ReadError(f"{known['where']}: {error}; the arrays do not fit together") from error
    else:
        matrix = SimpleNamespace(format=kind, **arrays | {"shape": known["shape"]})
    return compressed_raw(matrix, format="npz", **known)


def _format_name(path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> str:
    if "format" not in members:
        raise ReadError(
            f"{path}: found the arrays {', '.join(sorted(members))[:80] or 'none'}, expected "
            "'format', 'shape' and 'data'; write the file with scipy.sparse.save_npz"
        )
    name = _member(path, archive, members, "format")
    text = name.item() if name.ndim == 0 and name.dtype.kind in "SU" else b"?"
    kind = text.decode("latin-1") if isinstance(text, bytes) else text
    if kind not in _NPZ_KEYS:
        raise ReadError(f"{path}: format is {kind[:40]!r}, expected {', '.join(_NPZ_KEYS)}")
    return kind


def _member(
    path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], name: str
) -> npt.NDArray:
    """Read one array after its header was compared with the size of the archive's entry."""
    where = f"{path}: array {name!r}"
    if name not in members:
        raise ReadError(f"{where} is missing; write the file with scipy.sparse.save_npz")
    info = members[name]
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            parse = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, by_columns, dtype = parse(file)
        except (ValueError, KeyError, TypeError, SyntaxError) as error:
            raise ReadError(f"{where} has no valid .npy header; the file is damaged") from error
        if dtype.hasobject:
            raise ReadError(
                f"{where} holds pickled Python objects, expected numbers; it is not read"
            )
        promised, present = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if promised != present or min(shape, default=0) < 0:
            raise ReadError(
                f"{where} has {present} bytes, expected {promised} for shape {shape}; "
                "the file is truncated or its header wrong"
            )
        raw = file.read()
    if len(raw) != promised:
        raise ReadError(f"{where} has {len(raw)} bytes, expected {promised}; it is truncated")
    array = np.frombuffer(raw, dtype=dtype) if promised else np.empty(0, dtype)
    return array.reshape(shape, order="F" if by_columns else "C")
