# SPDX-License-Identifier: Apache-2.0
"""Matrices made at run time: the default input of the benchmark, seeded and never packed.

Every generator returns a canonical ``scipy.sparse.csr_array`` in float64. Those that draw random
numbers take a seed or an ``np.random.Generator``; the same seed gives the same matrix.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from tenfold_core.device import memory_limit
from tenfold_core.errors import ConfigError, InputError

__all__ = [
    "DEMO",
    "GENERATORS",
    "SUITE_SUFFIXES",
    "banded",
    "delaunay_p1",
    "demo_matrices",
    "powerlaw",
    "rmat",
    "stencil5",
    "stencil7",
    "stencil27",
    "suite",
    "suite_paths",
    "transport",
]

Seed = int | np.random.Generator
"""What a random generator accepts as its source of randomness."""

INT32_MAX = np.iinfo(np.int32).max

_PLAIN = (".mtx", ".npz", ".mat", ".graph", ".el", ".edges")
SUITE_SUFFIXES = (*(suffix + ".gz" for suffix in _PLAIN if suffix not in (".npz", ".mat")), *_PLAIN)
"""File names that :func:`suite` takes for matrices, the compressed ones first."""


def stencil5(n: int = 256) -> csr_array:
    """Discretise the Laplacian on an ``n x n`` grid: 4 on the diagonal, -1 per neighbour.

    Raises:
        ConfigError: ``n`` is not positive, or the matrix exceeds the memory.

    Example:
        >>> stencil5(2).toarray()[0]
        array([ 4., -1., -1.,  0.])
    """
    return _grid_stencil("stencil5", n, [(0, -1), (-1, 0), (0, 0), (1, 0), (0, 1)])


def stencil7(n: int = 64) -> csr_array:
    """Discretise the Laplacian on an ``n x n x n`` grid: 6 on the diagonal, -1 per neighbour.

    Raises:
        ConfigError: ``n`` is not positive, or the matrix exceeds the memory.
    """
    axes = np.eye(3, dtype=np.int64)
    return _grid_stencil("stencil7", n, [*axes, (0, 0, 0), *-axes])


def stencil27(n: int = 40) -> csr_array:
    """Build the HPCG operator on an ``n x n x n`` grid: 26 on the diagonal, -1 for 26 neighbours.

    Raises:
        ConfigError: ``n`` is not positive, or the matrix exceeds the memory.
    """
    cube = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    return _grid_stencil("stencil27", n, list(cube))


def _grid_stencil(name: str, n: int, offsets: Sequence[npt.ArrayLike]) -> csr_array:
    """Couple each grid point with the points at ``offsets``, where those lie inside the grid."""
    _require(n >= 1, f"{name}: n is {n}, expected at least 1")
    steps = np.array(offsets, dtype=np.int64)
    dims = steps.shape[1]
    num_rows = n**dims
    _require_memory(name, num_rows * (len(steps) * 25 + 16))
    strides = n ** np.arange(dims - 1, -1, -1, dtype=np.int64)
    steps = steps[np.argsort(steps @ strides, kind="stable")]
    index = _index_dtype(num_rows, num_rows * len(steps))
    axis = np.arange(n)
    inside = np.ones((num_rows, len(steps)), dtype=bool)
    for d in range(dims):
        reach = (axis[:, None] + steps[:, d] >= 0) & (axis[:, None] + steps[:, d] < n)
        view = inside.reshape(*[n] * dims, len(steps))
        view &= reach.reshape(*[n if e == d else 1 for e in range(dims)], len(steps))
    columns = np.arange(num_rows, dtype=index)[:, None] + (steps @ strides).astype(index)
    weights = np.where((steps == 0).all(axis=1), len(steps) - 1.0, -1.0)
    values = np.broadcast_to(weights, inside.shape)[inside]
    return _csr(values, columns[inside], inside.sum(axis=1), (num_rows, num_rows))


def rmat(
    scale: int = 16,
    edge_factor: int = 16,
    probabilities: tuple[float, float, float, float] = (0.57, 0.19, 0.19, 0.05),
    *,
    permute: bool = True,
    seed: Seed = 0,
) -> csr_array:
    """Draw ``edge_factor * 2**scale`` edges of a recursive-matrix graph and merge equal ones.

    Each of ``scale`` levels picks a quadrant (a, b, c, d) of the adjacency matrix. The defaults
    are those of Graph500, which also relabels the vertices at random (``permute``). An edge drawn
    k times is stored once with the value k.

    Raises:
        ConfigError: a size is out of range, or the probabilities are negative or do not sum to 1.
    """
    _require(1 <= scale <= 30, f"rmat: scale is {scale}, expected 1 to 30")
    _require(edge_factor >= 1, f"rmat: edge_factor is {edge_factor}, expected at least 1")
    quadrants = np.asarray(probabilities, dtype=np.float64)
    _require(
        quadrants.shape == (4,)
        and bool((quadrants >= 0).all())
        and abs(quadrants.sum() - 1) < 1e-9,
        f"rmat: probabilities are {probabilities}, expected four, none negative, with sum 1",
    )
    rng = np.random.default_rng(seed)
    num_vertices = 2**scale
    num_edges = edge_factor * num_vertices
    _require_memory("rmat", num_edges * 48)
    rows = np.zeros(num_edges, dtype=np.int32)
    columns = np.zeros(num_edges, dtype=np.int32)
    a, b, c, _ = np.cumsum(quadrants)
    for _level in range(scale):
        draw = rng.random(num_edges)
        lower = draw >= b
        right = ((draw >= a) & ~lower) | (draw >= c)
        rows = 2 * rows + lower
        columns = 2 * columns + right
    if permute:
        label = rng.permutation(num_vertices).astype(np.int32)
        rows, columns = label[rows], label[columns]
    return _merge(np.ones(num_edges), rows, columns, (num_vertices, num_vertices))


def banded(
    n: int = 50_000, per_row: int = 16, bandwidth: int = 200, *, seed: Seed = 0
) -> csr_array:
    """Place ``per_row`` normal random values in each row within ``bandwidth`` of the diagonal.

    The part of the band inside the matrix is cut into ``per_row`` equal pieces and one column is
    drawn in each, so columns are distinct and sorted without a search.

    Raises:
        ConfigError: ``n`` is not positive, or a row near a corner has no room for ``per_row``.
    """
    _require(n >= 1, f"banded: n is {n}, expected at least 1")
    room = min(bandwidth + 1, n)
    _require(
        1 <= per_row <= room,
        f"banded: per_row is {per_row}, expected 1 to {room} (what the first row has room for)",
    )
    _require_memory("banded", n * (per_row * 40 + 32))
    rng = np.random.default_rng(seed)
    row = np.arange(n, dtype=np.int64)
    first = np.maximum(row - bandwidth, 0)
    width = np.minimum(row + bandwidth + 1, n) - first
    cuts = np.arange(per_row + 1, dtype=np.int64) * width[:, None] // per_row
    columns = first[:, None] + rng.integers(cuts[:, :-1], cuts[:, 1:])
    values = rng.standard_normal(n * per_row)
    return _csr(values, columns.ravel(), np.full(n, per_row), (n, n))


def powerlaw(
    n: int = 50_000, shortest: int = 3, exponent: float = 2.2, *, seed: Seed = 0
) -> csr_array:
    """Draw row lengths with P(length >= k) ~ k**(1 - exponent) and give one row n // 2 nonzeros.

    Lengths start at ``shortest`` and are cut at n // 8 (at least 1) so that the long row, chosen
    at random, stands alone. Columns are uniform, equal ones in a row merged; values are normal.

    Raises:
        ConfigError: ``n`` or ``shortest`` is not positive, or ``exponent`` is not above 1.
    """
    _require(n >= 2, f"powerlaw: n is {n}, expected at least 2")
    _require(1 <= shortest <= n, f"powerlaw: shortest is {shortest}, expected 1 to n = {n}")
    _require(exponent > 1, f"powerlaw: exponent is {exponent}, expected a number above 1")
    _require_memory("powerlaw", n * (shortest + 1) * 40)
    rng = np.random.default_rng(seed)
    tail = shortest * (1 - rng.random(n)) ** (-1 / (exponent - 1))
    lengths = np.minimum(tail, max(n // 8, 1)).astype(np.int64)
    long_row = int(rng.integers(n))
    lengths[long_row] = 0
    rows = np.repeat(np.arange(n), lengths)
    columns = rng.integers(n, size=len(rows))
    keys = np.unique(rows * n + columns)
    long_keys = long_row * n + rng.choice(n, size=n // 2, replace=False)
    keys = np.sort(np.concatenate([keys, long_keys]))
    values = rng.standard_normal(len(keys))
    return _csr(values, keys % n, np.bincount(keys // n, minlength=n), (n, n))


def delaunay_p1(points: int | npt.ArrayLike = 60_000, *, seed: Seed = 0) -> csr_array:
    """Assemble the P1 stiffness matrix of the Laplacian on a Delaunay mesh.

    A count draws that many points uniformly in the unit square, numbered along horizontal strips
    as mesh generators do; an array of shape (points, 2) is used as it is. With the edges e_i
    opposite to the corners, a triangle of area S adds e_i . e_j / (4 S). No boundary condition
    is set, so every row sums to 0; couplings that cancel stay as explicit zeros.

    Raises:
        ConfigError: fewer than 3 points were asked for.
        InputError: the array has another shape, is not finite, or all points are on one line.
    """
    from scipy.spatial import Delaunay, QhullError  # 0.1 s that the other generators do not need

    if isinstance(points, int | np.integer):
        _require(bool(points >= 3), f"delaunay_p1: points is {points}, expected at least 3")
        _require_memory("delaunay_p1", int(points) * 800)
        nodes = _strip_order(np.random.default_rng(seed).random((int(points), 2)))
    else:
        nodes = np.asarray(points, dtype=np.float64)
        if nodes.ndim != 2 or nodes.shape[1] != 2 or len(nodes) < 3 or not np.isfinite(nodes).all():
            raise InputError(
                f"delaunay_p1: points of shape {nodes.shape}, expected (count >= 3, 2), all finite"
            )
    try:
        corners = Delaunay(nodes).simplices
    except QhullError as error:
        raise InputError("delaunay_p1: the points lie on one line, expected a plane set") from error
    x = nodes[corners]
    edges = np.roll(x, -2, axis=1) - np.roll(x, -1, axis=1)
    doubled_area = np.abs(edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0])
    kept = doubled_area > 0
    corners, edges, doubled_area = corners[kept], edges[kept], doubled_area[kept]
    local = np.einsum("tid,tjd->tij", edges, edges) / (2 * doubled_area[:, None, None])
    rows = np.repeat(corners, 3, axis=1)
    columns = np.tile(corners, (1, 3))
    return _merge(local.ravel(), rows.ravel(), columns.ravel(), (len(nodes), len(nodes)))


def _strip_order(nodes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sort points by horizontal strips about two point distances high, then from left to right."""
    strip = np.floor(nodes[:, 1] * max(np.sqrt(len(nodes)) / 2, 1))
    return nodes[np.lexsort((nodes[:, 0], strip))]


def transport(sources: int = 300, sinks: int = 400) -> csr_array:
    """Build the constraint matrix of the transportation problem, all values 1.

    Column ``i * sinks + j`` is the amount shipped from source i to sink j. The first ``sources``
    rows sum what leaves a source, the other ``sinks`` rows what reaches a sink.

    Raises:
        ConfigError: a count is not positive.
    """
    _require(sources >= 1, f"transport: sources is {sources}, expected at least 1")
    _require(sinks >= 1, f"transport: sinks is {sinks}, expected at least 1")
    _require_memory("transport", sources * sinks * 64)
    shipments = np.arange(sources * sinks).reshape(sources, sinks)
    columns = np.concatenate([shipments.ravel(), shipments.T.ravel()])
    lengths = np.repeat([sinks, sources], [sources, sinks])
    return _csr(np.ones(len(columns)), columns, lengths, (sources + sinks, sources * sinks))


GENERATORS: dict[str, Callable[..., csr_array]] = {
    "delaunay_p1": delaunay_p1,
    "stencil27": stencil27,
    "rmat": rmat,
    "banded": banded,
    "powerlaw": powerlaw,
    "transport": transport,
    "stencil7": stencil7,
    "stencil5": stencil5,
}
"""Every generator by name; called without arguments each gives its demonstration size."""

DEMO = ("delaunay_p1", "stencil27", "rmat", "banded", "powerlaw", "transport")
"""What the benchmark runs on when no file is given, in this order."""


def demo_matrices(*, seed: int = 0) -> Iterator[tuple[str, csr_array]]:
    """Make the six default matrices one after the other, each only when it is asked for."""
    for name in DEMO:
        make = GENERATORS[name]
        seeded = "seed" in inspect.signature(make).parameters
        yield name, make(seed=seed) if seeded else make()


def suite_paths(path: str | Path) -> list[Path]:
    """List the matrix files of a folder by name; files of other kinds are passed over.

    Text files whose suffix says nothing (``.txt``, ``.csv``, ``.tsv``) are not taken for matrices.

    Raises:
        InputError: ``path`` is no folder or holds no matrix file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder, expected one with matrix files")
    found = sorted(p for p in folder.iterdir() if p.name.lower().endswith(SUITE_SUFFIXES))
    if not found:
        raise InputError(f"{folder}: no matrix file, expected {', '.join(SUITE_SUFFIXES)}")
    return found


def suite(path: str | Path) -> Iterator[tuple[str, csr_array]]:
    """Read the matrix files of a folder one after the other, each only when it is asked for.

    Yields:
        The file name without its suffixes, and the matrix.

    Raises:
        InputError: ``path`` is no folder, holds no matrix file, or a file cannot be read.
    """
    from hbp_spmv.readers import read

    for file in suite_paths(path):
        suffix = next(s for s in SUITE_SUFFIXES if file.name.lower().endswith(s))
        yield file.name[: -len(suffix)], read(file)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _require_memory(name: str, num_bytes: int) -> None:
    """Refuse a size before anything is allocated; the bytes are those of its largest arrays."""
    # whole numbers only: a size of 200 digits does not fit a float
    limit = memory_limit()
    _require(
        num_bytes <= limit,
        f"{name}: making it takes {num_bytes // 10**6:,} MB or more, expected at most "
        f"{limit // 10**6:,} MB, the memory of this machine; ask for a smaller one",
    )


def _index_dtype(largest: int, nnz: int) -> type[np.signedinteger]:
    return np.int32 if max(largest, nnz) <= INT32_MAX else np.int64


def _csr(
    values: npt.NDArray[np.float64],
    columns: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.integer],
    shape: tuple[int, int],
) -> csr_array:
    """Wrap rows that are sorted and free of duplicates already."""
    index = _index_dtype(max(shape), len(values))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(index)
    matrix = csr_array((values, columns.astype(index, copy=False), starts), shape=shape)
    matrix.has_canonical_format = True
    return matrix


def _merge(
    values: npt.NDArray[np.float64],
    rows: npt.NDArray[np.integer],
    columns: npt.NDArray[np.integer],
    shape: tuple[int, int],
) -> csr_array:
    """Sort triplets into rows and sum equal positions."""
    matrix = csr_array(coo_array((values, (rows, columns)), shape=shape))
    matrix.sum_duplicates()
    return matrix
