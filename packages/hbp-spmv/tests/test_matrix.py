# SPDX-License-Identifier: Apache-2.0
import gc
import pickle
import weakref
from dataclasses import fields

import numpy as np
import pytest
from hbp_spmv import PAPER, BuildConfig, HBPMatrix, from_csr
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import bsr_array, coo_array, csc_array, csr_array, csr_matrix, eye_array
from tenfold_core.device import cupy_or_none
from tenfold_core.errors import ConfigError, InputError, MissingExtraError
from tenfold_core.sparse import CSR
from tenfold_core.testing.sparse import awkward_matrices, random_csr

LAYOUTS = ["compact", "paper", "csr", "auto"]
EMPTY = [(0, 0), (0, 5), (5, 0), (4, 4), (1, 1)]


@pytest.fixture
def a():
    """60 x 50 with integer values, so that every sum is exact."""
    found = random_csr(60, 50, density=0.2, seed=3, empty_every=7).to_scipy()
    found.data = np.round(4 * found.data)
    return found


@pytest.fixture(params=[*LAYOUTS, "complex"])
def built(request, a):
    """The same matrix in every layout; complex values are stored by rows."""
    if request.param == "complex":
        return from_csr(a.astype(np.complex128))
    return from_csr(a, layout=request.param, block=(32, 20))


def integers(*shape):
    return (np.arange(np.prod(shape)) % 7 - 3.0).reshape(shape)


# Operands


def test_operands_of_any_layout_in_memory(built, a):
    x = integers(50).astype(built.dtype)
    expected = a @ integers(50)
    spread = np.zeros(150, built.dtype)
    spread[::3] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    assert_array_equal(built @ x, expected)
    assert_array_equal(built @ spread[::3], expected)
    assert_array_equal(built @ x[::-1].copy()[::-1], expected)
    assert_array_equal(built @ frozen, expected)
    assert_array_equal(built @ np.asfortranarray(np.stack([x, x], 1)), np.stack([expected] * 2, 1))
    assert_array_equal(built @ np.stack([x] * 6, 1)[:, ::2], np.stack([expected] * 3, 1))


def test_unaligned_operands_give_the_same(a):
    raw = np.zeros(50 * 8 + 1, np.uint8)
    x = raw[1:].view(np.float64)
    x[:] = integers(50)
    assert not x.flags.aligned
    for layout in LAYOUTS:
        assert_array_equal(from_csr(a, layout=layout) @ x, a @ integers(50))


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint16", "bool", "float16", "float32", ">f8"])
def test_operands_of_narrower_types_are_converted(built, a, dtype):
    x = np.abs(integers(50)).astype(dtype)
    assert_array_equal(built @ x, a @ x.astype(np.float64))


def test_lists_are_operands(built, a):
    assert_array_equal(built @ integers(50).tolist(), a @ integers(50))
    assert_array_equal(built.matvec(integers(50, 2).tolist()), a @ integers(50, 2))


@pytest.mark.parametrize("shape", [(49,), (51,), (0,), (), (50, 2, 2), (2, 50)])
def test_operands_of_a_wrong_shape_are_refused(built, shape):
    with pytest.raises(InputError, match=r"x has shape .*, expected \(50,\) or \(50, k\)"):
        built @ np.zeros(shape)


@pytest.mark.parametrize("x", [["a"] * 50, [None] * 50, np.zeros(50, "M8[s]")])
def test_operands_that_are_no_numbers_are_refused(built, x):
    with pytest.raises(InputError, match="expected numbers"):
        built @ x


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("float32", "float64"), ("float32", "complex128"), ("complex64", "float64")],
)
def test_operands_that_would_lose_digits_are_refused(a, stored, dtype):
    with pytest.raises(InputError, match="digits would be lost; convert x, or build with dtype="):
        from_csr(a, dtype=stored) @ np.zeros(50, dtype)


@pytest.mark.parametrize(("stored", "largest"), [("float32", 2**24), ("float64", 2**53)])
@pytest.mark.parametrize("sign", [1, -1])
def test_integer_operands_are_taken_as_far_as_they_are_exact(a, stored, largest, sign):
    built = from_csr(a, dtype=stored)
    x = np.zeros(50, np.int64)
    x[3] = sign * largest
    assert (built @ x).dtype == stored
    assert_array_equal(built @ x, (a @ x.astype(np.float64)).astype(stored))
    x[3] += sign
    with pytest.raises(InputError, match=f"x has dtype int64, the matrix {stored}: an integer exc"):
        built @ x


def test_longdouble_operands_are_told_what_exists(a):
    with pytest.raises(InputError, match="digits would be lost; convert x") as caught:
        from_csr(a) @ np.zeros(50, np.longdouble)
    assert "build with" not in str(caught.value)


def test_operands_on_a_gpu_are_refused(a):
    class OnGPU:
        __cuda_array_interface__ = None

    with pytest.raises(InputError, match="x lies on a CUDA device"):
        from_csr(a) @ OnGPU()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(50,), (50, 3)])
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "complex64"), ("float64", "complex128")])
def test_complex_operands_of_real_matrices(a, layout, shape, stored, dtype):
    z = (integers(*shape) - 2j * integers(*shape)).astype(dtype)
    y = from_csr(a, layout=layout, dtype=stored) @ z
    assert y.dtype == dtype
    assert_array_equal(y, a @ z)


def test_the_matrix_multiplies_from_the_right(built, a):
    assert_array_equal(integers(60) @ built, integers(60) @ a)
    assert_array_equal(integers(2, 60) @ built, integers(2, 60) @ a)
    assert_array_equal(integers(60).tolist() @ built, integers(60) @ a)


# Results


def test_out_is_filled_and_returned(built, a):
    out = np.full(60, np.nan, built.dtype)
    assert built.matvec(integers(50), out) is out
    assert_array_equal(out, a @ integers(50))
    block = np.full((60, 3), np.nan, built.dtype)
    assert built.matmat(integers(50, 3), block) is block
    assert_array_equal(block, a @ integers(50, 3))


def test_out_may_be_strided(built, a):
    wide = np.zeros((60, 4), built.dtype)
    reverse = np.zeros(60, built.dtype)[::-1]
    fortran = np.zeros((60, 2), built.dtype, order="F")
    built.matvec(integers(50), wide[:, 1])
    built.matvec(integers(50), reverse, alpha=2.0)
    built.matvec(integers(50, 2), fortran)
    assert_array_equal(wide[:, 1], a @ integers(50))
    assert not wide[:, [0, 2, 3]].any()
    assert_array_equal(reverse, 2 * (a @ integers(50)))
    assert_array_equal(fortran, a @ integers(50, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_may_be_x_itself_or_overlap_it(layout):
    a = random_csr(50, 50, density=0.2, seed=4).to_scipy()
    a.data = np.round(4 * a.data)
    built = from_csr(a, layout=layout)
    x = integers(50)
    assert_array_equal(
        built.matvec(x, x, alpha=2.0, beta=3.0), 2 * (a @ integers(50)) + 3 * integers(50)
    )
    memory = np.zeros(75)
    memory[:50] = integers(50)
    built.matvec(memory[:50], memory[25:])
    assert_array_equal(memory[25:], a @ integers(50))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_strided_out_is_scaled_by_beta(a, layout):
    wide = np.ones((60, 2))
    from_csr(a, layout=layout).matvec(integers(50), wide[:, 0], alpha=2.0, beta=5.0)
    assert_array_equal(wide[:, 0], 2 * (a @ integers(50)) + 5)
    assert_array_equal(wide[:, 1], np.ones(60))


@pytest.mark.parametrize("shape", [(59,), (60, 1), (50,), ()])
def test_out_of_a_wrong_shape_is_refused(built, shape):
    with pytest.raises(InputError, match=r"out has shape .*, expected \(60,\)"):
        built.matvec(integers(50), np.zeros(shape, built.dtype))


def test_out_that_is_no_array_is_refused_as_such(built):
    with pytest.raises(InputError, match="out is a list, expected a NumPy array"):
        built.matvec(integers(50), [0.0] * 60)


def test_out_that_cannot_hold_the_result_is_refused(built):
    with pytest.raises(InputError, match="out has dtype int64, expected"):
        built.matvec(integers(50), np.zeros(60, np.int64))
    frozen = np.zeros(60, built.dtype)
    frozen.flags.writeable = False
    with pytest.raises(InputError, match="out is read-only"):
        built.matvec(integers(50), frozen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_complex_operands_check_out_before_they_multiply(a, layout):
    built, z = from_csr(a, layout=layout), integers(50) * 1j
    for out, match in [
        (np.zeros(59, complex), "out has shape"),
        (np.zeros(60), "out has dtype float64"),
        ([0j] * 60, "out is a list"),
    ]:
        with pytest.raises(InputError, match=match):
            built.matvec(z, out)
    out = np.full(60, 2j)
    assert_array_equal(built.matvec(z, out, alpha=3.0, beta=0.5), 3 * (a @ z) + 1j)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_complex_out_keeps_its_imaginary_part(a, layout):
    out = np.full(60, 4 + 2j)
    from_csr(a, layout=layout).matvec(integers(50), out, beta=0.5)
    assert_array_equal(out, a @ integers(50) + 2 + 1j)


def test_beta_without_out_is_refused(built):
    with pytest.raises(InputError, match=r"beta=2\.0: expected an out array"):
        built.matvec(integers(50), beta=2.0)


def test_complex_factors_of_complex_matrices(a):
    built = from_csr(a * (1 + 2j))
    y = built.matvec(integers(50), np.ones(60, complex), alpha=1j, beta=-2j)
    assert_array_equal(y, (a @ integers(50)) * (1j - 2) - 2j)


def test_complex_factors_of_real_matrices_are_refused(a):
    with pytest.raises(InputError, match="alpha is 1j, expected a real number"):
        from_csr(a).matvec(integers(50), alpha=1j)


def test_a_new_result_belongs_to_the_caller(built):
    first = built @ integers(50)
    kept = first.copy()
    built @ (2 * integers(50))
    assert_array_equal(first, kept)


# Empty shapes


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, dtype) for layout in LAYOUTS for dtype in ("float64", "float32")]
    + [("csr", "complex128"), ("auto", "complex64")],
)
@pytest.mark.parametrize("shape", EMPTY)
def test_matrices_without_entries(shape, dtype, layout):
    built = from_csr(csr_array(shape, dtype=dtype), layout=layout)
    rows, columns = shape
    x = np.full(columns, np.nan, dtype)
    assert built.shape == shape
    assert built.nnz == 0
    assert_array_equal(built @ x, np.zeros(rows))
    assert (built @ np.zeros((columns, 3), dtype)).shape == (rows, 3)
    assert (built @ np.zeros((columns, 0), dtype)).shape == (rows, 0)
    assert (
        built
        @ np.zeros(columns, "complex64" if dtype in ("float32", "complex64") else "complex128")
    ).shape == (rows,)
    assert_array_equal(built.matvec(x, np.ones(rows, dtype), beta=2.0), np.full(rows, 2))
    assert_array_equal(built.rmatvec(np.zeros(rows, dtype)), np.zeros(columns))
    assert built.T.shape == (columns, rows)
    assert built.to_csr().shape == shape
    assert built.diagonal().shape == (min(shape),)
    assert built.stats.nnz == 0
    assert pickle.loads(pickle.dumps(built)).shape == shape
    assert f"{rows} x {columns}" in repr(built)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 300), (300, 1)])
def test_a_single_row_and_a_single_column(shape, layout):
    a = random_csr(*shape, density=0.4, seed=1).to_scipy()
    a.data = np.round(4 * a.data)
    built = from_csr(a, layout=layout)
    assert_array_equal(built @ integers(shape[1]), a @ integers(shape[1]))
    assert_array_equal(built.rmatvec(integers(shape[0])), a.T @ integers(shape[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_matrix_with_one_entry(layout):
    built = from_csr(csr_array(([3.0], ([1], [0])), shape=(2, 2)), layout=layout, keep_perm=True)
    assert (built @ np.array([2.0, np.nan])).tolist() == [0, 6]
    assert (built.update_values([5.0]) @ np.array([2.0, 1.0])).tolist() == [0, 10]


# What from_csr takes


@pytest.mark.parametrize(
    "kind", [csr_array, csc_array, coo_array, bsr_array, csr_matrix, CSR.from_scipy]
)
def test_any_sparse_format_is_taken(a, kind):
    assert_array_equal(from_csr(kind(a)) @ integers(50), a @ integers(50))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unsorted_and_duplicate_entries_leave_the_caller_untouched(layout):
    data, indices, indptr = (
        np.array([1.0, 2.0, 3.0, 4.0]),
        np.array([2, 0, 1, 1]),
        np.array([0, 2, 4]),
    )
    a = csr_array((data, indices, indptr), shape=(2, 3))
    built = from_csr(a, layout=layout)
    assert (built @ np.array([1.0, 10.0, 100.0])).tolist() == [102, 70]
    assert built.nnz == 3
    assert data.tolist() == [1, 2, 3, 4]
    assert indices.tolist() == [2, 0, 1, 1]
    assert a.nnz == 4
    assert np.shares_memory(a.data, data)
    assert a.indices.tolist() == [2, 0, 1, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spare_room_behind_the_entries_is_ignored(layout):
    a = csr_array(
        (np.array([1.0, 2.0, 9.0]), np.array([0, 1, 7]), np.array([0, 1, 3])), shape=(2, 8)
    )
    a.indptr[2] = 2
    built = from_csr(a, layout=layout)
    assert built.nnz == 2
    assert (built @ np.arange(1.0, 9)).tolist() == [1, 4]
    assert len(a.data) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_only_arrays_are_taken(a, layout):
    for array in (a.data, a.indices, a.indptr):
        array.flags.writeable = False
    assert_array_equal(from_csr(a, layout=layout) @ integers(50), a @ integers(50))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_64_bit_indices_are_taken(a, layout):
    wide = csr_array((a.data, a.indices.astype(np.int64), a.indptr.astype(np.int64)), shape=a.shape)
    assert wide.indices.dtype == np.int64
    assert_array_equal(from_csr(wide, layout=layout) @ integers(50), a @ integers(50))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", [-1, 50, 2**31 - 1])
def test_columns_outside_the_matrix_are_refused(a, layout, index):
    a.indices[17] = index
    with pytest.raises(InputError, match=rf"column {index}.*expected 0\.\.49"):
        from_csr(a, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_falling_row_starts_are_refused(a, layout):
    a.indptr[5] = a.nnz + 100
    with pytest.raises(InputError, match="row starts"):
        from_csr(a, layout=layout)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("bool", "float64"),
        ("int8", "float64"),
        ("uint64", "float64"),
        ("float32", "float32"),
        ("float64", "float64"),
        ("complex64", "complex64"),
        ("complex128", "complex128"),
    ],
)
def test_every_value_type_has_a_working_type(given, stored):
    built = from_csr(eye_array(3, dtype=given, format="csr"))
    assert built.dtype == stored
    assert_array_equal(built @ np.ones(3, stored), np.ones(3))


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_integers_above_2_to_53_are_refused_to_the_last(dtype):
    largest = csr_array(np.array([[2**53]], dtype))
    assert from_csr(largest).to_csr().data.tolist() == [2.0**53]
    with pytest.raises(InputError, match=r"exceeds 2\*\*53"):
        from_csr(csr_array(np.array([[2**53 + 1]], dtype)))
    with pytest.raises(InputError, match=r"exceeds 2\*\*53"):
        from_csr(csr_array(np.array([[np.iinfo("int64").min]])))


def test_types_without_a_kernel_are_refused(a):
    with pytest.raises(
        InputError,
        match=r"expected values of float32, float64 or complex, got (longdouble|float128)",
    ):
        from_csr(a.astype(np.longdouble))
    for name, found in (("int32", "int32"), ("foo", "'foo'")):
        with pytest.raises(ConfigError, match=f"dtype is {found}, expected one of float32 "):
            from_csr(a, dtype=name)
    assert from_csr(a, dtype="f32").dtype == np.float32
    with pytest.raises(InputError, match="complex128 values do not fit float64"):
        from_csr(a.astype(complex), dtype="float64")
    with pytest.raises(InputError, match="expected a path, or a sparse matrix"):
        from_csr(np.eye(3))


@pytest.mark.parametrize("layout", ["compact", "paper"])
def test_complex_values_have_no_grouped_layout(a, layout):
    with pytest.raises(
        ConfigError, match="expected real values, got complex128; use layout='auto'"
    ):
        from_csr(a.astype(complex), layout=layout)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layout": "ell"}, "layout: expected one of auto, compact, paper, csr, got 'ell'"),
        ({"hash": "md5"}, "hash: expected one of lut, paper, tuned, sort, none, got 'md5'"),
        ({"lanes": 5}, "lanes: expected one of 4, 8, 16, 32, got 5"),
        ({"lanes": 0, "layout": "paper"}, r"lanes: expected an int in 1\.\.1024, got 0"),
        ({"sigma": 0}, "sigma: expected an int"),
        ({"strips": -1}, "strips: expected an int"),
        ({"strips": 2.5}, "strips: expected an int"),
        ({"index": "u64"}, "index: expected one of auto, u16, u32"),
        ({"schedule": "static"}, "schedule: expected one of mixed, fixed, ticket"),
        ({"block": (0, 5)}, "height: expected an int"),
        ({"block": (5, 0)}, "width: expected an int"),
        ({"hash_params": {"s": 32}}, r"s: expected an int in 0\.\.31, got 32"),
        ({"hash_params": {"q": 1}}, "unknown setting 'q'"),
        ({"threads": 0}, "threads: expected a positive int, got 0"),
        ({"threads": 1.5}, "threads: expected a positive int"),
        ({"threads": True}, "threads: expected a positive int, got True"),
        ({"n_products": 2.5}, "n_products: expected a positive int, got 2.5"),
        ({"wrong": 3}, "from_csr: unknown setting 'wrong'"),
        ({"wrong": None}, "from_csr: unknown setting 'wrong'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"n_products": 0}, "n_products: expected a positive int, got 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(a, settings, match):
    with pytest.raises(ConfigError, match=match):
        from_csr(a, **settings)


def test_arguments_override_the_config(a):
    config = BuildConfig(layout="compact", lanes=8, hash="sort")
    built = from_csr(a, config=config, hash="none", strips=10)
    assert (built.config.lanes, built.config.hash, built.config.strips) == (8, "none", 10)
    assert from_csr(a, config=config, lanes="auto").config.lanes is None
    assert config == BuildConfig(layout="compact", lanes=8, hash="sort")


def test_the_published_settings_are_a_config(a):
    built = from_csr(a, config=PAPER)
    assert built.layout == "paper"
    assert (built._stored.height, built._stored.width, built._stored.lanes) == (512, 4096, 32)


# The matrix itself


def test_facts(built, a):
    assert built.shape == (60, 50)
    assert built.ndim == 2
    assert built.nnz == a.nnz
    assert built.device == "cpu"
    assert built.nbytes == sum(array.nbytes for array in built.arrays().values())
    assert built.to("cpu") is built
    stats = built.stats
    assert stats.layout == built.layout
    assert stats.bytes == built.nbytes
    assert stats.bytes_per_nnz == built.nbytes / a.nnz
    assert 0 < stats.lane_efficiency <= 1
    assert stats.threads == built.threads == 1
    assert {field.name for field in fields(stats)} >= {"std_before", "std_after", "build_seconds"}


def test_repr_says_what_it_is(a):
    assert repr(from_csr(a, layout="csr")) == (
        f"<HBPMatrix 60 x 50, {a.nnz} stored, float64, layout 'csr', 1 thread(s)>"
    )


def test_csr_comes_back(built, a):
    back = built.to_csr()
    assert_array_equal(back.indptr, a.indptr)
    assert_array_equal(back.indices, a.indices)
    assert_array_equal(back.data, a.data)
    assert back.dtype == built.dtype


def test_the_transposed_matrix_is_built_once(built, a):
    assert built.T.shape == (50, 60)
    assert built.T is built.T
    assert built.T.T is built
    assert built.T.layout == built.layout
    assert_array_equal(built.T @ integers(60), a.T @ integers(60))
    assert_array_equal(built.rmatmat(integers(60, 3)), a.T @ integers(60, 3))


def test_a_matrix_and_its_transpose_are_freed_without_the_cycle_collector(built):
    # A copy: the fixture itself is held by pytest.
    matrix = pickle.loads(pickle.dumps(built))
    matrix.rmatvec(np.ones(60, matrix.dtype))
    matrix.aslinearoperator().rmatvec(np.ones(60, matrix.dtype))
    parts = [weakref.ref(part) for part in (matrix, matrix.T, matrix._stored.arrays()["col"])]
    enabled = gc.isenabled()
    gc.disable()
    try:
        del matrix
        assert [part() for part in parts] == [None] * 3
    finally:
        if enabled:
            gc.enable()


def test_a_transposed_matrix_outlives_the_one_it_came_from(built, a):
    transposed = pickle.loads(pickle.dumps(built)).T
    assert_array_equal(transposed.T @ integers(50), a @ integers(50))
    assert transposed.T is transposed.T
    assert transposed.T.T is transposed


def test_the_transposed_product_of_complex_matrices_conjugates():
    a = csr_array(np.array([[1 + 2j, 0], [3j, 4]]))
    built = from_csr(a)
    x = np.array([1 + 1j, 2 - 1j])
    assert_array_equal(built.rmatvec(x), a.conj().T @ x)
    assert_array_equal(built.T @ x, a.T @ x)


def test_the_transposed_matrix_exists_where_16_bit_columns_do_not_reach():
    a = csr_array(([1.0, 2.0], ([0, 69_999], [0, 3])), shape=(70_000, 4))
    for layout in ("csr", "compact"):
        built = from_csr(a, layout=layout, index="u16")
        assert (built.rmatvec(np.ones(70_000))).tolist() == [1, 0, 0, 2]


def test_auto_takes_the_layout_that_the_index_width_allows():
    first = np.linspace(0, 199_990, 500).astype(int)
    a = csr_array((np.ones(500), (np.arange(500), first)), shape=(500, 200_000))
    built = from_csr(a, index="u16", sigma=16)
    assert built.layout == "compact"
    assert built.stats.index_bits == 16


def test_diagonal(built, a):
    assert_array_equal(built.diagonal(), a.diagonal())
    assert_array_equal(built.T.diagonal(), a.diagonal())
    assert built.diagonal().dtype == built.dtype


@pytest.mark.parametrize("layout", ["compact", "paper", "csr"])
def test_astype_keeps_the_layout(a, layout):
    built = from_csr(a, layout=layout, block=(32, 20))
    narrow = built.astype("float32")
    assert (narrow.layout, narrow.dtype) == (layout, np.float32)
    assert_array_equal(narrow @ integers(50).astype("float32"), a @ integers(50))
    assert_array_equal(narrow.astype("float64") @ integers(50), a @ integers(50))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_astype_complex_is_possible_from_any_layout(a, layout):
    built = from_csr(a, layout=layout).astype("complex128")
    assert built.layout == "csr"
    assert_array_equal(built @ (1j * integers(50)), 1j * (a @ integers(50)))
    with pytest.raises(InputError, match="complex128 values do not fit float64"):
        built.astype("float64")


def test_pickle_keeps_the_arrays_and_the_product(built):
    again = pickle.loads(pickle.dumps(built))
    assert repr(again) == repr(built)
    assert (again.config, again.reasons) == (built.config, built.reasons)
    for name, array in built.arrays().items():
        assert_array_equal(again.arrays()[name], array)
    assert (again @ integers(50)).tobytes() == (built @ integers(50)).tobytes()


def test_with_threads_shares_the_arrays(a, several_workers):
    built = from_csr(a, layout="compact", threads=1)
    more = built.with_threads(5)
    assert (built.threads, more.threads) == (1, 5)
    assert more._stored is built._stored
    assert_array_equal(more @ integers(50), a @ integers(50))
    with pytest.raises(ConfigError, match="threads: expected a positive int"):
        built.with_threads(0)


def test_small_matrices_use_one_thread(a):
    assert from_csr(a, threads=8).threads == 1


def test_at_most_64_threads(a, several_workers):
    built = from_csr(a, layout="csr", threads=1000)
    assert built.threads == 64
    assert_array_equal(built @ integers(50), a @ integers(50))


@pytest.mark.parametrize("layout", ["compact", "paper", "csr"])
def test_layouts_convert_into_each_other(a, layout):
    built = from_csr(a, layout=layout)
    paper, compact = built.to_paper(block=(32, 20), hash="sort"), built.to_compact(lanes=8)
    assert (paper.layout, paper._stored.height, paper.config.hash) == ("paper", 32, "sort")
    assert (compact.layout, compact._stored.lanes) == ("compact", 8)
    for other in (paper, compact):
        assert_array_equal(other.to_csr().toarray(), a.toarray())


@pytest.mark.skipif(cupy_or_none() is not None, reason="there is a CUDA device")
def test_other_devices_are_refused(a):
    with pytest.raises((ConfigError, MissingExtraError), match=r"cuda|CPU"):
        from_csr(a).to("cuda")


# Other values


@pytest.mark.parametrize("layout", ["compact", "paper", "csr"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_update_values_keeps_the_pattern_and_the_order(a, layout, dtype):
    built = from_csr(a, layout=layout, keep_perm=True, block=(32, 20), dtype=dtype)
    values = integers(a.nnz).astype(dtype)
    other = built.update_values(values)
    expected = csr_array((values, a.indices, a.indptr), shape=a.shape)
    x = integers(50).astype(dtype)
    assert other.dtype == dtype
    assert_array_equal(other @ x, expected @ integers(50))
    assert_array_equal(other.to_csr().data, values)
    assert_array_equal(built @ x, a @ integers(50))
    assert_array_equal(other.rmatvec(np.ones(60, dtype)), expected.T @ np.ones(60))
    assert_array_equal(other.update_values(a.data.astype(dtype)) @ x, a @ integers(50))


@pytest.mark.parametrize("layout", ["compact", "csr", "paper"])
def test_a_uniform_matrix_may_become_another(a, layout):
    a.data[:] = 2
    built = from_csr(a, layout=layout, keep_perm=True)
    values = integers(a.nnz)
    other = built.update_values(values)
    assert not other.stats.uniform
    assert_array_equal(
        other @ integers(50), csr_array((values, a.indices, a.indptr), a.shape) @ integers(50)
    )
    assert_array_equal(built @ integers(50), a @ integers(50))


@pytest.mark.parametrize("layout", ["compact", "csr", "paper"])
def test_updated_values_belong_to_the_matrix(a, layout):
    built = from_csr(a, layout=layout, keep_perm=True)
    values = integers(a.nnz)
    other = built.update_values(values)
    before = other @ integers(50)
    values[:] = 0
    assert_array_equal(other @ integers(50), before)


def test_complex_values_update_complex_matrices(a):
    built = from_csr(a.astype(complex))
    assert_array_equal(built.update_values(1j * a.data) @ integers(50), 1j * (a @ integers(50)))
    with pytest.raises(InputError, match="values have dtype complex128, expected float64"):
        from_csr(a, layout="csr").update_values(1j * a.data)


@pytest.mark.parametrize("layout", ["compact", "paper", "csr"])
@pytest.mark.parametrize("dtype", ["int64", "bool", "float16", ">f4"])
def test_values_of_types_that_fit_exactly_are_taken(a, layout, dtype):
    built = from_csr(a, layout=layout, keep_perm=True, dtype="float32")
    values = np.abs(integers(a.nnz)).astype(dtype)
    other = built.update_values(values)
    assert other.dtype == "float32"
    assert_array_equal(other.to_csr().data, values)


@pytest.mark.parametrize(
    ("stored", "given", "expected"),
    [
        ("float32", "float64", "dtype float64, expected float32: digits would be lost"),
        ("float64", "longdouble", r"dtype \w+, expected float64: digits would be lost"),
        ("complex64", "complex128", "dtype complex128, expected complex64: digits would be lost"),
        ("complex64", "float64", "dtype float64, expected complex64: digits would be lost"),
        ("complex64", "U1", "dtype <U1, expected complex64"),
    ],
)
def test_values_that_would_lose_digits_are_refused(a, stored, given, expected):
    built = from_csr(a, layout="csr", dtype=stored)
    with pytest.raises(InputError, match=f"values have {expected}"):
        built.update_values(np.ones(a.nnz).astype(given))


def test_integer_values_that_would_be_rounded_are_refused(a):
    built = from_csr(a, layout="csr", dtype="float32")
    with pytest.raises(InputError, match="expected float32: an integer exceeds 16777216"):
        built.update_values(np.full(a.nnz, 2**24 + 1))


def test_updating_needs_the_right_length_type_and_permutation(a):
    built = from_csr(a, layout="compact", keep_perm=True)
    with pytest.raises(InputError, match=rf"values have shape \(3,\), expected \({a.nnz},\)"):
        built.update_values([1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="values have shape"):
        built.update_values(np.ones((a.nnz, 1)))
    with pytest.raises(InputError, match="values have dtype <U1, expected float64"):
        built.update_values(["a"] * a.nnz)
    for layout in ("compact", "paper"):
        with pytest.raises(InputError, match="build with keep_perm=True"):
            from_csr(a, layout=layout).update_values(a.data)


@pytest.mark.parametrize("name", awkward_matrices())
def test_every_structure_survives_every_conversion(name):
    a = awkward_matrices()[name].to_scipy()
    x = np.random.default_rng(0).standard_normal(a.shape[1])
    expected = a @ x
    built = from_csr(a)
    for other in (
        built.to_paper(),
        built.to_compact(),
        pickle.loads(pickle.dumps(built)),
        built.T.T,
    ):
        assert isinstance(other, HBPMatrix)
        assert_allclose(other @ x, expected, rtol=1e-11, atol=1e-12)


def test_sparse_operands_are_named(a):
    for x in (a.T.tocsr(), from_csr(a)):
        with pytest.raises(InputError, match="x is a sparse matrix, expected a dense array"):
            from_csr(a) @ x


def test_the_stored_arrays_are_read_only(a):
    with pytest.raises(ValueError, match="read-only"):
        from_csr(a, layout="compact").arrays()["col"][0] = 1 << 15


def test_a_real_beta_keeps_infinite_parts_apart(a):
    z = a.astype(complex)
    out = np.full(a.shape[0], complex(0, np.inf))
    from_csr(z).matvec(np.zeros(a.shape[1], complex), out, beta=1.0)
    assert_array_equal(out, np.full(a.shape[0], complex(0, np.inf)))
