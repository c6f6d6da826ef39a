# SPDX-License-Identifier: Apache-2.0
"""The common end of all readers: raw entries in, one checked canonical CSR matrix out."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from tenfold_core.errors import InputError, TenfoldWarning
from tenfold_core.sparse import CSR

from hbp_spmv.building import parse_dtype
from hbp_spmv.errors import ReadError
from hbp_spmv.readers.text import EXACT

__all__ = ["Options", "Raw", "ReadInfo", "check_memory", "finish", "memory_bound"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadInfo:
    """What the source held before it became a matrix."""

    format: str
    """``matrix-market``, ``npz``, ``mat``, ``metis``, ``edgelist``, or the library of an object."""
    header: str
    """What the source says about itself, in its own words."""
    shape: tuple[int, int]
    """Rows and columns of the matrix."""
    stored_entries: int
    """Entries written in the source."""
    expanded_entries: int
    """Entries after a symmetric source is expanded, before duplicates are summed."""
    nnz: int
    """Entries of the matrix."""
    duplicates: int
    """Entries that were added to an earlier one."""
    explicit_zeros: int
    """Stored entries with the value zero, before ``drop_zeros``."""
    non_finite: int
    """Stored entries that are NaN or infinite."""
    symmetry: str
    """``general``, ``symmetric``, ``skew-symmetric`` or ``hermitian``, as the source declares."""
    source: str | None = None
    """The path as it was given; None for an object in memory."""
    index_base: int | None = None
    """The smallest index the source may use, 0 or 1, where it has indices in text."""
    sha256: str | None = None
    """Digest of the file's bytes, if it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller of a reader decided; the fields are explained at :func:`read`."""

    banner: bool = True
    max_memory: int | None = None
    sum_duplicates: bool = True
    finite: bool = False
    drop_zeros: bool = False
    dtype: npt.DTypeLike | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """Entries as a source holds them: by rows with ``indptr``, or as triplets with ``rows``."""

    where: str
    format: str
    header: str
    shape: tuple[int, int]
    columns: npt.NDArray[Any]
    values: npt.NDArray[Any]
    indptr: npt.NDArray[Any] | None = None
    rows: npt.NDArray[Any] | None = None
    stored: int | None = None
    symmetry: str = "general"
    index_base: int | None = None


def finish(raw: Raw, options: Options) -> tuple[csr_array, ReadInfo]:
    """Check every index and value of ``raw`` and build its canonical matrix.

    Raises:
        ReadError: An index is outside the matrix, or a value is not allowed by ``options``.
    """
    check_memory(raw.where, raw.shape, len(raw.values), raw.values.dtype, options.max_memory)
    values = _numbers(raw.where, raw.values)
    matrix = _by_rows(raw, values) if raw.rows is None else _by_triplets(raw, values)
    expanded = matrix.nnz
    matrix = _narrow(matrix)
    matrix.sort_indices()
    if not options.sum_duplicates:
        _refuse_duplicates(raw, matrix)
    matrix.sum_duplicates()
    non_finite = _count_non_finite(raw, matrix, refuse=options.finite)
    zeros = int(np.count_nonzero(matrix.data == 0))
    duplicates = expanded - matrix.nnz
    if options.drop_zeros and zeros:
        matrix.eliminate_zeros()
    matrix = cast(raw.where, matrix, options.dtype)
    info = ReadInfo(
        format=raw.format,
        header=raw.header,
        shape=raw.shape,
        stored_entries=expanded if raw.stored is None else raw.stored,
        expanded_entries=expanded,
        nnz=matrix.nnz,
        duplicates=duplicates,
        explicit_zeros=zeros,
        non_finite=non_finite,
        symmetry=raw.symmetry,
        index_base=raw.index_base,
    )
    return matrix, info


def memory_bound(max_memory: int | None) -> int:
    """Return the bytes a read may take: as given, or half of the machine's."""
    if max_memory is not None:
        return max_memory
    from tenfold_core.device import memory_limit

    return memory_limit() // 2


def check_memory(
    where: str, shape: tuple[int, int], nnz: int, dtype: np.dtype, max_memory: int | None
) -> None:
    """Refuse a matrix that is too large before anything is allocated for it.

    Counted are the triplets, the CSR arrays, and one x and one y.

    Raises:
        ReadError: The estimate is above ``max_memory``, or half of the machine's memory.
    """
    rows, columns = shape
    index = 4 if max(rows, columns, nnz) < 2**31 else 8
    value = max(dtype.itemsize, 8)
    need = nnz * (3 * index + 2 * value) + (rows + 1) * index + (rows + columns) * value
    limit = memory_bound(max_memory)
    if need > limit:
        raise ReadError(
            f"{where}: {rows} x {columns} with {nnz} entries needs about {need / 1e9:.3g} GB, "
            f"the limit is {limit / 1e9:.3g} GB; check the declared size or raise --max-memory"
        )


def cast(where: str, matrix: csr_array, dtype: npt.DTypeLike | None) -> csr_array:
    """Convert the values to ``dtype`` if one is given, never losing a part or the range.

    Raises:
        ConfigError: ``dtype`` is not a type that the package computes with.
        ReadError: Values are complex or too large for ``dtype``.
    """
    if dtype is None:
        return matrix
    target = parse_dtype(dtype)
    if target == matrix.dtype:
        return matrix
    if matrix.dtype.kind == "c" and target.kind != "c":
        raise ReadError(
            f"{where}: values are complex, expected real ones for {target.name}; "
            "read without dtype and take .real if that is meant"
        )
    with np.errstate(over="ignore"):
        data = matrix.data.astype(target)
    lost = np.isfinite(matrix.data) & ~np.isfinite(data)
    if lost.any():
        raise ReadError(
            f"{where}: value {matrix.data[int(np.argmax(lost))]} is beyond the range of "
            f"{target.name}; read as float64"
        )
    return csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape)


def _numbers(where: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Copy values into a floating type that holds each of them exactly."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind in "iu" and values.size and max(int(values.max()), -int(values.min())) > EXACT:
        extreme = max(int(values.max()), int(values.min()), key=abs)
        raise ReadError(
            f"{where}: integer {extreme} is beyond 2**53 and has no exact float64; "
            "convert the values to floating point to accept rounding"
        )
    if kind in "biu":
        return values.astype(np.float64)
    if (kind == "f" and size <= 8) or (kind == "c" and size <= 16):
        return values.astype(np.float32 if size == 2 else values.dtype.newbyteorder("="))
    raise ReadError(
        f"{where}: values are of dtype {values.dtype}, expected numbers of at most "
        "double precision; convert them first"
    )


def _by_rows(raw: Raw, values: npt.NDArray[Any]) -> csr_array:
    starts: Any = raw.indptr
    try:
        checked = CSR(raw.shape, starts, raw.columns, values).check()
    except InputError as error:
        raise ReadError(f"{raw.where}: {error}") from error
    parts = (checked.data, checked.indices.copy(), checked.indptr.copy())
    return csr_array(parts, shape=raw.shape)


def _by_triplets(raw: Raw, values: npt.NDArray[Any]) -> csr_array:
    """Order triplets by rows without summing any."""
    base = raw.index_base or 0
    named: tuple[tuple[str, Any, int], ...] = (
        ("row", raw.rows, raw.shape[0]),
        ("column", raw.columns, raw.shape[1]),
    )
    for name, index, size in named:
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise ReadError(
                f"{raw.where}: {name} indices are {index.ndim}-D of dtype {index.dtype}, "
                "expected 1-D integers"
            )
        if len(index) != len(values):
            raise ReadError(
                f"{raw.where}: {len(index)} {name} indices for {len(values)} values; "
                "the arrays belong to different matrices or were cut"
            )
        wrong = (index < 0) | (index >= size)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise ReadError(
                f"{raw.where}: {name} {int(index[place]) + base} of entry {place} is outside "
                f"{base}..{size - 1 + base}; the indices or the shape are wrong"
            )
    triplets = coo_array((values, (raw.rows, raw.columns)), shape=raw.shape)
    triplets.has_canonical_format = True  # keeps tocsr from summing: duplicates are counted later
    matrix = triplets.tocsr()
    matrix.has_canonical_format = matrix.has_sorted_indices = False
    return matrix


def _narrow(matrix: csr_array) -> csr_array:
    """Give the matrix int32 indices where they suffice, else int64."""
    small = max(*matrix.shape, matrix.nnz) < 2**31
    index = np.int32 if small else np.int64
    parts = (
        matrix.data,
        matrix.indices.astype(index, copy=False),
        matrix.indptr.astype(index, copy=False),
    )
    return csr_array(parts, shape=matrix.shape)


def _place(raw: Raw, matrix: csr_array, entry: int) -> str:
    base = raw.index_base or 0
    row = int(np.searchsorted(matrix.indptr, entry, side="right")) - 1
    return f"({row + base}, {int(matrix.indices[entry]) + base}), counted from {base}"


def _refuse_duplicates(raw: Raw, matrix: csr_array) -> None:
    same = matrix.indices[1:] == matrix.indices[:-1]
    starts = matrix.indptr[1:-1]
    same[starts[(starts > 0) & (starts < matrix.nnz)] - 1] = False
    if same.any():
        raise ReadError(
            f"{raw.where}: {np.count_nonzero(same)} entries repeat an earlier position, the first "
            f"at {_place(raw, matrix, int(np.argmax(same)))}; leave out --no-sum to add them up"
        )


def _count_non_finite(raw: Raw, matrix: csr_array, *, refuse: bool) -> int:
    odd = ~np.isfinite(matrix.data)
    count = int(np.count_nonzero(odd))
    if count:
        place = _place(raw, matrix, int(np.argmax(odd)))
        text = f"{raw.where}: {count} of {matrix.nnz} values are NaN or infinite, first at {place}"
        if refuse:
            raise ReadError(f"{text}; leave out --finite to keep them")
        warnings.warn(f"{text}; they are kept", TenfoldWarning, stacklevel=2)
    return count
