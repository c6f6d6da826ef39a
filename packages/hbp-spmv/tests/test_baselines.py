# SPDX-License-Identifier: Apache-2.0
import inspect
import itertools

import numpy as np
import pytest
from hbp_spmv.baselines import BASELINES
from hbp_spmv.dp2d import ALPHA, GroupedLayout, cut_groups
from hbp_spmv.formats import ell
from hbp_spmv.kernels.merge import split_path
from hbp_spmv.kernels.sell import fill_slices, sort_windows
from hbp_spmv.preprocessing import METHODS, reorder_times
from hypothesis import given, settings
from numpy.testing import assert_array_equal
from scipy.sparse import csr_array
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.sparse import CSR
from tenfold_core.testing.sparse import (
    assert_close_to_reference,
    awkward_matrices,
    csr_from_lengths,
    csr_matrices,
    random_csr,
)

AWKWARD = awkward_matrices()
OURS = ("csr-merge", "sell", "ell", "2d", "sort2D", "DP2D")
UNPADDED = [name for name in BASELINES if name != "bsr"]


def build(name, a, threads=1):
    reason = BASELINES[name].probe()
    if reason:
        pytest.skip(reason)
    return BASELINES[name].build(a, threads)


def product(name, a, x, threads=1):
    y = np.full(a.shape[0], np.nan, a.dtype)
    build(name, a, threads).multiply(x, y)
    return y


def skewed(rows=3000, columns=9000, seed=1):
    """Rows of 0 to 30 nonzeros and two that span many pieces and strips."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 31, rows)
    lengths[[5, rows - 1]] = columns
    return csr_from_lengths(lengths, columns, rng)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_keeps_the_bound_on_every_awkward_matrix(name, dtype):
    for matrix in awkward_matrices(dtype).values():
        x = np.random.default_rng(0).standard_normal(matrix.shape[1]).astype(dtype)
        assert_close_to_reference(product(name, matrix.to_scipy(), x), matrix, x)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_keeps_the_bound_on_many_pieces_and_strips(name):
    matrix = skewed()
    x = np.random.default_rng(0).standard_normal(matrix.shape[1])
    if name == "ell":
        with pytest.raises(InputError, match="rows padded to 9000 would store"):
            build(name, matrix.to_scipy())
    else:
        assert_close_to_reference(product(name, matrix.to_scipy(), x, threads=2), matrix, x)


@pytest.mark.parametrize("name", BASELINES)
def test_matvec_returns_what_multiply_writes_and_bytes_are_counted(name):
    matrix = random_csr(513, 300, empty_every=4)
    x = np.random.default_rng(0).standard_normal(300)
    operator = build(name, matrix.to_scipy())
    assert_array_equal(operator.matvec(x), product(name, matrix.to_scipy(), x))
    assert operator.nbytes >= matrix.nnz * 8
    assert operator.name == name


@pytest.mark.parametrize("name", OURS)
def test_the_bits_do_not_depend_on_the_thread_count(name):
    matrix = skewed() if name != "ell" else random_csr(2000, 700)
    x = np.random.default_rng(0).standard_normal(matrix.shape[1])
    one = product(name, matrix.to_scipy(), x)
    for threads in (2, 3):
        assert_array_equal(product(name, matrix.to_scipy(), x, threads), one)


@settings(max_examples=25, deadline=None)
@given(matrix=csr_matrices())
def test_our_kernels_keep_the_bound_on_drawn_matrices(matrix):
    x = np.random.default_rng(0).standard_normal(matrix.shape[1])
    for name in OURS:
        assert_close_to_reference(product(name, matrix.to_scipy(), x, threads=2), matrix, x)


@pytest.mark.parametrize("special", [np.inf, np.nan])
@pytest.mark.parametrize("name", UNPADDED)
def test_a_special_value_touches_exactly_the_rows_that_store_its_column(name, special):
    matrix = random_csr(530, 400, density=0.02, dense_row=3, empty_every=5)
    for column in (0, 399):
        x = np.random.default_rng(0).standard_normal(400)
        x[column] = special
        rows = np.unique(matrix.rows()[matrix.indices == column])
        assert_array_equal(np.flatnonzero(~np.isfinite(product(name, matrix.to_scipy(), x))), rows)


def test_bsr_multiplies_its_fill_and_says_so_by_choosing_the_block():
    dense = np.kron(np.eye(40), np.ones((3, 3)))
    operator = build("bsr", csr_array(dense))
    assert operator.nbytes == 40 * (9 * 8 + 4) + 41 * 4
    assert_array_equal(operator.matvec(np.ones(120)), np.full(120, 3.0))


def test_bsr_takes_shapes_that_its_blocks_do_not_divide():
    dense = np.kron(np.eye(40), np.ones((4, 4)))[:158, :159]
    matrix = CSR.from_scipy(csr_array(dense))
    x = np.random.default_rng(0).standard_normal(159)
    assert_close_to_reference(product("bsr", csr_array(dense), x), matrix, x)


def test_merge_path_by_hand():
    # Row ends 2, 2, 5 against nonzeros 0..4; the path consumes nonzero 0, 1, row 0, row 1,
    # nonzero 2, 3, 4, row 2. Diagonals 0, 3, 6, 8 have met 0, 1, 2, 3 row ends.
    row_at = np.empty(4, np.int64)
    split_path(np.array([0, 2, 2, 5]), 3, row_at)
    assert row_at.tolist() == [0, 1, 2, 3]


def test_merge_path_meets_every_row_end_and_nonzero_once():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ptr = np.concatenate([[0], np.cumsum(rng.integers(0, 6, 37))])
        path = []
        row = nonzero = 0
        while row < 37 or nonzero < ptr[-1]:
            path.append(row)
            if row < 37 and ptr[row + 1] <= nonzero:
                row += 1
            else:
                nonzero += 1
        path.append(row)
        row_at = np.empty(len(path), np.int64)
        split_path(ptr, 1, row_at)
        assert row_at.tolist() == path


def test_sell_slices_by_hand():
    # Lengths 1, 3, 0, 2 in windows of 4: rows 1, 3, 0, 2. Slices of 2 rows: 3 + 1 steps.
    a = csr_array(
        (np.arange(1.0, 7.0), np.array([2, 0, 1, 2, 0, 1]), np.array([0, 1, 4, 4, 6])), shape=(4, 3)
    )
    order = np.empty(4, np.int32)
    sort_windows(a.indptr, 4, order)
    assert order.tolist() == [1, 3, 0, 2]
    col, val = np.zeros(8, np.uint32), np.zeros(8)
    fill_slices(a.indptr, a.indices, a.data, order, np.array([0, 6]), 2, 2, col, val)
    assert val.tolist() == [2, 5, 3, 6, 4, 0, 1, 0]
    assert col.tolist() == [0, 0, 1, 1, 2, 0, 2, 0]


def test_ell_stores_the_longest_row_for_every_row():
    layout, _ = ell(random_csr(40, 30, density=0.2, dense_row=0).to_scipy())
    assert layout.arrays["val"].shape == (40 * 30,)


def cost_of(lengths, cut, lanes):
    groups = np.split(lengths, cut)
    if max(len(group) for group in groups) > lanes:
        return np.inf
    return sum(lanes * group.max() + ALPHA for group in groups)


@pytest.mark.parametrize("seed", range(8))
def test_dp_cut_costs_what_the_best_of_all_cuts_costs(seed):
    rng = np.random.default_rng(seed)
    rows, lanes = 9, int(rng.integers(1, 5))
    lengths = np.sort(rng.integers(0, 20, rows))
    cuts = itertools.chain.from_iterable(
        itertools.combinations(range(1, rows), count) for count in range(rows)
    )
    least = min(cost_of(lengths, cut, lanes) for cut in cuts)
    ends = np.empty(rows, np.int64)
    scratch = np.empty((2, rows + 1), np.int64)
    groups = cut_groups(lengths, np.arange(rows), lanes, ALPHA, scratch[0], scratch[1], ends)
    assert cost_of(lengths, ends[: groups - 1], lanes) == least


def test_dp2d_groups_cover_every_slot_with_at_most_a_warp():
    layout = GroupedLayout.from_csr(skewed().to_scipy())
    sizes = np.diff(layout.group_slot)
    assert layout.group_slot[-1] == len(layout.output_hash)
    assert sizes.min() >= 1
    assert sizes.max() == 32
    assert layout.begin_ptr[-1] == layout.nnz
    assert layout.block_group[-1] == len(sizes)


@pytest.mark.parametrize("name", OURS)
def test_our_kernels_refuse_types_that_they_lack(name):
    with pytest.raises(InputError, match=f"format '{name}': expected values of float32, float64"):
        BASELINES[name].build(csr_array(np.eye(3, dtype=np.complex128)), 1)


def test_scipy_multiplies_complex_values():
    a = csr_array(np.array([[1j, 0], [2, 3]]))
    assert BASELINES["csr-scipy"].build(a, 1).matvec(np.array([1, 1j])).tolist() == [1j, 2 + 3j]


def test_reorder_times_judges_every_method():
    # One block of two groups of lanes 2: lengths 4, 0, 4, 0. Unordered, each group has
    # deviation 2 and maximum 4; sorted, both deviations are 0 and the maxima 0 and 4.
    a = csr_from_lengths([4, 0, 4, 0], 5, np.random.default_rng(0)).to_scipy()
    found = reorder_times(a, lanes=2, repeats=1)
    assert tuple(found) == METHODS
    for name in ("lut", "sort", "quick", "DP2D"):
        assert found[name].std_fall_percent == 100
        assert found[name].lane_efficiency == 1
    assert found["none"].std_fall_percent == 0
    assert found["none"].lane_efficiency == 0.5
    assert all(0 < row.best_ms <= row.median_ms for row in found.values())


@pytest.mark.parametrize("name", AWKWARD)
def test_reorder_times_takes_every_awkward_matrix(name):
    found = reorder_times(AWKWARD[name].to_scipy(), repeats=1)
    assert found["lut"].lane_efficiency >= found["none"].lane_efficiency - 1e-12
    assert found["sort"].lane_efficiency == found["quick"].lane_efficiency
    assert found["DP2D"].lane_efficiency >= found["sort"].lane_efficiency


def test_reorder_times_needs_a_round():
    with pytest.raises(ConfigError, match="repeats: expected at least 1, got 0"):
        reorder_times(AWKWARD["banded"].to_scipy(), repeats=0)


def test_tasks_are_compiled_anew_when_any_kernel_source_changes():
    from hbp_spmv.kernels import dp2d, merge, sell, simd

    tasks = [
        dp2d.grouped_task(8),
        merge.merge_task(4, 8, 4, 4, 0),
        sell.sell_task(8, 8, 0, 0),
    ]
    for task in tasks:  # numba keys its cache by what a function closes over, too
        closure = inspect.getclosurevars(task.__wrapped__).nonlocals
        assert closure["stamp"] == simd.sources_stamp() > 0
    assert simd.sources_stamp.cache_info().misses == 1
