# SPDX-License-Identifier: Apache-2.0
"""Matrix Market files: SciPy's fast reader behind checks that bound what a file can ask for."""

import gzip
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenfold_core.errors import InputError, MissingExtraError, TenfoldWarning
from tenfold_core.run.atomic import atomic_path
from tenfold_core.sparse._market_body import Body, bad_line, count_entries
from tenfold_core.sparse._market_header import DAMAGED, Header, scan_header
from tenfold_core.sparse.csr import CSR

__all__ = ["MatrixMarketInfo", "read_matrix_market", "write_matrix_market"]

_EXACT = 2**53  # integers beyond it have no exact float64
_COUNT_LIMIT = 1 << 26  # bytes of text worth reading only to word an error


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixMarketInfo:
    """What a file held before it became a matrix; three counts that are often confused."""

    layout: str
    """``coordinate`` or ``array``."""
    field: str
    """``real``, ``integer``, ``unsigned-integer``, ``complex`` or ``pattern``."""
    symmetry: str
    """``general``, ``symmetric``, ``skew-symmetric`` or ``hermitian``."""
    file_entries: int
    """Entries written in the file."""
    expanded_entries: int
    """Entries after a symmetric file is expanded, before duplicates are summed."""
    nnz: int
    """Entries of the matrix."""
    duplicates: int
    """Entries that were added to an earlier one."""
    explicit_zeros: int
    """Stored entries with the value zero, before ``drop_zeros``."""
    non_finite: int
    """Stored entries that are NaN or infinite."""


def read_matrix_market(
    path: str | os.PathLike[str],
    *,
    max_memory: int | None = None,
    sum_duplicates: bool = True,
    finite: bool = False,
    drop_zeros: bool = False,
    banner: bool = True,
) -> tuple[CSR, MatrixMarketInfo]:
    """Read a plain or gzip-compressed Matrix Market file into a canonical CSR matrix.

    Symmetric, skew-symmetric and hermitian files are expanded, ``pattern`` becomes 1.0,
    integers become float64, complex values complex128.

    Args:
        path: The file; compression is recognised by its content.
        max_memory: Bytes the reading may take at its peak; half of the machine's by default.
        sum_duplicates: Add repeated entries up; otherwise they are an error.
        finite: Refuse NaN and infinity, which are otherwise kept with a warning.
        drop_zeros: Remove entries stored with the value zero.
        banner: Whether the file must begin with the ``%%MatrixMarket`` line.

    Raises:
        InputError: The file cannot be trusted; one line naming the file and, where one is at
            fault, the line.
        MissingExtraError: SciPy is not installed.
    """
    path = Path(path)
    try:
        from scipy.io import mmread
    except ImportError as error:
        raise MissingExtraError(
            f"{path}: reading Matrix Market needs SciPy: pip install 'tenfold-core[sparse]'"
        ) from error
    try:
        header = scan_header(path, banner=banner)
        _check_size(path, header, max_memory)
        coo = _read(path, header, mmread)
    except DAMAGED as error:
        raise InputError(
            f"{path}: the compressed data end early or are damaged ({error})"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    return _to_csr(path, header, coo, sum_duplicates, finite, drop_zeros)


def write_matrix_market(path: str | os.PathLike[str], matrix: Any, *, comment: str = "") -> None:
    """Write a CSR or SciPy sparse matrix, atomically, compressed if the name ends in ``.gz``.

    Raises:
        InputError: Not a sparse matrix.
        MissingExtraError: SciPy is not installed.
    """
    scipy_matrix = (matrix if isinstance(matrix, CSR) else CSR.from_scipy(matrix)).to_scipy()
    from scipy.io import mmwrite

    with atomic_path(path) as temporary, temporary.open("wb") as file:
        if Path(path).suffix == ".gz":
            with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
                mmwrite(packed, scipy_matrix.tocoo(), comment=comment, symmetry="general")
        else:
            mmwrite(file, scipy_matrix.tocoo(), comment=comment, symmetry="general")


def _check_size(path: Path, header: Header, max_memory: int | None) -> None:
    """Refuse what the file cannot contain or the memory cannot hold, before allocating it."""
    shortest = 2 * header.tokens * header.entries - 1  # one character and one separator a word
    if shortest > header.body_limit:
        found = "too few bytes for them"
        if header.body_limit < _COUNT_LIMIT:
            found = f"found {count_entries(path, header)}"
        raise InputError(
            f"{path}: the size line promises {header.entries} entries, {found}; "
            "the file is truncated or its size line is wrong"
        )
    if max_memory is None:
        from tenfold_core.device import memory_limit

        max_memory = memory_limit() // 2
    need = _peak_bytes(header)
    if need > max_memory:
        raise InputError(
            f"{path}: {header.rows} x {header.columns} with {header.entries} entries needs about "
            f"{need / 1e9:.3g} GB, the limit is {max_memory / 1e9:.3g} GB; "
            "check the size line or raise --max-memory"
        )


def _peak_bytes(header: Header) -> int:
    """Model the peak of reading: triplets, their expansion, the CSR arrays and one x and y."""
    value = 16 if header.field == "complex" else 8
    vectors = (header.rows + header.columns) * value
    if header.layout == "array":
        return header.rows * header.columns * (2 * value + 12) + vectors
    index = 4 if max(header.rows, header.columns, 2 * header.entries) < 2**31 else 8
    triplet = 2 * index + value
    copies = 3 if header.symmetry != "general" else 1  # the file's own and the expanded ones
    matrix = header.entries * (index + value) * (1 if header.symmetry == "general" else 2)
    return header.entries * triplet * copies + matrix + (header.rows + 1) * index + vectors


def _read(path: Path, header: Header, mmread: Any) -> Any:
    """Run SciPy's reader over the checked stream and turn its complaints into ours."""
    with Body(path, header) as body:
        try:
            found = mmread(body) if header.entries else _empty(header)
            while body.read():  # with no entries promised, nobody has read the text yet
                pass
        except InputError:
            raise
        except DAMAGED as error:
            complete = body.found_tokens // max(header.tokens, 1)
            raise InputError(
                f"{path}: the compressed data end early or are damaged ({error}): expected "
                f"{header.entries} entries, found about {complete}; fetch the file again"
            ) from error
        except (ValueError, OverflowError) as error:
            raise _explain(path, header, body.suspect_line, error) from None
    if body.found_tokens != header.entries * header.tokens:
        complete = body.found_tokens // max(header.tokens, 1)
        raise bad_line(path, header) or InputError(
            f"{path}: expected {header.entries} entries, found {complete}; "
            "the file is truncated or its size line is wrong"
        )
    return found


def _empty(header: Header) -> Any:
    """Build a matrix without entries; SciPy 1.17 divides by zero on text after such a header."""
    from scipy.sparse import coo_array

    dtype = np.complex128 if header.field == "complex" else np.float64
    return coo_array((header.rows, header.columns), dtype=dtype)


def _explain(path: Path, header: Header, suspect: int | None, error: Exception) -> InputError:
    text = str(error)
    if match := re.search(r"Truncated file. Expected another (\d+)", text):
        return InputError(
            f"{path}: expected {header.entries} entries, found {header.entries - int(match[1])}; "
            "the file is truncated or its size line is wrong"
        )
    match = re.match(r"Line (\d+): ", text)
    line = int(match[1]) - 2 + header.lines if match else None  # the stream's header: two lines
    if "Too many" in text:
        return InputError(
            f"{path}:{line}: more than the {header.entries} entries that the size line promises; "
            "the size line is wrong"
        )
    found = bad_line(path, header, line, only=True) if line else bad_line(path, header, suspect)
    return found or InputError(f"{path}: {text.strip()}; the file is damaged")


def _to_csr(
    path: Path, header: Header, found: Any, sum_duplicates: bool, finite: bool, drop_zeros: bool
) -> tuple[CSR, MatrixMarketInfo]:
    from scipy.sparse import coo_array

    coo = coo_array(found)  # from a coo_matrix, which shares its arrays, or a dense array
    _check_values(path, header, coo)
    csr = coo.tocsr()
    duplicates = coo.nnz - csr.nnz
    if duplicates and not sum_duplicates:
        raise InputError(
            f"{path}: {duplicates} entries repeat an earlier position, the first at "
            f"{_first_duplicate(coo)}; leave out --no-sum to add them up"
        )
    if csr.dtype.kind in "iu":
        _check_exact(path, header, csr.data)
        csr = csr.astype(np.float64)
    non_finite = int(np.count_nonzero(~np.isfinite(csr.data)))
    if non_finite:
        text = f"{path}: {non_finite} of {csr.nnz} values are NaN or infinite"
        if finite:
            raise InputError(f"{text}, expected finite ones; leave out --finite to keep them")
        warnings.warn(f"{text}; they are kept", TenfoldWarning, stacklevel=3)
    zeros = int(np.count_nonzero(csr.data == 0))
    if drop_zeros and zeros:
        csr.eliminate_zeros()
    csr.sort_indices()
    info = MatrixMarketInfo(
        layout=header.layout,
        field=header.field,
        symmetry=header.symmetry,
        file_entries=header.entries,
        expanded_entries=coo.nnz,
        nnz=csr.nnz,
        duplicates=duplicates,
        explicit_zeros=zeros,
        non_finite=non_finite,
    )
    return CSR.from_scipy(csr), info


def _check_values(path: Path, header: Header, coo: Any) -> None:
    """Check what the symmetry says about the diagonal, and that integers are exact."""
    if coo.dtype.kind in "iu":
        _check_exact(path, header, coo.data)
    if header.symmetry not in ("skew-symmetric", "hermitian"):
        return
    row, column = coo.row, coo.col
    diagonal = np.flatnonzero(row == column)
    values = coo.data[diagonal]
    wrong = values != 0 if header.symmetry == "skew-symmetric" else values.imag != 0
    if wrong.any():
        place = int(row[diagonal[int(np.argmax(wrong))]]) + 1
        expected = "zero" if header.symmetry == "skew-symmetric" else "real"
        raise InputError(
            f"{path}: diagonal entry ({place}, {place}) of a {header.symmetry} matrix is "
            f"{values[wrong][0]}, expected it to be {expected}; the banner is wrong"
        )


def _check_exact(path: Path, header: Header, values: np.ndarray) -> None:
    if values.size and (int(values.max()) > _EXACT or int(values.min()) < -_EXACT):
        extreme = max((int(values.max()), int(values.min())), key=abs)
        raise bad_line(path, header) or InputError(
            f"{path}: integer {extreme} is beyond 2**53 and has no exact float64; "
            "change the banner to 'real' to accept rounding"
        )


def _first_duplicate(coo: Any) -> str:
    row, column = coo.row, coo.col
    order = np.lexsort((column, row))
    same = (np.diff(row[order]) == 0) & (np.diff(column[order]) == 0)
    place = order[int(np.argmax(same))]
    return f"({int(row[place]) + 1}, {int(column[place]) + 1})"
