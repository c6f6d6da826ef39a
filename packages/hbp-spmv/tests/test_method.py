# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hbp_spmv import HBPMatrix, from_csr, reference, verify
from hbp_spmv.errors import VerificationError
from hbp_spmv.hashing import HashParams
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy.sparse import csr_array
from tenfold_core.errors import InputError
from tenfold_core.testing.sparse import awkward_matrices, csr_matrices, random_csr

ARRAYS = ("col", "data", "add_sign", "zero_row", "begin_ptr", "output_hash")
FAMILY = [(4, 8), (1, 7), (0, 5)]


def assert_same_arrays(found, expected):
    assert set(found) == set(ARRAYS)
    for name in ARRAYS:
        assert found[name].dtype == expected[name].dtype, name
        assert_array_equal(found[name], expected[name], err_msg=name)


def assert_same_csr(found, expected):
    assert found.shape == expected.shape
    assert_array_equal(found.indptr, expected.indptr)
    assert_array_equal(found.indices, expected.indices)
    assert found.data.tobytes() == expected.data.tobytes()


def paper(a, height, width, lanes=32, s=4, t=8, **settings):
    return from_csr(
        a,
        layout="paper",
        hash="paper",
        hash_params={"s": s, "t": t},
        block=(height, width),
        lanes=lanes,
        **settings,
    )


def test_published_arrays_of_the_worked_example(worked_example):
    matrix = paper(worked_example, 8, 8, lanes=4, s=1, t=1)
    arrays = matrix.arrays()
    assert list(arrays) == list(ARRAYS)
    assert arrays["output_hash"].tolist() == [1, 2, 3, 4, 0, 5, 6, 7]
    assert arrays["col"].tolist() == [0, 0, 0, 1, 1, 2, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4]
    data = [30, 40, 50, 41, 51, 52, 10, 60, 80, 11, 61, 81, 12, 82, 13, 83, 14]
    assert arrays["data"].tolist() == data
    signs = [-1, 2, 2, -1, 1, -1, 3, 3, 3, 3, -1, 2, 2, 2, 2, -1, -1]
    assert arrays["add_sign"].tolist() == signs
    assert arrays["zero_row"].tolist() == [-1, 1, 1, 1, 0, 0, -1, 1]
    assert arrays["begin_ptr"].tolist() == [0, 6, 17]
    assert matrix._stored.lengths().tolist() == [0, 1, 2, 3, 5, 2, 0, 4]
    assert (matrix @ np.arange(1.0, 9)).tolist() == [190, 0, 30, 122, 308, 182, 0, 820]
    # 17 nonzeros of 16 bytes, 8 slots of 8, three starts
    assert matrix.nbytes == 17 * 16 + 8 * 8 + 3 * 4


@pytest.mark.parametrize(("s", "t"), FAMILY)
@pytest.mark.parametrize(
    ("height", "rows"), [(511, 1022), (512, 512), (512, 1100), (513, 1025), (1024, 1024)]
)
def test_literal_construction_equals_the_layout(height, rows, s, t):
    a = random_csr(rows, 50, density=0.12, seed=height + t, empty_every=5, dense_row=9).to_scipy()
    expected = reference.build_paper(a, height=height, width=32, params=HashParams(s=s, t=t))
    assert_same_arrays(paper(a, height, 32, s=s, t=t).arrays(), expected)


@given(
    csr_matrices(), st.sampled_from([31, 32, 64]), st.sampled_from([50, 128]), st.integers(1, 40)
)
def test_literal_construction_equals_the_layout_on_any_shape(matrix, height, width, lanes):
    a = matrix.to_scipy()
    expected = reference.build_paper(
        a, height=height, width=width, lanes=lanes, params=HashParams(s=1, t=3)
    )
    assert_same_arrays(paper(a, height, width, lanes, s=1, t=3).arrays(), expected)


@pytest.mark.parametrize("columns", [4095, 4096, 4097])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_literal_construction_equals_the_layout_around_the_published_width(columns, dtype):
    a = random_csr(70, columns, density=0.01, seed=columns, dtype=dtype).to_scipy()
    expected = reference.build_paper(a, height=64)
    found = paper(a, 64, 4096).arrays()
    assert_same_arrays(found, expected)
    assert found["data"].dtype == dtype
    assert len(found["output_hash"]) == 70 * (2 if columns > 4096 else 1)


def test_the_published_settings_are_the_defaults():
    a = random_csr(600, 5000, density=0.005, seed=3).to_scipy()
    assert_same_arrays(from_csr(a, layout="paper", hash="paper").arrays(), reference.build_paper(a))


@given(csr_matrices(max_rows=300), st.sampled_from(["paper", "tuned", "lut", "sort", "none"]))
def test_add_sign_is_the_number_of_active_lanes(matrix, method):
    layout = from_csr(
        matrix.to_scipy(), layout="paper", hash=method, block=(100, 60), lanes=8
    )._stored
    assert int(layout.lengths().sum()) == matrix.nnz
    slot = group = 0
    for top in range(0, matrix.shape[0], 100):
        for _ in range(layout.strips):
            rows = min(100, matrix.shape[0] - top)
            for first in range(0, rows, 8):
                lengths = layout.lengths()[slot + first : slot + min(first + 8, rows)]
                expected = []
                for step in range(lengths.max(initial=0)):
                    for lane in np.flatnonzero(lengths > step):
                        rest = (lengths[lane:] > step).sum() + (lengths[:lane] > step + 1).sum()
                        expected.append(-1 if lengths[lane] == step + 1 else rest)
                begin, end = layout.begin_ptr[group : group + 2]
                assert layout.add_sign[begin:end].tolist() == expected
                group += 1
            slot += rows


@pytest.mark.parametrize("method", ["paper", "tuned", "lut", "sort", "none"])
def test_every_block_holds_a_permutation_of_its_rows(method, skewed):
    arrays = from_csr(skewed, layout="paper", hash=method, block=(256, 200)).arrays()
    start = 0
    for rows in (256, 256, 88):
        for _strip in range(3):
            placed = arrays["output_hash"][start : start + rows]
            assert_array_equal(np.sort(placed), np.arange(rows))
            start += rows
    assert start == len(arrays["output_hash"])


@pytest.mark.parametrize("method", ["lut", "sort"])
def test_sorting_hashes_place_short_rows_first(method, worked_example):
    arrays = from_csr(worked_example, layout="paper", hash=method, block=(8, 8), lanes=4).arrays()
    assert arrays["output_hash"].tolist() == [1, 6, 2, 3, 5, 4, 7, 0]


@pytest.mark.parametrize("method", ["paper", "tuned", "lut", "sort", "none"])
@pytest.mark.parametrize("name", awkward_matrices())
def test_csr_comes_back_identical(name, method):
    a = awkward_matrices()[name].to_scipy()
    matrix = from_csr(a, layout="paper", hash=method, block=(100, 70), lanes=8)
    assert_same_csr(matrix.to_csr(), a)


@pytest.mark.parametrize("name", awkward_matrices())
def test_paper_to_csr_to_paper_is_identical(name):
    a = awkward_matrices()[name].to_scipy()
    matrix = paper(a, 100, 70, lanes=8)
    again = paper(matrix.to_csr(), 100, 70, lanes=8)
    assert_same_arrays(again.arrays(), matrix.arrays())


@given(csr_matrices(max_rows=200, max_columns=200))
def test_from_paper_takes_the_six_arrays(matrix):
    arrays = paper(matrix.to_scipy(), 64, 50, lanes=8).arrays()
    again = HBPMatrix.from_paper(arrays, matrix.shape, height=64, width=50, lanes=8)
    assert again.layout == "paper"
    assert_same_arrays(again.arrays(), arrays)
    assert_same_csr(again.to_csr(), matrix.to_scipy())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(600, 5000), (512, 4096), (513, 4097), (1, 1), (7, 9)])
def test_bytes_follow_the_published_model(shape, dtype):
    a = random_csr(*shape, density=0.02, seed=1, dtype=dtype).to_scipy()
    rows, columns = shape
    strips = -(-columns // 4096)
    groups = sum(-(-min(512, rows - top) // 32) for top in range(0, rows, 512)) * strips
    size = np.dtype(dtype).itemsize
    model = a.nnz * (4 + size + 4) + strips * rows * (4 + 4) + 4 * (groups + 1)
    assert from_csr(a, layout="paper").nbytes == model


def test_the_permutation_leads_to_the_csr_position(skewed):
    layout = paper(skewed, 256, 200, keep_perm=True)._stored
    assert_array_equal(np.sort(layout.perm), np.arange(skewed.nnz))
    assert_array_equal(skewed.data[layout.perm], layout.data)
    assert_array_equal(skewed.indices[layout.perm], layout.col)
    assert paper(skewed, 256, 200)._stored.perm is None


@given(csr_matrices(max_rows=150, max_columns=150))
def test_the_compiled_walk_equals_the_slow_one_on_integers(matrix):
    a = matrix.to_scipy()
    a.data = np.round(a.data * 4)
    x = np.arange(a.shape[1]) % 7 - 3.0
    built = paper(a, 64, 50, lanes=8)
    expected = reference.product_paper(built.arrays(), x, a.shape, height=64, width=50, lanes=8)
    assert_array_equal(built @ x, expected)


def test_reordering_lowers_the_spread_that_the_statistics_report(skewed):
    stats = from_csr(skewed, layout="paper", hash="lut", block=(512, 500)).stats
    unordered = from_csr(skewed, layout="paper", hash="none", block=(512, 500)).stats
    assert stats.std_before == unordered.std_before == unordered.std_after
    assert stats.std_after < 0.5 * stats.std_before
    assert stats.lane_efficiency > unordered.lane_efficiency


def test_too_many_dense_slots_are_refused_before_anything_is_allocated():
    a = csr_array((4096, 2**31 - 1))
    with pytest.raises(InputError, match=r"2147483648 dense slots.*use layout='compact'"):
        from_csr(a, layout="paper")


def test_columns_beyond_32_bits_are_refused():
    with pytest.raises(InputError, match="layout 'paper'"):
        from_csr(csr_array((1, 2**31)), layout="paper", block=(512, 2**31))


def damaged(arrays, name, position, value):
    arrays = {key: array.copy() for key, array in arrays.items()}
    arrays[name][position] = value
    return arrays


@pytest.mark.parametrize(
    ("name", "position", "value", "match"),
    [
        ("col", 3, 8, "array 'col' is up to 8, expected within 0..7"),
        ("col", 3, -1, "array 'col'"),
        ("add_sign", 6, 4, "array 'add_sign' is not consistent"),
        ("add_sign", 6, 0, "array 'add_sign' is not consistent"),
        ("add_sign", 6, 1 << 30, "array 'add_sign' is not consistent"),
        ("add_sign", 6, -2, "array 'add_sign' is not consistent"),
        ("add_sign", 16, 1, "array 'add_sign' is not consistent"),
        ("zero_row", 0, 0, "array 'zero_row' is not consistent"),
        ("zero_row", 1, 5, "array 'zero_row' is not consistent"),
        ("zero_row", 1, -7, "array 'zero_row' is not consistent"),
        ("begin_ptr", 1, 18, "array 'begin_ptr'"),
        ("begin_ptr", 1, -1, "array 'begin_ptr'"),
        ("begin_ptr", 0, 1, "array 'begin_ptr'"),
        ("begin_ptr", 2, 16, "array 'begin_ptr'"),
        ("output_hash", 0, 8, "array 'output_hash' is not consistent"),
        ("output_hash", 0, 2, "array 'output_hash' is not consistent"),
        ("output_hash", 0, -1, "array 'output_hash' is not consistent"),
    ],
)
def test_foreign_arrays_are_checked(worked_example, name, position, value, match):
    arrays = paper(worked_example, 8, 8, lanes=4, s=1, t=1).arrays()
    bad = damaged(arrays, name, position, value)
    with pytest.raises(InputError, match=match):
        HBPMatrix.from_paper(bad, (8, 8), height=8, width=8, lanes=4)


@pytest.mark.parametrize("name", ARRAYS)
def test_missing_short_and_mistyped_arrays_are_named(worked_example, name):
    arrays = paper(worked_example, 8, 8, lanes=4).arrays()
    without = {key: array for key, array in arrays.items() if key != name}
    for bad in (without, without | {name: arrays[name][:-1]}, without | {name: arrays[name][None]}):
        with pytest.raises(InputError, match="array '"):
            HBPMatrix.from_paper(bad, (8, 8), height=8, width=8, lanes=4)
    match = "float32 or float64" if name == "data" else f"array '{name}' is int16"
    with pytest.raises(InputError, match=match):
        HBPMatrix.from_paper(
            without | {name: arrays[name].astype(np.int16)}, (8, 8), height=8, width=8, lanes=4
        )


def test_two_rows_that_share_an_element_are_refused():
    # rows 0 and 1 of two elements each; row 1's walk is bent to visit row 0's last element
    a = csr_array(np.array([[1.0, 2.0], [3.0, 4.0]]))
    arrays = paper(a, 2, 2, lanes=2, s=0, t=0).arrays()
    assert arrays["add_sign"].tolist() == [2, 2, -1, -1]
    with pytest.raises(InputError, match="array 'add_sign' is not consistent"):
        HBPMatrix.from_paper(damaged(arrays, "add_sign", 1, 1), (2, 2), height=2, width=2, lanes=2)


@pytest.mark.parametrize("dtype", ["int64", "complex64", "complex128", "longdouble", "float16"])
def test_values_that_the_kernel_does_not_know_are_refused(worked_example, dtype):
    arrays = paper(worked_example, 8, 8, lanes=4).arrays()
    arrays["data"] = arrays["data"].astype(dtype)
    with pytest.raises(InputError, match="expected float32 or float64"):
        HBPMatrix.from_paper(arrays, (8, 8), height=8, width=8, lanes=4)


def test_strided_and_big_endian_arrays_are_understood(worked_example):
    arrays = paper(worked_example, 8, 8, lanes=4, s=1, t=1).arrays()
    strided = {name: np.repeat(array, 3)[::3] for name, array in arrays.items()}
    foreign = {name: a.astype(a.dtype.newbyteorder(">")) for name, a in arrays.items()}
    for altered in (strided, foreign):
        matrix = HBPMatrix.from_paper(altered, (8, 8), height=8, width=8, lanes=4)
        assert (matrix @ np.arange(1.0, 9)).tolist() == [190, 0, 30, 122, 308, 182, 0, 820]


@pytest.mark.parametrize("sizes", [(0, 8, 4), (8, 0, 4), (8, 8, 0), (1 << 40, 8, 4), (8, 8, 2048)])
def test_block_sizes_out_of_range_are_refused(worked_example, sizes):
    arrays = paper(worked_example, 8, 8, lanes=4).arrays()
    height, width, lanes = sizes
    with pytest.raises(InputError, match=r"array '(height|width|lanes)'"):
        HBPMatrix.from_paper(arrays, (8, 8), height=height, width=width, lanes=lanes)


def test_a_broken_permutation_is_caught_by_verify(worked_example):
    arrays = paper(worked_example, 8, 8, lanes=4, s=1, t=1).arrays()
    swapped = damaged(arrays, "output_hash", [3, 4], [0, 4])
    matrix = HBPMatrix.from_paper(swapped, (8, 8), height=8, width=8, lanes=4)
    with pytest.raises(VerificationError, match=r"row [04]: got .*, want .* within"):
        verify(matrix, worked_example)
