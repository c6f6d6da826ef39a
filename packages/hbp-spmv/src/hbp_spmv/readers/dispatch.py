# SPDX-License-Identifier: Apache-2.0
"""One function for every source: the format follows from the name and the first bytes."""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy.typing as npt
from scipy.sparse import csr_array
from tenfold_core.errors import InputError
from tenfold_core.sparse import read_matrix_market

from hbp_spmv.building import parse_dtype
from hbp_spmv.errors import ReadError
from hbp_spmv.readers.edgelist import read_edgelist
from hbp_spmv.readers.finish import Options, ReadInfo, cast, finish, memory_bound
from hbp_spmv.readers.mat import read_mat
from hbp_spmv.readers.metis import check_symmetric, read_metis
from hbp_spmv.readers.npz import read_npz
from hbp_spmv.readers.objects import from_object
from hbp_spmv.readers.text import DAMAGED, leading_lines, open_bytes

__all__ = ["read", "read_with_info"]

_BY_SUFFIX = {
    ".mtx": "matrix-market",
    ".mm": "matrix-market",
    ".npz": "npz",
    ".mat": "mat",
    ".graph": "metis",
    ".metis": "metis",
    ".el": "edgelist",
    ".edges": "edgelist",
    ".edgelist": "edgelist",
    ".txt": "edgelist",
    ".tsv": "edgelist",
    ".csv": "edgelist",
}
_ALWAYS_BYTES = 200_000_000  # what any file may ask for
_EXPANSION = 1000  # bytes a byte of a file may ask for; of 48 real .mtx.gz the most was 43
_KNOWN = ".mtx, .npz, .mat, .graph, .el, .edges, .txt, .tsv or .csv"
_FOREIGN = {
    ".safetensors": "a saved HBP matrix; open it with hbp_spmv.load",
    ".tar": "an archive; unpack it and read the .mtx file inside",
    ".tgz": "an archive; unpack it and read the .mtx file inside",
    ".zip": "an archive; unpack it and read the .mtx file inside",
    ".rb": "a Rutherford-Boeing file; fetch the matrix as Matrix Market",
    ".rua": "a Harwell-Boeing file; fetch the matrix as Matrix Market",
    ".rsa": "a Harwell-Boeing file; fetch the matrix as Matrix Market",
}


def read(
    source: str | PathLike[str] | Any,
    *,
    edgelist: bool = False,
    banner: bool = True,
    max_memory: int | None = None,
    sum_duplicates: bool = True,
    finite: bool = False,
    drop_zeros: bool = False,
    dtype: npt.DTypeLike | None = None,
) -> csr_array:
    """Read a matrix from a file or from an object of another library.

    Files are Matrix Market, SciPy ``.npz``, MATLAB ``.mat`` (``file.mat:name`` for one variable),
    METIS ``.graph`` and edge lists, the text formats also compressed with gzip. Objects are
    sparse matrices of SciPy, PyTorch and CuPy, and NetworkX graphs. The result is canonical: rows
    sorted, duplicates summed, symmetric sources expanded, int32 indices when they suffice. It
    shares no memory with the source.

    Args:
        source: The path or the object.
        edgelist: Read the file as an edge list, whatever its name.
        banner: Whether a Matrix Market file must begin with its ``%%MatrixMarket`` line.
        max_memory: Bytes that reading may take. By default half of the machine's, for a file
            at most 1000 times its length or 200 MB.
        sum_duplicates: Add repeated entries up; otherwise they are an error.
        finite: Refuse NaN and infinity, which are otherwise kept with a warning.
        drop_zeros: Remove entries stored with the value zero.
        dtype: Type of the values; by default float64 for integers and patterns, else their own.

    Raises:
        ConfigError: ``dtype`` is not a type that the package computes with.
        ReadError: The source cannot be trusted; one line naming file, line, fault and remedy.

    Example:
        >>> import numpy as np, scipy.sparse as sp
        >>> read(sp.coo_array(([1, 2], ([0, 0], [1, 1])), shape=(1, 2))).toarray()
        array([[0., 3.]])
    """
    return read_with_info(
        source,
        edgelist=edgelist,
        banner=banner,
        max_memory=max_memory,
        sum_duplicates=sum_duplicates,
        finite=finite,
        drop_zeros=drop_zeros,
        dtype=dtype,
    )[0]


def read_with_info(
    source: str | PathLike[str] | Any,
    *,
    edgelist: bool = False,
    banner: bool = True,
    max_memory: int | None = None,
    sum_duplicates: bool = True,
    finite: bool = False,
    drop_zeros: bool = False,
    dtype: npt.DTypeLike | None = None,
    sha256: bool = False,
) -> tuple[csr_array, ReadInfo]:
    """Read like :func:`read` and also report what the source held.

    Args:
        source: The path or the object.
        edgelist: As in :func:`read`, like the other settings not listed here.
        banner: As in :func:`read`.
        max_memory: As in :func:`read`.
        sum_duplicates: As in :func:`read`.
        finite: As in :func:`read`.
        drop_zeros: As in :func:`read`.
        dtype: As in :func:`read`.
        sha256: Digest the file's bytes as well.

    Raises:
        ConfigError: ``dtype`` is not a type that the package computes with.
        ReadError: The source cannot be trusted; one line naming file, line, fault and remedy.
    """
    options = Options(
        banner=banner,
        max_memory=max_memory,
        sum_duplicates=sum_duplicates,
        finite=finite,
        drop_zeros=drop_zeros,
        dtype=None if dtype is None else parse_dtype(dtype),
    )
    if not isinstance(source, str | PathLike):
        return finish(from_object(source, options), options)
    name = fspath(source)
    with _faults_of(name):
        matrix, info = _read_file(name, edgelist, options)
        digest = _digest(_split(name)[0]) if sha256 else None
    return matrix, dataclasses.replace(info, source=name, sha256=digest)


@contextmanager
def _faults_of(name: str) -> Iterator[None]:
    """Turn what can go wrong with a file into a `ReadError` that names it."""
    try:
        yield
    except ReadError:
        raise
    except InputError as error:
        raise ReadError(str(error)) from error
    except DAMAGED as error:
        raise ReadError(
            f"{name}: the compressed data end early or are damaged ({error}); fetch the file again"
        ) from error
    except OSError as error:
        raise ReadError(f"{name}: {error.strerror or error}, expected a readable file") from error
    except MemoryError as error:
        raise ReadError(
            f"{name}: the memory does not suffice, expected a matrix that fits; "
            "check the declared size"
        ) from error


def _read_file(name: str, edgelist: bool, options: Options) -> tuple[csr_array, ReadInfo]:
    path, variable = _split(name)
    kind = _format(path, edgelist)
    options = dataclasses.replace(options, max_memory=_file_bound(path, options.max_memory))
    if kind == "matrix-market":
        return _read_market(path, options)
    if kind == "metis":
        matrix, info = finish(read_metis(path, options), options)
        check_symmetric(str(path), matrix)
        return matrix, info
    if kind == "npz":
        return finish(read_npz(path, options), options)
    if kind == "mat":
        return finish(read_mat(path, variable, options), options)
    return finish(read_edgelist(path, options), options)


def _file_bound(path: Path, max_memory: int | None) -> int:
    """Return the bytes that a file of this length may ask for if the caller set no limit.

    Without it a file of 60 bytes that declares 10**9 rows takes 4 GB and 11 s wherever these fit.
    """
    if max_memory is not None:
        return max_memory
    return min(memory_bound(None), max(_ALWAYS_BYTES, _EXPANSION * path.stat().st_size))


def _split(name: str) -> tuple[Path, str | None]:
    """Separate ``file.mat:variable``; a file that bears the whole name goes first."""
    file, colon, variable = name.rpartition(":")
    if colon and file.lower().endswith(".mat") and not Path(name).exists():
        return Path(file), variable
    return Path(name), None


def _format(path: Path, edgelist: bool) -> str:
    """Choose the format by the first bytes where they decide, else by the name."""
    with open_bytes(path) as file:
        head = file.read(128)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if not head:
        raise ReadError(f"{path}: the file is empty, expected a matrix")
    if head[:15].lower().lstrip(b"%").startswith(b"matrixmarket"):
        if edgelist:
            raise ReadError(
                f"{path}:1: found a Matrix Market banner, expected edges; leave out --edgelist"
            )
        return "matrix-market"
    if edgelist:
        return "edgelist"
    if suffix in _FOREIGN:
        raise ReadError(f"{path}: {_FOREIGN[suffix]}")
    kind = _BY_SUFFIX.get(suffix)
    if head.startswith(b"MATLAB "):
        kind = "mat"
    if kind is None:
        raise ReadError(
            f"{path}: the suffix {suffix!r} names no format, expected {_KNOWN}; "
            "use --edgelist for a list of edges"
        )
    return kind


def _read_market(path: Path, options: Options) -> tuple[csr_array, ReadInfo]:
    found, info = read_matrix_market(
        path,
        max_memory=options.max_memory,
        sum_duplicates=options.sum_duplicates,
        finite=options.finite,
        drop_zeros=options.drop_zeros,
        banner=options.banner,
    )
    matrix = cast(str(path), found.to_scipy(), options.dtype)
    return matrix, ReadInfo(
        format="matrix-market",
        header=leading_lines(path, b"%") or f"{info.layout} {info.field} {info.symmetry}",
        shape=found.shape,
        stored_entries=info.file_entries,
        expanded_entries=info.expanded_entries,
        nnz=info.nnz,
        duplicates=info.duplicates,
        explicit_zeros=info.explicit_zeros,
        non_finite=info.non_finite,
        symmetry=info.symmetry,
        index_base=1,
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
