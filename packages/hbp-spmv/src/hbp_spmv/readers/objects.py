# SPDX-License-Identifier: Apache-2.0
"""Matrices in memory: SciPy, PyTorch, CuPy and NetworkX, recognised without importing them."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import issparse
from tenfold_core.sparse import CSR

from hbp_spmv.errors import ReadError
from hbp_spmv.readers.compressed import compressed_raw
from hbp_spmv.readers.finish import Options, Raw, check_memory

__all__ = ["from_object"]

_TORCH_LAYOUTS = ("sparse_csr", "sparse_coo", "sparse_csc", "sparse_bsr")


def from_object(matrix: Any, options: Options) -> Raw:
    """Take the entries of a sparse matrix object; its arrays are never written to.

    Raises:
        ReadError: The type is not known, is dense, or is not a matrix of two dimensions.
    """
    if issparse(matrix):
        return _from_scipy(matrix, "scipy", options)
    if isinstance(matrix, CSR):
        return Raw(
            where="CSR",
            format="tenfold",
            header=repr(matrix),
            shape=matrix.shape,
            indptr=matrix.indptr,
            columns=matrix.indices,
            values=matrix.data,
        )
    library = {cls.__module__.partition(".")[0] for cls in type(matrix).__mro__}
    if "cupyx" in library:
        return _from_scipy(matrix.get(), "cupyx", options)
    if "torch" in library and hasattr(matrix, "layout"):
        return _from_torch(matrix, options)
    networkx = sys.modules.get("networkx")
    if networkx is not None and isinstance(matrix, networkx.Graph):
        return _from_networkx(networkx, matrix, options)
    raise ReadError(
        f"{type(matrix).__name__}: expected a path, or a sparse matrix of SciPy, PyTorch, CuPy or "
        "NetworkX; wrap a dense array in scipy.sparse.csr_array"
    )


def _from_scipy(matrix: Any, library: str, options: Options) -> Raw:
    name = f"{library} {matrix.format} {type(matrix).__name__}"
    if len(matrix.shape) != 2:
        raise ReadError(f"{name}: {len(matrix.shape)} dimensions, expected 2; reshape it first")
    shape = (int(matrix.shape[0]), int(matrix.shape[1]))
    check_memory(name, shape, matrix.nnz, matrix.dtype, options.max_memory)
    header = f"{name} {shape[0]} x {shape[1]}, {matrix.dtype}"
    return compressed_raw(matrix, where=name, format=library, header=header, shape=shape)


def _from_torch(tensor: Any, options: Options) -> Raw:
    layout = str(tensor.layout).removeprefix("torch.")
    name = f"torch {layout} tensor"
    if layout not in _TORCH_LAYOUTS:
        raise ReadError(
            f"{name}: expected one of {', '.join(_TORCH_LAYOUTS)}; convert it with .to_sparse_csr()"
        )
    if tensor.ndim != 2 or tensor.dense_dim():
        raise ReadError(
            f"{name}: shape {tuple(tensor.shape)} with {tensor.dense_dim()} dense dimensions, "
            "expected a matrix of two sparse dimensions"
        )
    tensor = tensor.detach().cpu()
    shape = (int(tensor.shape[0]), int(tensor.shape[1]))
    known = {
        "where": name,
        "format": "torch",
        "header": f"{name} {shape[0]} x {shape[1]}, {str(tensor.dtype).removeprefix('torch.')}",
        "shape": shape,
    }
    if layout == "sparse_coo":
        row, column = tensor._indices().numpy()  # the public name demands summed duplicates
        return Raw(rows=row, columns=column, values=_torch_values(tensor._values()), **known)
    values = _torch_values(tensor.values())
    if layout == "sparse_csc":
        outer, inner = tensor.ccol_indices().numpy(), tensor.row_indices().numpy()
    else:
        outer, inner = tensor.crow_indices().numpy(), tensor.col_indices().numpy()
    if layout == "sparse_csr":
        return Raw(indptr=outer, columns=inner, values=values, **known)
    check_memory(name, shape, values.size, values.dtype, options.max_memory)
    parts = {"indptr": outer, "indices": inner, "data": values, "shape": shape}
    kind = layout.removeprefix("sparse_")
    return compressed_raw(SimpleNamespace(format=kind, **parts), **known)


def _torch_values(values: Any) -> npt.NDArray:
    values = values.resolve_conj().resolve_neg()
    try:
        return values.numpy()
    except TypeError:  # bfloat16 and the eight-bit types, which float32 holds exactly
        return values.float().numpy()


def _from_networkx(networkx: Any, graph: Any, options: Options) -> Raw:
    nodes = graph.number_of_nodes()
    name = f"networkx {type(graph).__name__}"
    check_memory(name, (nodes, nodes), graph.size(), np.dtype("f8"), options.max_memory)
    known = {
        "where": name,
        "format": "networkx",
        "header": f"{name} of {nodes} nodes and {graph.number_of_edges()} edges",
        "shape": (nodes, nodes),
        "stored": graph.number_of_edges(),
        "symmetry": "general" if graph.is_directed() else "symmetric",
    }
    if not nodes:  # networkx itself refuses the graph without nodes
        none = np.empty(0, dtype=np.int64)
        return Raw(rows=none, columns=none, values=np.empty(0), **known)
    try:
        matrix = networkx.to_scipy_sparse_array(graph, format="csr")
    except (ValueError, TypeError, networkx.NetworkXError) as error:
        raise ReadError(f"{name}: an edge weight is not a number ({error})") from error
    return compressed_raw(matrix, **known)
