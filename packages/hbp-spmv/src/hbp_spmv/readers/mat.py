# SPDX-License-Identifier: Apache-2.0
"""MATLAB files up to version 7: the sparse variables, every length checked.

``scipy.io.loadmat`` (1.17) crashes the interpreter on some damaged version 5 files, so these are
parsed here; only version 4, which it reads in Python, is left to it.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp_spmv.errors import ReadError
from hbp_spmv.readers.compressed import compressed_raw
from hbp_spmv.readers.finish import Options, Raw, check_memory, memory_bound

__all__ = ["read_mat"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_MATRIX, _COMPRESSED = 14, 15
_NUMBER_TYPES = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"
}  # fmt: skip
_CLASSES = (
    *("unknown", "cell", "struct", "object", "char", "sparse", "double", "single", "int8"),
    *("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "function", "opaque"),
)
_COMPLEX_FLAG = 0x0800
_HEAD_BYTES = 1 << 12  # holds the class, the dimensions and the name of a variable


def read_mat(path: Path, name: str | None, options: Options) -> Raw:
    """Read a sparse variable of a MATLAB file, the first one without ``name``.

    Raises:
        ReadError: Version 7.3, damaged, or without such a variable; the text lists what there is.
    """
    limit = memory_bound(options.max_memory)
    with path.open("rb") as file:
        head = file.read(128)
        file.seek(512)
        if head.startswith((b"MATLAB 7.3", _HDF5)) or file.read(8) == _HDF5:
            raise ReadError(
                f"{path}: a MATLAB 7.3 (HDF5) file, expected version 7 or older; "
                "save it in MATLAB with the option '-v7'"
            )
    order = {b"IM": "<", b"MI": ">"}.get(head[126:128])
    if order is None:
        return _read_version_4(path, name, limit)
    variables = {found.name: found for found in _variables(path, order)}
    chosen = _choose(path, name, {key: (v.shape, v.kind) for key, v in variables.items()})
    variable = variables[chosen]
    where = f"{path}:{chosen}"
    body = _Elements(where, variable.unpack(limit), order)
    body.skip_head()
    rows, starts, values = body.numbers(), body.numbers(), body.numbers()
    if variable.is_complex:
        imaginary = body.numbers()
        if len(imaginary) != len(values):
            raise ReadError(
                f"{where}: {len(values)} real and {len(imaginary)} imaginary parts, "
                "expected as many; the file is damaged"
            )
        values = values + 1j * imaginary
    nnz = int(starts[-1]) if len(starts) else 0
    if not 0 <= nnz <= min(len(rows), len(values)):
        raise ReadError(
            f"{where}: {len(rows)} row indices and {len(values)} values, expected {nnz}; "
            "the file is damaged"
        )
    return _csc(where, variable.shape, len(variables), values[:nnz], rows[:nnz], starts, limit)


def _csc(
    where: str,
    shape: tuple[int, ...],
    count: int,
    values: npt.NDArray,
    rows: npt.NDArray,
    starts: npt.NDArray,
    limit: int,
) -> Raw:
    size = (shape[0], shape[1])
    check_memory(where, size, len(values), values.dtype, limit)
    if rows.dtype.kind == "f" or starts.dtype.kind == "f":
        raise ReadError(f"{where}: indices are floating point, expected integers")
    parts = {"indices": rows, "indptr": starts, "data": values, "shape": size}
    return compressed_raw(
        SimpleNamespace(format="csc", **parts),
        where=where,
        format="mat",
        header=f"{where.rpartition(':')[2]}: sparse {size[0]} x {size[1]} of {count} variables",
        shape=size,
    )


@dataclass(frozen=True, slots=True)
class _Variable:
    """A top-level variable and where its bytes are."""

    path: Path
    name: str
    kind: str
    is_complex: bool
    shape: tuple[int, ...]
    offset: int
    length: int
    packed: bool

    def unpack(self, limit: int) -> bytes:
        """Return the bytes of the variable, or refuse if there are more than ``limit``."""
        where = f"{self.path}:{self.name}"
        body = _body(self.path, self.offset, self.length, self.packed, limit + 1)
        if len(body) > limit:
            raise ReadError(
                f"{where}: more than {limit / 1e9:.3g} GB when unpacked, which is the limit; "
                "raise --max-memory if that is meant"
            )
        return body


class _Elements:
    """The elements of one variable in turn; each read is checked against the end."""

    def __init__(self, where: str, body: bytes, order: str) -> None:
        self._where, self._body, self._order, self._position = where, body, order, 0

    def next(self) -> tuple[int, bytes]:
        """Return the type and the content of the next element."""
        kind, length = self._tag()
        if kind >> 16:  # the short form: both in one word, four bytes of content behind it
            kind, length, start = kind & 0xFFFF, kind >> 16, self._position + 4
            end, legal = start + 4, length <= 4
        else:
            start = self._position + 8
            end, legal = start + length + -length % 8, True
        if not legal or start + length > len(self._body):
            raise ReadError(
                f"{self._where}: an element of {length} bytes at {start} of {len(self._body)}; "
                "the file is truncated or damaged"
            )
        self._position = end
        return kind, self._body[start : start + length]

    def numbers(self) -> npt.NDArray[Any]:
        """Return the next element as an array of numbers."""
        kind, content = self.next()
        code = _NUMBER_TYPES.get(kind)
        if code is None or len(content) % int(code[1]):
            raise ReadError(
                f"{self._where}: an element of type {kind} with {len(content)} bytes, expected "
                "an array of numbers; the file is damaged"
            )
        return np.frombuffer(content, dtype=self._order + code).astype(code)

    def skip_head(self) -> None:
        """Step over the tag of the variable, its flags, dimensions and name."""
        self._position = 8
        for _ in range(3):
            self.next()

    def head(self) -> tuple[str, int, tuple[int, ...], str]:
        """Return the class, the flags, the dimensions and the name of the variable."""
        kind, _ = self._tag()
        if kind != _MATRIX:
            raise ReadError(f"{self._where}: an element of type {kind}, expected a variable")
        self._position = 8
        flags, dims = self.numbers(), self.numbers()
        _, name = self.next()
        if len(flags) != 2 or flags.dtype.kind == "f" or dims.dtype.kind == "f" or len(dims) < 2:
            raise ReadError(f"{self._where}: a variable without dimensions; the file is damaged")
        word = int(flags[0])
        number = word & 0xFF
        kind_name = _CLASSES[number] if number < len(_CLASSES) else "unknown"
        if min(dims) < 0:
            raise ReadError(f"{self._where}: dimensions {dims.tolist()}; the file is damaged")
        return kind_name, word, tuple(map(int, dims)), name.decode("latin-1")

    def _tag(self) -> tuple[int, int]:
        words = self._body[self._position : self._position + 8]
        if len(words) < 8:
            raise ReadError(
                f"{self._where}: ends after {len(self._body)} bytes, expected a further element; "
                "the file is truncated or damaged"
            )
        kind, length = np.frombuffer(words, dtype=self._order + "u4")
        return int(kind), int(length)


def _variables(path: Path, order: str) -> Iterator[_Variable]:
    """List the variables of a version 5 file from the first bytes of each."""
    size, position = path.stat().st_size, 128
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            tag = np.frombuffer(file.read(8).ljust(8, b"\xff"), dtype=order + "u4")
            kind, length = int(tag[0]), int(tag[1])
            if position + 8 + length > size:
                raise ReadError(
                    f"{path}: {size} bytes, expected {position + 8 + length} or more; "
                    "the file is truncated"
                )
            if kind in (_MATRIX, _COMPRESSED):
                packed = kind == _COMPRESSED
                where = f"{path}: variable at byte {position}"
                head = _body(path, position, length, packed, _HEAD_BYTES)
                kind_name, flags, shape, name = _Elements(where, head, order).head()
                if name:
                    yield _Variable(
                        path, name, kind_name, bool(flags & _COMPLEX_FLAG), shape, position,
                        length, packed,
                    )  # fmt: skip
            position += 8 + length


def _body(path: Path, offset: int, length: int, packed: bool, most: int) -> bytes:
    """Return the first bytes of a variable, its own tag included, at most ``most`` of them."""
    with path.open("rb") as file:
        if not packed:
            file.seek(offset)
            return file.read(min(length + 8, most))
        file.seek(offset + 8)
        unpacker, parts, size, left = zlib.decompressobj(), [], 0, length
        try:
            while left and size < most and not unpacker.eof:
                data = file.read(min(1 << 20, left))
                left -= len(data)
                while data and size < most:
                    parts.append(unpacker.decompress(data, min(1 << 20, most - size)))
                    size += len(parts[-1])
                    data = unpacker.unconsumed_tail
        except zlib.error as error:
            raise ReadError(
                f"{path}: the compressed variable at byte {offset} is damaged ({error})"
            ) from error
    return b"".join(parts)


def _read_version_4(path: Path, name: str | None, limit: int) -> Raw:
    from scipy.io import loadmat, whosmat

    try:
        kinds = {entry[0]: (tuple(entry[1]), entry[2]) for entry in whosmat(str(path))}
        chosen = _choose(path, name, kinds)
        where, shape = f"{path}:{chosen}", kinds[chosen][0]
        check_memory(where, (shape[0], shape[1]), 0, np.dtype("f8"), limit)
        matrix = loadmat(str(path), variable_names=[chosen])[chosen].tocsc()
    except ReadError:
        raise
    except Exception as error:  # scipy's parser raises almost any type on damaged files
        reason = f"{type(error).__name__}: {error}"
        raise ReadError(
            f"{path}: cannot be read as a MATLAB file ({reason}); it is damaged or no such file"
        ) from error
    return _csc(where, matrix.shape, len(kinds), matrix.data, matrix.indices, matrix.indptr, limit)


def _choose(path: Path, name: str | None, kinds: dict[str, tuple[tuple[int, ...], str]]) -> str:
    sparse = [key for key, (shape, kind) in kinds.items() if kind == "sparse" and len(shape) == 2]
    if name in sparse or (name is None and sparse):
        return name or sparse[0]
    shown = [
        f"{key} ({kind} {' x '.join(map(str, shape))})"
        for key, (shape, kind) in list(kinds.items())[:10]
    ]
    wanted = "a sparse variable" if name is None else f"a sparse variable {name!r}"
    found = ", ".join(shown) or "no variable"
    raise ReadError(f"{path}: found {found}, expected {wanted}; choose one as 'file.mat:name'")
