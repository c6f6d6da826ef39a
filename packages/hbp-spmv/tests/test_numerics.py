# SPDX-License-Identifier: Apache-2.0
import os
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hbp_spmv import calibration, from_csr, product, read
from numpy.testing import assert_array_equal
from scipy.sparse import csr_array, eye_array, hstack
from tenfold_core.sparse import CSR, error_over_bound, reference_product
from tenfold_core.testing.sparse import awkward_matrices, csr_from_lengths, random_csr

HASHES = ["lut", "paper", "tuned", "sort", "none"]
COMPACT = [
    {"layout": "compact", "hash": method, "lanes": lanes}
    for method in HASHES
    for lanes in (4, 8, 16, 32)
]
STRIPS = [{"layout": "compact", "strips": strips} for strips in (1, 100)]
PAPER = [{"layout": "paper", "hash": method, "block": (100, 70), "lanes": 8} for method in HASHES]
CSR_LAYOUT = [{"layout": "csr"}]
ONE_OF_EACH = [COMPACT[2], STRIPS[1], PAPER[0], CSR_LAYOUT[0]]
COLUMNS = [0, 1, 2, 7, 8, 9, 16, 31, 32, 33, 40]
MATRICES = Path(os.environ.get("HBP_MATRICES", "not set"))


def name_of(settings):
    return "-".join(str(value) for value in settings.values())


def standard_normal(size, dtype, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size)
    if np.dtype(dtype).kind == "c":
        x = x + 1j * rng.standard_normal(size)
    return x.astype(dtype)


@cache
def rich(dtype="float64", columns=6000):
    """700 rows: empty, short, two cut into segments, and the columns of a whole strip empty."""
    rng = np.random.default_rng(3)
    lengths = np.minimum(rng.zipf(1.5, 700) - 1, 90)
    lengths[[5, 600]] = 5000, 2500
    a = csr_from_lengths(lengths, columns, rng, dtype=dtype).to_scipy()
    return a


def integers(a):
    """Return the pattern with values -8..8, whose sums are exact in either type."""
    data = (np.arange(a.nnz) % 17 - 8).astype(a.dtype)
    return csr_array((data, a.indices, a.indptr), shape=a.shape)


@cache
def cases(dtype):
    """Return (matrix, x, exact product) for every structure."""
    matrices = awkward_matrices("float64")
    matrices |= {
        "skewed": CSR.from_scipy(rich()),
        "sparse": random_csr(1100, 1100, density=0.003, seed=2),
        "dense": random_csr(70, 80, density=0.9, seed=4),
        "subnormal": csr_like(random_csr(50, 50, seed=5), 1e-310 if dtype != "float32" else 1e-40),
        "huge": csr_like(random_csr(50, 50, seed=6), 1e30),
    }
    result = []
    for matrix in matrices.values():
        a = CSR(matrix.shape, matrix.indptr, matrix.indices, matrix.data.astype(dtype))
        x = standard_normal(a.shape[1], dtype)
        result.append((a, x, reference_product(a, x)))
    return result


def csr_like(matrix, scale):
    return CSR(matrix.shape, matrix.indptr, matrix.indices, matrix.data * scale)


def assert_within_bound(y, matrix, x, exact):
    worst, row = error_over_bound(y, matrix, x, exact=exact)
    assert worst <= 1, f"row {row} of {matrix!r}: error {worst} times the bound"


@pytest.mark.parametrize("settings", COMPACT + STRIPS + PAPER + CSR_LAYOUT, ids=name_of)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_component_keeps_its_error_bound(settings, dtype, several_workers):
    for (matrix, x, exact), threads in zip(cases(dtype), cycle([1, 2, 3])):
        y = from_csr(matrix.to_scipy(), threads=threads, **settings) @ x
        assert y.dtype == dtype
        assert_within_bound(y, matrix, x, exact)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_matrices_keep_their_error_bound(dtype):
    for real, _, _ in cases("float64"):
        data = (real.data + 1j * real.data[::-1]).astype(dtype)
        matrix = CSR(real.shape, real.indptr, real.indices, data)
        x = standard_normal(matrix.shape[1], dtype)
        built = from_csr(matrix.to_scipy())
        assert built.layout == "csr"
        if np.isfinite(np.abs(data).astype(np.finfo(dtype).dtype)).all():
            y = built @ x
            assert y.dtype == dtype
            assert_within_bound(y, matrix, x, reference_product(matrix, x))


@pytest.mark.parametrize("settings", [COMPACT[2], CSR_LAYOUT[0]], ids=name_of)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("columns", [200_000, 65_536])
@pytest.mark.parametrize("equal", [False, True])
def test_wide_and_uniform_matrices_keep_their_error_bound(settings, dtype, columns, equal):
    a = csr_from_lengths(np.arange(100) % 9, columns, np.random.default_rng(0)).to_scipy()
    a.data[:] = -1.7 if equal else a.data
    matrix = CSR.from_scipy(a.astype(dtype))
    x = standard_normal(columns, dtype)
    built = from_csr(matrix.to_scipy(), **settings)
    assert built.stats.uniform == equal
    assert built.stats.index_bits == (16 if columns == 65_536 else 32)
    assert_within_bound(built @ x, matrix, x, reference_product(matrix, x))


def _files():
    if not MATRICES.is_dir():
        return [pytest.param(None, marks=pytest.mark.skip("HBP_MATRICES names no folder"))]
    return [
        pytest.param(path, id=path.name.split(".")[0]) for path in sorted(MATRICES.glob("*.mtx*"))
    ]


@pytest.mark.parametrize("path", _files())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_real_matrices_keep_their_error_bound(path, dtype):
    a = csr_array(read(path))
    a = a.astype(dtype if a.dtype.kind != "c" else np.result_type(dtype, np.complex64))
    matrix = CSR.from_scipy(a)
    x = standard_normal(a.shape[1], a.dtype)
    exact = reference_product(matrix, x)
    layouts = [{"layout": "auto"}]
    if a.dtype.kind != "c":
        layouts += [{"layout": "csr"}, {"layout": "compact", "strips": 4096}]
        layouts += [{"layout": name, "hash": h} for name in ("compact", "paper") for h in HASHES]
    for settings in layouts:
        built = from_csr(a, threads=1, **settings)
        y = built @ x
        assert_within_bound(y, matrix, x, exact)
        assert (built.with_threads(2) @ x).tobytes() == y.tobytes()


@pytest.mark.parametrize("settings", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_number_of_threads_gives_the_same_bits_every_time(settings, dtype, several_workers):
    a = rich(dtype)
    x, block = standard_normal(6000, dtype), standard_normal((6000, 5), dtype)
    old = standard_normal(700, dtype, seed=9)
    built = from_csr(a, threads=1, **settings)
    single, several = built @ x, built @ block
    scaled = built.matvec(x, old.copy(), alpha=0.3, beta=-1.7)
    for threads in (1, 2, 3, 7):
        bound = built.with_threads(threads)
        assert bound.threads == threads
        for _ in range(20):
            assert (bound @ x).tobytes() == single.tobytes()
        for _ in range(3):
            assert (bound @ block).tobytes() == several.tobytes()
            out = bound.matvec(x, old.copy(), alpha=0.3, beta=-1.7)
            assert out.tobytes() == scaled.tobytes()


@pytest.mark.parametrize("schedule", ["mixed", "fixed", "ticket"])
@pytest.mark.parametrize("layout", ["compact", "paper", "csr"])
def test_the_schedule_does_not_change_a_bit(schedule, layout, several_workers):
    x = standard_normal(6000, "float64")
    expected = from_csr(rich(), layout=layout, threads=1) @ x
    found = from_csr(rich(), layout=layout, threads=3, schedule=schedule) @ x
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("layout", ["compact", "csr"])
def test_the_gather_instruction_does_not_change_a_bit(layout, monkeypatch):
    x = standard_normal(6000, "float64")
    expected = from_csr(rich(), layout=layout) @ x
    found = replace(calibration.DEFAULT, gather=True)
    monkeypatch.setattr(calibration, "_LOADED", [found])
    assert (from_csr(rich(), layout=layout) @ x).tobytes() == expected.tobytes()


def test_prefetching_does_not_change_a_bit(monkeypatch):
    x = standard_normal(6000, "float64")
    expected = from_csr(rich(), layout="csr") @ x
    monkeypatch.setattr(product, "cpu_info", lambda: SimpleNamespace(l2_bytes=1))
    assert (from_csr(rich(), layout="csr") @ x).tobytes() == expected.tobytes()


@pytest.mark.parametrize("settings", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_integer_values_give_exact_sums(settings, dtype):
    a = integers(rich(dtype))
    x = (np.arange(6000) % 13 - 6).astype(dtype)
    exact = a.astype(np.int64) @ x.astype(np.int64)
    built = from_csr(a, **settings)
    assert_array_equal(built @ x, exact)
    assert_array_equal(built @ np.stack([x, -x], axis=1), np.stack([exact, -exact], axis=1))


@pytest.mark.parametrize("settings", ONE_OF_EACH, ids=name_of)
def test_the_product_is_linear_in_x_and_in_the_matrix(settings):
    a, x = integers(rich()), np.arange(6000) % 11 - 5.0
    z = np.arange(6000)[::-1] % 7 - 3.0
    b = integers(csr_from_lengths(np.arange(700) % 40, 6000, np.random.default_rng(8)).to_scipy())
    built, other, both = (from_csr(m, **settings) for m in (a, b, a + b))
    assert_array_equal(built @ (x + z), built @ x + built @ z)
    assert_array_equal(built @ (3 * x), 3 * (built @ x))
    assert_array_equal(both @ x, built @ x + other @ x)


@pytest.mark.parametrize("settings", ONE_OF_EACH, ids=name_of)
def test_the_transposed_product_is_adjoint(settings):
    a, x = integers(rich()), np.arange(6000) % 11 - 5.0
    y = np.arange(700) % 9 - 4.0
    built = from_csr(a, **settings)
    assert (built @ x) @ y == x @ built.rmatvec(y)
    assert_array_equal(built.rmatvec(y), a.T @ y)
    assert_array_equal(y @ built, a.T @ y)


@pytest.mark.parametrize("settings", [*ONE_OF_EACH, COMPACT[0], COMPACT[3]], ids=name_of)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_special_value_in_x_touches_exactly_the_rows_that_store_its_column(settings, value):
    a = csr_array(rich())
    built = from_csr(a, **settings)
    columns = [0, 1, 2999, 5999, int(np.bincount(a.indices).argmin())]
    for column in columns:
        x = standard_normal(6000, "float64")
        x[column] = value
        touched = np.zeros(700, bool)
        touched[np.repeat(np.arange(700), np.diff(a.indptr))[a.indices == column]] = True
        assert_array_equal(~np.isfinite(built @ x), touched)
        if settings in ONE_OF_EACH:
            y = built @ np.stack([x, x], axis=1)
            assert_array_equal(~np.isfinite(y), np.stack([touched] * 2, axis=1))


def test_a_special_value_in_the_matrix_touches_its_row():
    a = csr_array(rich())
    a.data = a.data.copy()
    a.data[[3, -1]] = np.nan, np.inf
    rows = np.repeat(np.arange(700), np.diff(a.indptr))[[3, -1]]
    for settings in ONE_OF_EACH:
        y = from_csr(a, **settings) @ np.ones(6000)
        assert_array_equal(np.flatnonzero(np.isnan(y)), rows[:1])
        assert_array_equal(np.flatnonzero(np.isinf(y)), rows[1:])


@pytest.mark.parametrize("settings", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("alpha", "beta"), [(-2, 0.5), (0.3, -1.7), (1, 1), (1, 0), (0.7, 0)])
def test_alpha_and_beta_keep_the_error_bound(settings, dtype, alpha, beta, several_workers):
    a = rich(dtype)
    x, old = standard_normal(6000, dtype), standard_normal(700, dtype, seed=9)
    # alpha A x + beta y is the product of [alpha A, beta I] with (x, y)
    scaled = [a.astype("float64") * alpha, eye_array(700) * beta]
    matrix = CSR.from_scipy(csr_array(hstack(scaled, format="csr")))
    both = np.concatenate([x, old]).astype("float64")
    exact = reference_product(matrix, both)
    built = from_csr(a, threads=2, **settings)
    y = built.matvec(x, old.copy(), alpha=alpha, beta=beta)
    assert_within_bound(y, matrix, both, exact)
    block = built.matvec(
        np.stack([x] * 9, axis=1), np.stack([old] * 9, axis=1), alpha=alpha, beta=beta
    )
    for column in range(9):
        assert_within_bound(block[:, column], matrix, both, exact)


@pytest.mark.parametrize("settings", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("shape", [(6000,), (6000, 3)])
def test_beta_zero_does_not_read_y(settings, shape):
    built = from_csr(rich(), **settings)
    x = standard_normal(shape, "float64")
    old = np.full((700, *shape[1:]), np.nan)
    assert_array_equal(built.matvec(x, old, alpha=0.5), 0.5 * (built @ x))


@pytest.mark.parametrize("settings", ONE_OF_EACH, ids=name_of)
def test_alpha_zero_leaves_beta_y(settings):
    built = from_csr(rich(), **settings)
    old = standard_normal(700, "float64")
    found = built.matvec(standard_normal(6000, "float64"), old.copy(), alpha=0.0, beta=2.0)
    assert_array_equal(found, 2 * old)


@pytest.mark.parametrize("settings", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_several_columns_are_several_products(settings, dtype, several_workers):
    a, matrix = rich(dtype), CSR.from_scipy(rich(dtype))
    block = standard_normal((6000, max(COLUMNS)), dtype)
    exact = [reference_product(matrix, x) for x in block.T[:3]]
    built = from_csr(a, threads=3, **settings)
    widest = built @ block
    for columns in COLUMNS:
        y = built @ np.ascontiguousarray(block[:, :columns])
        assert y.shape == (700, columns)
        assert y.dtype == dtype
        assert_array_equal(y, widest[:, :columns])
        for column in range(min(columns, 3)):
            assert_within_bound(y[:, column], matrix, block[:, column], exact[column])


@pytest.mark.parametrize("settings", [COMPACT[2], STRIPS[1], PAPER[0]], ids=name_of)
def test_several_columns_have_the_bits_of_one_where_no_row_is_cut(settings):
    a = random_csr(600, 500, density=0.1, seed=7).to_scipy()
    block = standard_normal((500, 41), "float64")
    built = from_csr(a, **settings)
    y = built @ block
    for column in range(41):
        single = built @ np.ascontiguousarray(block[:, column])
        assert y[:, column].tobytes() == single.tobytes()


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("equal", [False, True])
def test_complex_products_have_the_same_bits_for_threads_columns_and_repeats(
    dtype, equal, several_workers
):
    a = (rich() * (1 - 0.5j)).astype(dtype)
    a.data[:] = 1 - 2j if equal else a.data
    x = standard_normal((6000, 3), dtype)
    old = standard_normal((700, 3), dtype, seed=9)
    built = from_csr(a, threads=1)
    assert built.stats.uniform == equal
    y = built @ x
    scaled = built.matvec(x, old.copy(), alpha=0.3, beta=-1.7)
    for threads in (2, 3):
        bound = built.with_threads(threads)
        for _ in range(20):
            assert (bound @ x).tobytes() == y.tobytes()
        assert bound.matvec(x, old.copy(), alpha=0.3, beta=-1.7).tobytes() == scaled.tobytes()
    for column in range(3):
        single = built @ np.ascontiguousarray(x[:, column])
        assert single.tobytes() == y[:, column].tobytes()


def test_a_special_value_in_a_complex_operand_touches_its_rows():
    a = csr_array(rich() * (1 - 0.5j))
    built = from_csr(a)
    for column in (0, 2999, 5999):
        x = standard_normal(6000, "complex128")
        x[column] = complex(1, np.nan)
        touched = np.repeat(np.arange(700), np.diff(a.indptr))[a.indices == column]
        assert_array_equal(np.flatnonzero(~np.isfinite(built @ x)), touched)


def test_complex_operands_are_two_real_ones():
    built, z = from_csr(rich()), standard_normal((6000, 2), "complex128")
    y = built @ z
    assert y.dtype == np.complex128
    assert_array_equal(y.real, built @ np.ascontiguousarray(z.real))
    assert_array_equal(y.imag, built @ np.ascontiguousarray(z.imag))
    assert_array_equal((built @ z[:, 0])[:, None], built @ z[:, :1])
