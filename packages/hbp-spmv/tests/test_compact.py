# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hbp_spmv import compact, from_csr
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy.sparse import csr_array
from tenfold_core.errors import ConfigError
from tenfold_core.sparse import CSR
from tenfold_core.testing.sparse import (
    assert_close_to_reference,
    awkward_matrices,
    csr_from_lengths,
    csr_matrices,
)

UNUSED = 0xFFFFFFFF
HASHES = ["lut", "paper", "tuned", "sort", "none"]


def build(a, **settings):
    return from_csr(a, layout="compact", **settings)


def assert_same_csr(found, expected):
    assert found.shape == expected.shape
    assert_array_equal(found.indptr, expected.indptr)
    assert_array_equal(found.indices, expected.indices)
    assert found.data.tobytes() == expected.data.tobytes()


@pytest.mark.parametrize("method", ["lut", "sort"])
def test_arrays_of_the_worked_example(worked_example, method):
    matrix = build(worked_example, hash=method, lanes=4, sigma=8)
    arrays = matrix.arrays()
    assert arrays["targets"].tolist() == [0, 7, 4, 3, 5, 2, UNUSED, UNUSED]
    assert arrays["lengths"].tolist() == [5, 4, 3, 2, 2, 1, 0, 0]
    assert arrays["start"].tolist() == [0, 14, 17]
    assert arrays["group_base"].tolist() == [0, 0]
    col = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 0, 0, 1]
    assert arrays["col"].tolist() == col + [0] * 4
    val = [10, 80, 50, 40, 11, 81, 51, 41, 12, 82, 52, 13, 83, 14, 60, 30, 61]
    assert arrays["val"].tolist() == val + [0] * 4
    assert arrays["empty_rows"].tolist() == [1, 6]
    assert arrays["segment_start"].tolist() == [17]
    assert arrays["split_start"].tolist() == [0]
    assert (matrix @ np.arange(1.0, 9)).tolist() == [190, 0, 30, 122, 308, 182, 0, 820]


def test_a_window_ends_its_last_group(worked_example):
    # windows of 4 rows: k = 5,0,1,2 gives rows 0,3,2; k = 3,2,0,4 gives rows 7,4,5
    arrays = build(worked_example, lanes=4, sigma=4).arrays()
    assert arrays["targets"].tolist() == [0, 3, 2, UNUSED, 7, 4, 5, UNUSED]
    assert arrays["lengths"].tolist() == [5, 2, 1, 0, 4, 3, 2, 0]


def test_strips_of_the_worked_example(worked_example):
    # strips of 3 columns: parts of 3,1,2,3,2,3 (rows 0,2,3,4,5,7) and of 2,1 (rows 0,7);
    # rows 0 and 7 have two sums each: slots 8,9 and 10,11
    matrix = build(worked_example, lanes=4, strips=3)
    arrays = matrix.arrays()
    assert arrays["targets"].tolist() == [8, 4, 10, 3, 5, 2, UNUSED, UNUSED, 9, 11, UNUSED, UNUSED]
    assert arrays["lengths"].tolist() == [3, 3, 3, 2, 2, 1, 0, 0, 2, 1, 0, 0]
    assert arrays["split_rows"].tolist() == [0, 7]
    assert arrays["split_start"].tolist() == [0, 2, 4]
    assert (matrix @ np.arange(1.0, 9)).tolist() == [190, 0, 30, 122, 308, 182, 0, 820]


def test_a_heavy_row_is_cut_into_segments_by_hand():
    # one row of 5000 ones in 6000 columns: segments of 2048, 2048 and 904 nonzeros
    a = csr_from_lengths([3, 0, 5000], 6000, np.random.default_rng(0)).to_scipy()
    matrix = build(a, lanes=4)
    arrays = matrix.arrays()
    assert matrix.stats.heavy_rows == 1
    assert arrays["targets"].tolist() == [0, UNUSED, UNUSED, UNUSED]
    assert arrays["segment_start"].tolist() == [3, 2051, 4099, 5003]
    assert arrays["segment_target"].tolist() == [3, 4, 5]
    assert arrays["split_rows"].tolist() == [2]
    assert arrays["split_start"].tolist() == [0, 3]
    assert arrays["empty_rows"].tolist() == [1]
    assert_array_equal(arrays["val"][3:5003], a.data[3:])


@pytest.mark.parametrize(
    ("nonzeros", "segments"), [(128, 0), (129, 1), (2048, 1), (2049, 2), (4096, 2), (4097, 3)]
)
def test_segments_hold_2048_nonzeros(nonzeros, segments):
    # 600 rows of one nonzero: the mean is below 8, so rows above 128 are heavy
    a = csr_from_lengths([1] * 600 + [nonzeros], 5000, np.random.default_rng(0)).to_scipy()
    matrix = build(a)
    x = np.random.default_rng(1).standard_normal(5000)
    assert len(matrix.arrays()["segment_target"]) == segments
    assert matrix.arrays()["split_rows"].tolist() == ([600] if segments > 1 else [])
    assert_close_to_reference(matrix @ x, CSR.from_scipy(a), x)


def test_a_segment_never_spans_more_columns_than_16_bits_reach():
    columns = 300_000
    sparse = np.linspace(0, columns - 1, 700).astype(int)
    col = np.concatenate([sparse, np.arange(900)])
    ptr = np.concatenate([[0, 700], np.arange(1600, 1801)])
    col = np.concatenate([col, np.arange(200) + 99_900])
    a = csr_array((np.arange(1.0, 1801), col, ptr), shape=(202, columns))
    matrix = build(a)
    arrays = matrix.arrays()
    x = np.random.default_rng(1).standard_normal(columns)
    assert matrix.stats.heavy_rows == 2
    assert arrays["col"].dtype == np.uint16
    assert arrays["segment_base"].max() == columns - 65536
    assert (np.diff(arrays["segment_start"]) > 0).all()
    assert_same_csr(matrix.to_csr(), a)
    assert_close_to_reference(matrix @ x, CSR.from_scipy(a), x)


@pytest.mark.parametrize(("last", "segments"), [(65_535, 1), (65_536, 2)])
def test_the_span_of_a_segment_ends_at_65536_columns(last, segments):
    col = np.append(np.arange(200), [last, *range(300)])
    ptr = np.append(0, np.arange(201, 502))
    a = csr_array((np.arange(1.0, 502), col, ptr), shape=(301, 100_000))
    matrix = build(a)
    x = np.zeros(100_000)
    x[[0, last]] = 3, 5
    assert matrix.stats.index_bits == 16
    assert len(matrix.arrays()["segment_base"]) == segments
    assert (matrix @ x)[0] == 1 * 3 + 201 * 5


@pytest.mark.parametrize("columns", [65536, 65537, 200_000])
def test_narrow_groups_of_wide_matrices_take_16_bit_offsets(columns):
    a = _band(columns, 300)
    matrix = build(a, sigma=32)
    arrays = matrix.arrays()
    x = np.random.default_rng(1).standard_normal(columns)
    assert arrays["col"].dtype == np.uint16
    assert bool(arrays["group_base"].any()) == (columns > 65536)
    assert int(arrays["group_base"].max(initial=0)) <= columns - 65536
    assert_same_csr(matrix.to_csr(), a)
    assert_close_to_reference(matrix @ x, CSR.from_scipy(a), x)


def test_wide_groups_of_wide_matrices_take_32_bit_columns():
    a = _scattered(200_000)
    matrix = build(a)
    x = np.random.default_rng(1).standard_normal(200_000)
    assert matrix.arrays()["col"].dtype == np.uint32
    assert not matrix.arrays()["group_base"].any()
    assert matrix.stats.index_bits == 32
    assert_same_csr(matrix.to_csr(), a)
    assert_close_to_reference(matrix @ x, CSR.from_scipy(a), x)


@pytest.mark.parametrize(("last", "bits"), [(65535, 16), (65536, 32)])
def test_the_span_of_a_group_decides_at_65536_columns(last, bits):
    a = csr_array(([1.0, 2.0], ([0, 1], [0, last])), shape=(2, 100_000))
    x = np.zeros(100_000)
    x[[0, last]] = 3, 5
    matrix = build(a)
    assert matrix.stats.index_bits == bits
    assert (matrix @ x).tolist() == [3, 10]


def test_the_index_width_can_be_asked_for(worked_example):
    assert build(worked_example, index="u32").stats.index_bits == 32
    with pytest.raises(ConfigError, match=r"a group spans \d+ columns.*use index='auto'"):
        build(_scattered(200_000), index="u16")
    assert build(_scattered(200_000), index="u16", strips=65536).stats.index_bits == 16


@pytest.mark.parametrize("strips", [1, 7, 64, 499, 500, 501, 65536])
@pytest.mark.parametrize("method", HASHES)
def test_any_strip_width_stores_the_same_matrix(skewed, strips, method):
    matrix = build(skewed, strips=strips, hash=method, sigma=100)
    x = np.random.default_rng(1).standard_normal(500)
    assert_same_csr(matrix.to_csr(), skewed)
    assert_close_to_reference(matrix @ x, CSR.from_scipy(skewed), x)


@given(
    csr_matrices(),
    st.sampled_from(HASHES),
    st.sampled_from([4, 8, 16, 32]),
    st.none() | st.integers(1, 800),
    st.none() | st.integers(1, 800),
)
def test_csr_comes_back_identical(matrix, method, lanes, sigma, strips):
    settings = {"hash": method, "lanes": lanes, "sigma": sigma, "strips": strips}
    assert_same_csr(build(matrix.to_scipy(), **settings).to_csr(), matrix.to_scipy())


@given(csr_matrices(), st.sampled_from(HASHES), st.sampled_from([4, 16]), st.sampled_from([0, 90]))
def test_the_structure_is_that_of_the_layout(matrix, method, lanes, strips):
    arrays = build(
        matrix.to_scipy(), hash=method, lanes=lanes, strips=strips or None, sigma=200
    ).arrays()
    rows = matrix.shape[0]
    lengths = arrays["lengths"].reshape(-1, lanes)
    segments = np.diff(arrays["segment_start"])
    partials = int(arrays["split_start"][-1])
    assert int(lengths.sum()) + int(segments.sum()) == matrix.nnz
    assert (np.diff(lengths, axis=1) <= 0).all()
    assert (lengths[:, :1] > 0).all()
    assert_array_equal(lengths.sum(axis=1), np.diff(arrays["start"]))
    assert (arrays["targets"][arrays["lengths"] == 0] == UNUSED).all()
    written = [arrays["targets"][arrays["lengths"] > 0], arrays["segment_target"]]
    written += [arrays["empty_rows"], arrays["split_rows"]]
    assert_array_equal(np.sort(np.concatenate(written)), np.arange(rows + partials))
    assert_array_equal(arrays["empty_rows"], np.flatnonzero(matrix.row_lengths() == 0))
    assert (np.diff(arrays["split_start"]) > 1).all()
    assert (arrays["col"][matrix.nnz :] == 0).all()


@pytest.mark.parametrize("name", awkward_matrices())
def test_compact_and_paper_hold_the_same_matrix(name):
    a = awkward_matrices()[name].to_scipy()
    matrix = build(a)
    published = matrix.to_paper(block=(100, 70))
    assert (matrix.layout, published.layout) == ("compact", "paper")
    assert_same_csr(published.to_csr(), a)
    back = published.to_compact()
    for array, value in matrix.arrays().items():
        assert_array_equal(back.arrays()[array], value, err_msg=array)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("strips", [None, 100])
def test_bytes_follow_the_model(skewed, dtype, strips):
    matrix = build(skewed, dtype=dtype, lanes=16, strips=strips)
    arrays = matrix.arrays()
    groups, segments = len(arrays["group_base"]), len(arrays["segment_base"])
    empty = int((np.diff(skewed.indptr) == 0).sum())
    splits = len(arrays["split_rows"])
    size = np.dtype(dtype).itemsize
    model = (
        (skewed.nnz + 16) * (2 + size)  # columns and values, padded by one group
        + groups * (8 + 4 + 16 * (4 + 4))  # start, base, lengths, targets
        + 8  # end of the last group
        + segments * (8 + 4 + 4)
        + 8
        + empty * 4
        + splits * (4 + 8)
        + 8
    )
    assert matrix.nbytes == model


def test_bytes_of_a_wide_scattered_matrix_count_32_bit_columns():
    a = _scattered(200_000)
    matrix = build(a, lanes=4, sigma=512)
    groups = -(-a.shape[0] // 4)
    assert matrix.nbytes == (a.nnz + 4) * (4 + 8) + groups * (12 + 32) + 8 + 8 + 8


def test_equal_values_are_stored_once(skewed):
    skewed.data[:] = 2.5
    matrix = build(skewed)
    x = np.random.default_rng(1).standard_normal(500)
    assert matrix.arrays()["val"].tolist() == [2.5]
    assert matrix.stats.uniform
    assert_same_csr(matrix.to_csr(), skewed)
    assert_close_to_reference(matrix @ x, CSR.from_scipy(skewed), x)


def test_zeros_of_both_signs_are_not_equal_values():
    a = csr_array((np.array([0.0, -0.0, 0.0]), [0, 1, 2], [0, 1, 2, 3]), shape=(3, 3))
    for layout in ("compact", "csr", "paper"):
        back = from_csr(a, layout=layout).to_csr().data
        assert_array_equal(np.signbit(back), [False, True, False])


def test_nan_values_are_kept():
    a = csr_array((np.full(3, np.nan), [0, 1, 2], [0, 1, 2, 3]), shape=(3, 3))
    assert np.isnan(build(a).to_csr().data).all()
    assert np.isnan(build(a) @ np.ones(3)).all()


def test_complex_values_that_differ_in_a_sign_are_not_equal():
    values = np.array([complex(1, 0.0), complex(1, -0.0)])
    back = from_csr(csr_array((values, [0, 1], [0, 1, 2]), shape=(2, 2))).to_csr().data
    assert_array_equal(np.signbit(back.imag), [False, True])


@pytest.mark.parametrize("layout", ["compact", "paper", "csr"])
def test_explicit_zeros_are_stored(layout):
    a = csr_array((np.array([0.0, 1.0, 0.0]), [0, 1, 1], [0, 2, 3, 3]), shape=(3, 2))
    matrix = from_csr(a, layout=layout)
    assert matrix.nnz == 3
    assert_same_csr(matrix.to_csr(), a)


@pytest.mark.parametrize("strips", [None, 64])
def test_the_permutation_leads_to_the_csr_position(skewed, strips):
    layout = build(skewed, keep_perm=True, strips=strips)._stored
    row, col = layout.coordinates()
    assert_array_equal(np.sort(layout.perm), np.arange(skewed.nnz))
    assert_array_equal(skewed.indices[layout.perm], col)
    assert_array_equal(skewed.data[layout.perm], layout.val[: skewed.nnz])
    owner = np.repeat(np.arange(600), np.diff(skewed.indptr))
    assert_array_equal(owner[layout.perm], row)
    assert build(skewed)._stored.perm is None


@pytest.mark.parametrize("sigma", [16, 100, 512])
def test_rows_stay_in_their_window(sigma):
    a = csr_from_lengths(np.arange(600) % 7 + 1, 50, np.random.default_rng(0)).to_scipy()
    arrays = build(a, sigma=sigma, lanes=4).arrays()
    order = arrays["targets"][arrays["lengths"] > 0].astype(int)
    assert (np.diff(order // sigma) >= 0).all()


def test_lut_does_not_depend_on_the_number_of_threads(skewed, several_workers):
    one, three = (build(skewed, threads=threads) for threads in (1, 3))
    assert (one.threads, three.threads) == (1, 3)
    for name, array in one.arrays().items():
        assert_array_equal(three.arrays()[name], array)


def test_reordering_raises_the_lane_efficiency(skewed):
    plain, lut, ordered = (build(skewed, hash=h, sigma=600).stats for h in ("none", "lut", "sort"))
    assert plain.lane_efficiency < lut.lane_efficiency <= ordered.lane_efficiency <= 1
    assert lut.std_after < plain.std_after
    assert lut.std_before == plain.std_before


def test_lane_efficiency_by_hand(worked_example):
    # groups of maxima 5 and 2: 17 nonzeros in 4 * 7 slots
    assert build(worked_example, lanes=4).stats.lane_efficiency == 17 / 28


def test_the_window_is_the_smallest_that_is_good_enough():
    regular = csr_from_lengths(np.full(9000, 3), 100, np.random.default_rng(0)).to_scipy()
    mixed = np.random.default_rng(0).permutation(np.repeat([1, 100], [8100, 900]))
    irregular = csr_from_lengths(mixed, 200, np.random.default_rng(0)).to_scipy()
    assert build(regular)._stored.sigma == 512
    assert build(irregular)._stored.sigma > 512


@pytest.mark.parametrize("layout", ["compact", "csr", "paper"])
def test_bytes_grow_in_step_with_the_nonzeros(layout):
    sizes = []
    for rows in (2_000, 4_000, 8_000, 16_000):
        a = csr_from_lengths(np.arange(rows) % 11, 4_000, np.random.default_rng(0)).to_scipy()
        matrix = from_csr(a, layout=layout)
        sizes.append(matrix.nbytes / a.nnz)
    assert max(sizes) <= 1.02 * min(sizes)


def test_the_work_of_cutting_a_heavy_row_grows_in_step_with_its_length(monkeypatch):
    searched = []
    search = np.searchsorted

    def counting(array, *arguments, **settings):
        searched.append(len(array))
        return search(array, *arguments, **settings)

    monkeypatch.setattr(compact.np, "searchsorted", counting)
    totals = []
    for nonzeros in (100_000, 200_000):
        searched.clear()
        build(csr_from_lengths([nonzeros], nonzeros, np.random.default_rng(0)).to_scipy())
        totals.append(sum(searched))
    assert totals[1] <= 2.1 * totals[0]


def _band(columns, rows):
    """Rows of three neighbours that walk from the first to the last column."""
    first = np.linspace(0, columns - 3, rows).astype(int)
    col = (first[:, None] + np.arange(3)).ravel()
    val = np.random.default_rng(0).standard_normal(3 * rows)
    return csr_array((val, col, np.arange(rows + 1) * 3), shape=(rows, columns))


def _scattered(columns):
    """100 rows of 20 nonzeros anywhere."""
    return csr_from_lengths(np.full(100, 20), columns, np.random.default_rng(0)).to_scipy()


def test_wide_heavy_rows_are_not_cut_to_shreds():
    """Rows that 16-bit offsets would cut every few nonzeros get 32-bit offsets instead."""
    columns, long, rows = 20_000_000, 400, 120
    spread = np.linspace(0, columns - 1, long).astype(np.int64)
    ptr = np.append(0, np.cumsum([long] * rows + [1] * 4_000))
    col = np.concatenate([np.tile(spread, rows), np.arange(4_000)])
    a = csr_array((np.ones(ptr[-1]) + np.arange(ptr[-1]) % 7, col, ptr), shape=(4_120, columns))
    matrix = build(a)
    assert matrix.stats.heavy_rows == rows
    assert matrix.stats.index_bits == 32
    assert len(matrix.arrays()["segment_base"]) == rows
    assert_same_csr(matrix.to_csr(), a)


def test_without_reordering_the_deviation_does_not_fall():
    lengths = np.arange(2_048) % 13 + 1
    lengths[::100] = 900
    a = csr_from_lengths(lengths, 2_000, np.random.default_rng(0)).to_scipy()
    stats = build(a, hash="none", sigma=4_096).stats
    assert stats.heavy_rows == 21
    assert stats.std_after == pytest.approx(stats.std_before)
