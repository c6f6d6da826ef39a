# SPDX-License-Identifier: Apache-2.0
"""`.hbp.safetensors`: a built matrix on disk, mapped back, checked before any kernel runs."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.errors import CheckpointError, InputError, MissingExtraError, TenfoldError
from tenfold_core.run.checkpoint import load_tensors, save_tensors

from hbp_spmv.building import kernels_work, workers_for
from hbp_spmv.config import BuildConfig
from hbp_spmv.fallback import ScipyLayout
from hbp_spmv.matrix import HBPMatrix

__all__ = ["load", "paper_layout", "save"]

FORMAT = "hbp-spmv/1"
_SCALARS = {
    "compact": ("nnz", "lanes", "sigma", "strips", "heavy_rows"),
    "paper": ("nnz", "height", "width", "lanes"),
    "csr": ("nnz",),
    "scipy": (),
}


def save(matrix: HBPMatrix, path: str | os.PathLike[str]) -> None:
    """Write a matrix atomically, with a checksum; no pickle is involved.

    Raises:
        InputError: a complex type safetensors does not know (complex128).
    """
    stored = matrix._stored
    arrays = dict(stored.arrays())
    if matrix.dtype == np.complex128:  # a type that safetensors does not know
        arrays["val"] = arrays["val"].view(np.float64).reshape(-1, 2)
    if stored.perm is not None:
        arrays["perm"] = stored.perm
    header = {
        "format": FORMAT,
        "layout": matrix.layout,
        "shape": list(matrix.shape),
        "dtype": matrix.dtype.name,
        "config": asdict(matrix.config),
        **{name: getattr(stored, name) for name in _SCALARS[matrix.layout]},
    }
    save_tensors(path, arrays, {"hbp": json.dumps(header)})


def load(
    path: str | os.PathLike[str],
    *,
    mmap: bool = True,
    verify: bool = True,
    threads: int | None = None,
) -> HBPMatrix:
    """Read a matrix; every index is checked to lie in range before it can be multiplied.

    Args:
        path: file written by `save`.
        mmap: map the arrays instead of copying them. As with `np.load(mmap_mode="r")`, the file
            must then stay as it is while the matrix lives: written to, the products are wrong or
            leave their arrays; truncated, the process dies of a bus error. `save` to the same
            name is safe, for it replaces the file.
        verify: also compare the checksum, which reads the whole file.
        threads: as for `from_csr`.

    Raises:
        CheckpointError: the file is truncated, damaged or not consistent; the text names the field.
        MissingExtraError: the layout needs numba, and it does not work here.
    """
    arrays, metadata = load_tensors(path, mmap=mmap, verify=verify)
    header = _header(path, metadata)
    layout = header.get("layout")
    if not isinstance(layout, str) or layout not in _SCALARS:
        raise CheckpointError(
            f"{path}: layout is {layout!r}, expected one of {', '.join(_SCALARS)}"
        )
    shape = _ints(path, header, "shape", 2)
    scalars = {name: _ints(path, header, name, 1)[0] for name in _SCALARS[layout]}
    dtype = header.get("dtype")
    if dtype not in ("float32", "float64", "complex64", "complex128"):
        raise CheckpointError(f"{path}: dtype is {dtype!r}, expected a float or complex type")
    try:
        config = BuildConfig(**header.get("config", {}))
    except (TypeError, TenfoldError) as error:
        raise CheckpointError(f"{path}: field 'config' is not valid ({error})") from None
    if layout != "scipy" and not kernels_work():
        raise MissingExtraError(f"{path}: layout {layout!r} needs numba, which does not work here")
    if dtype == "complex128" and "val" in arrays:
        arrays["val"] = _paired(path, arrays["val"])
    stored = _CHECKS[layout](_Fields(path, arrays, shape, np.dtype(dtype), scalars))
    workers = workers_for(threads, stored.nnz)
    return HBPMatrix(stored, config, np.dtype(dtype), workers)


def _header(path: Any, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata["hbp"])
        found = header["format"]
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(
            f"{path}: no 'hbp' metadata; expected a file written by 'hbp-spmv convert'"
        ) from None
    if found != FORMAT:
        raise CheckpointError(f"{path}: format is {found!r}, this version reads {FORMAT!r}")
    return header


def _ints(path: Any, header: dict[str, Any], name: str, count: int) -> tuple[int, ...]:
    value = header.get(name)
    items = value if count > 1 else [value]
    good = isinstance(items, list) and len(items) == count
    if not good or not all(type(item) is int and 0 <= item < 1 << 62 for item in items):
        raise CheckpointError(f"{path}: field {name!r} is {value!r}, expected {count} size(s)")
    return tuple(items)


def _paired(path: Any, val: NDArray) -> NDArray:
    """Return complex128 values that are stored as pairs of float64."""
    if val.dtype != np.float64 or val.ndim != 2 or val.shape[1] != 2:
        raise CheckpointError(
            f"{path}: array 'val' is {val.dtype} {val.shape}, expected float64 (nnz, 2); "
            "the file is damaged, make it again"
        )
    return np.ascontiguousarray(val).view(np.complex128).ravel()


class _Fields:
    """The arrays of one file, each taken by name, type and length or refused by name."""

    def __init__(
        self,
        path: Any,
        arrays: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: np.dtype,
        scalars: dict[str, int],
    ) -> None:
        self.path = Path(path)
        self.arrays = arrays
        self.shape = (shape[0], shape[1])
        self.dtype = dtype
        self.scalars = scalars

    def take(self, name: str, dtypes: tuple, length: int | None) -> NDArray:
        array: Any = self.arrays.get(name)
        self.require(array is not None, name, "missing", "present")
        allowed = [np.dtype(item).name for item in dtypes]
        self.require(array.dtype.name in allowed, name, array.dtype.name, " or ".join(allowed))
        fits = array.ndim == 1 and (length is None or array.size == length)
        self.require(fits, name, f"of shape {array.shape}", f"({length},)")
        return array

    def require(self, holds: Any, name: str, found: Any, expected: Any) -> None:
        if not holds:
            raise CheckpointError(
                f"{self.path}: array {name!r} is {found}, expected {expected}; "
                "the file is damaged, make it again"
            )

    def ascending(self, name: str, starts: NDArray, last: int, first: int = 0) -> None:
        good = starts.size > 0 and starts[0] == first and starts[-1] == last
        good = bool(good) and bool((starts[1:] >= starts[:-1]).all())
        self.require(good, name, "not ascending to its end", f"{first} to {last}, ascending")

    def below(self, name: str, array: NDArray, limit: int) -> None:
        largest = int(array.max()) if array.size else -1
        smallest = int(array.min()) if array.size else 0
        good = smallest >= 0 and largest < limit
        self.require(good, name, f"up to {largest}", f"within 0..{limit - 1}")

    def real(self) -> None:
        """Refuse values that the compiled kernels do not know."""
        known = self.dtype in (np.float32, np.float64)
        self.require(known, "values", self.dtype.name, "float32 or float64")

    def values(self, name: str, count: int) -> NDArray:
        array = self.take(name, (self.dtype,), None)
        nnz = self.scalars["nnz"]
        uniform = array.size == 1 and nnz != 1
        self.require(uniform or array.size == count, name, f"of {array.size}", f"1 or {count}")
        return array


def _compact(file: _Fields) -> Any:
    from hbp_spmv.compact import ARRAYS, CompactLayout
    from hbp_spmv.kernels.build import check_groups

    s, (rows, columns) = file.scalars, file.shape
    nnz, lanes = s["nnz"], s["lanes"]
    file.real()
    file.require(lanes in (4, 8, 16, 32), "lanes", lanes, "4, 8, 16 or 32")
    a: Any = {name: file.take(name, (dtype,), None) for name, dtype in ARRAYS.items()}
    groups = len(a["group_base"])
    for name in ("lengths", "targets"):
        file.require(a[name].size == groups * lanes, name, a[name].size, groups * lanes)
    file.require(a["start"].size == groups + 1, "start", a["start"].size, groups + 1)
    grouped = int(a["start"][-1])
    file.ascending("start", a["start"], grouped)
    segments = len(a["segment_base"])
    file.require(a["segment_start"].size == segments + 1, "segment_start", "cut", segments + 1)
    file.require(a["segment_target"].size == segments, "segment_target", "cut", segments)
    file.ascending("segment_start", a["segment_start"], nnz, grouped)
    splits = a["split_rows"].size
    file.require(a["split_start"].size == splits + 1, "split_start", "cut", splits + 1)
    partials = int(a["split_start"][-1])
    file.ascending("split_start", a["split_start"], partials)
    filled = bool((np.diff(a["split_start"]) > 0).all())
    file.require(filled, "split_start", "without sums for a row", "at least one for each")
    col = file.take("col", (np.uint16, np.uint32), nnz + lanes)
    val = file.values("val", nnz + lanes)
    lengths = a["lengths"].reshape(-1, lanes)
    sorted_rows = bool((lengths[:, 1:] <= lengths[:, :-1]).all()) and bool((lengths >= 0).all())
    sizes = lengths.sum(axis=1, dtype=np.int64)
    file.require(sorted_rows, "lengths", "not descending in a group", "descending")
    file.require(bool((sizes == np.diff(a["start"])).all()), "lengths", "not the starts'", "equal")
    file.require(not groups or bool((lengths[:, 0] > 0).all()), "lengths", "empty group", "rows")
    written = {"targets": a["targets"][a["lengths"] > 0]}
    written |= {name: a[name] for name in ("segment_target", "empty_rows", "split_rows")}
    sums = rows + partials
    # Without strips a group is written straight to y, as the other rows always are.
    straight = ("empty_rows", "split_rows", *(() if s["strips"] else ("targets",)))
    for name, array in written.items():
        file.below(name, array, rows if name in straight else sums)
    count = sum(array.size for array in written.values())
    file.require(count == sums, "targets", f"{count} with the others", f"{sums} for {rows} rows")
    once = np.sort(np.concatenate([array.astype(np.int64) for array in written.values()]))
    file.require((once == np.arange(sums)).all(), "targets", "repeated", "each sum written once")
    worst = check_groups(
        a["start"], lanes, a["group_base"], a["segment_start"], a["segment_base"], col
    )
    file.require(worst < columns or nnz == 0, "col", f"up to column {worst}", f"below {columns}")
    perm = _perm(file)
    fields: dict[str, Any] = {**s, **a}
    return CompactLayout(shape=file.shape, **fields, col=col, val=val, perm=perm)


def _perm(file: _Fields) -> NDArray | None:
    if "perm" not in file.arrays:
        return None
    nnz = file.scalars["nnz"]
    perm = file.take("perm", (np.int64,), nnz)
    file.below("perm", perm, max(nnz, 1))
    once = bool((np.bincount(perm, minlength=nnz) == 1).all())
    file.require(once, "perm", "repeating a position", "a permutation")
    return perm


def _paper(file: _Fields) -> Any:
    from hbp_spmv.method import PaperLayout, check_paper

    s, (rows, columns) = file.scalars, file.shape
    file.real()
    for name, limit in (("height", 1 << 20), ("width", 1 << 31), ("lanes", 1024)):
        file.require(0 < s[name] <= limit, name, s[name], f"within 1..{limit}")
    strips = -(-columns // s["width"])
    slots = rows * strips
    file.require(slots < 1 << 31, "shape", file.shape, "below 2**31 slots")
    nnz = s["nnz"]
    col = file.take("col", (np.int32,), nnz)
    data = file.take("data", (file.dtype,), nnz)
    add_sign = file.take("add_sign", (np.int32,), nnz)
    zero_row = file.take("zero_row", (np.int32,), slots)
    output_hash = file.take("output_hash", (np.int32,), slots)
    begin_ptr = file.take("begin_ptr", (np.int32, np.int64), None).astype(np.int64)
    file.ascending("begin_ptr", begin_ptr, nnz)
    file.below("col", col, max(columns, 1))
    walked = rows if slots else 0
    fault = check_paper(
        walked, s["height"], strips, s["lanes"], begin_ptr, zero_row, output_hash, add_sign
    )
    names = ("", "begin_ptr", "output_hash", "zero_row", "add_sign")
    file.require(fault == 0, names[fault], "not consistent", "the published layout")
    return PaperLayout(
        shape=file.shape, **s, col=col, data=data, add_sign=add_sign, zero_row=zero_row,
        begin_ptr=begin_ptr, output_hash=output_hash, perm=_perm(file),
    )  # fmt: skip


def paper_layout(
    arrays: Mapping[str, NDArray], shape: tuple[int, int], *, height: int, width: int, lanes: int
) -> Any:
    """Return a checked `PaperLayout` made of the six arrays.

    Raises:
        InputError: an array is missing or not consistent with the others.
    """
    given = {name: np.asarray(array) for name, array in arrays.items()}
    given = {
        name: np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        for name, array in given.items()
    }
    data = given.get("data", np.empty(0))
    scalars = {"nnz": data.size, "height": height, "width": width, "lanes": lanes}
    try:
        return _paper(_Fields("paper", given, shape, data.dtype, scalars))
    except CheckpointError as error:
        raise InputError(str(error).split("; the file")[0]) from None


def _rows(file: _Fields) -> Any:
    from hbp_spmv.rowgather import RowLayout

    nnz = file.scalars["nnz"]
    ptr = file.take("ptr", (np.int64,), file.shape[0] + 1)
    file.ascending("ptr", ptr, nnz)
    col = file.take("col", (np.uint16, np.uint32), nnz)
    file.below("col", col, max(file.shape[1], 1))
    return RowLayout(shape=file.shape, nnz=nnz, ptr=ptr, col=col, val=file.values("val", nnz))


def _scipy(file: _Fields) -> Any:
    ptr = file.take("ptr", (np.int32, np.int64), file.shape[0] + 1)
    col = file.take("col", (np.int32, np.int64), None)
    file.ascending("ptr", ptr, col.size)
    file.below("col", col, max(file.shape[1], 1))
    val: Any = file.arrays.get("val")
    file.require(val is not None, "val", "missing", "present")
    file.require(val.shape == (col.size,), "val", f"of shape {val.shape}", f"({col.size},)")
    file.require(val.dtype == file.dtype, "val", val.dtype, file.dtype)
    return ScipyLayout(csr_array((val, col, ptr), shape=file.shape))


_CHECKS = {"compact": _compact, "paper": _paper, "csr": _rows, "scipy": _scipy}
