# SPDX-License-Identifier: Apache-2.0
"""The GPU baselines: our kernels emulated on the CPU, and all of them where a device is."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hbp_spmv import gpu_kernels, gpu_paper
from hbp_spmv.config import BuildConfig
from hbp_spmv.gpu_baselines import GPU_BASELINES
from hbp_spmv.gpu_paper import PaperProduct
from hbp_spmv.matrix import from_csr
from hbp_spmv.method import PaperLayout
from numpy.testing import assert_array_equal
from scipy.sparse import csr_array
from tenfold_core.device import cupy_or_none
from tenfold_core.errors import InputError
from tenfold_core.sparse.gpu import cuda_runtime
from tenfold_core.testing.cuda import EmulatedRuntime, compiler
from tenfold_core.testing.sparse import (
    assert_close_to_reference,
    awkward_matrices,
    csr_from_lengths,
    random_csr,
)

CSR_KERNELS = ("csr-scalar-8192", "csr-scalar", "csr-vector", "csr-adaptive", "csr-merge", "sell")
PUBLISHED = ("hbp-paper", "2d", "sort2D")  # the last two differ in the order of rows only
OURS = CSR_KERNELS + PUBLISHED
emulated = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to emulate kernels")


def x_for(matrix, seed=0):
    """Return an operand between two NaN: a product that reads beyond it is NaN."""
    guarded = np.full(matrix.shape[1] + 2, np.nan, matrix.dtype)
    guarded[1:-1] = np.random.default_rng(seed).standard_normal(matrix.shape[1])
    return guarded[1:-1]


def product(operator, matrix, x):
    guarded = np.full(matrix.shape[0] + 2, np.nan, matrix.dtype)
    guarded[[0, -1]] = 7
    operator.launch(x, guarded[1:-1])
    assert (guarded[[0, -1]] == 7).all()
    return guarded[1:-1]


def skewed(dtype="float64"):
    """Rows of 0 to 30 nonzeros, others of 1500 (a block), and two of 9000 (three pieces each)."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 31, 1400)
    lengths[300:700] = 0
    lengths[[20, 21, 900]] = 1500, 1500, 2500
    lengths[[5, 1399]] = 9000
    return csr_from_lengths(lengths, 9000, rng, dtype=dtype)


# Our kernels, emulated


@emulated
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float64") for name in OURS), *((name, "float32") for name in OURS[:-2])],
)
def test_our_kernels_keep_the_bound_on_awkward_matrices(name, dtype):
    runtime = EmulatedRuntime()
    for matrix in awkward_matrices(dtype).values():
        operator = GPU_BASELINES[name].build(matrix.to_scipy(), runtime)
        x = x_for(matrix)
        assert_close_to_reference(product(operator, matrix, x), matrix, x)


@emulated
@pytest.mark.parametrize("name", OURS)
def test_our_kernels_keep_the_bound_on_long_rows_and_strips_every_time(name):
    matrix = skewed()
    operator = GPU_BASELINES[name].build(matrix.to_scipy(), EmulatedRuntime())
    x, other = x_for(matrix), x_for(matrix, seed=1)
    first = product(operator, matrix, x)
    assert_close_to_reference(first, matrix, x)
    # With another x: what a product leaves behind, a ticket or partial sums, must not matter.
    assert_close_to_reference(product(operator, matrix, other), matrix, other)
    assert_array_equal(product(operator, matrix, x), first)


@emulated
@pytest.mark.parametrize("special", [np.inf, np.nan])
@pytest.mark.parametrize("name", OURS)
def test_a_special_value_touches_exactly_the_rows_that_store_its_column(name, special):
    matrix = random_csr(530, 400, density=0.02, dense_row=3, empty_every=5)
    operator = GPU_BASELINES[name].build(matrix.to_scipy(), EmulatedRuntime())
    for column in (0, 399):
        x = x_for(matrix)
        x[column] = special
        rows = np.unique(matrix.rows()[matrix.indices == column])
        assert_array_equal(np.flatnonzero(~np.isfinite(product(operator, matrix, x))), rows)


@emulated
@pytest.mark.parametrize(("mean", "lanes"), [(1, 2), (4, 4), (7, 8), (16, 16), (17, 32), (99, 32)])
def test_the_threads_of_a_row_follow_the_mean_length(mean, lanes):
    matrix = csr_from_lengths([mean] * 70, 120, np.random.default_rng(0))
    runtime, x = EmulatedRuntime(), x_for(matrix)
    operator = GPU_BASELINES["csr-vector"].build(matrix.to_scipy(), runtime)
    assert_close_to_reference(product(operator, matrix, x), matrix, x)
    assert runtime.launches == [f"csr_vector_{lanes}"]


@emulated
def test_bytes_are_counted_and_nothing_is_launched_twice():
    matrix, runtime = random_csr(513, 300, empty_every=4), EmulatedRuntime()
    csr = (514 + matrix.nnz) * 4 + matrix.nnz * 8
    for name in OURS:
        operator = GPU_BASELINES[name].build(matrix.to_scipy(), runtime)
        assert operator.name == name
        assert operator.nbytes >= csr - 514 * 4
        assert operator.notes
    assert runtime.launches == []
    sizes = {name: GPU_BASELINES[name].build(matrix.to_scipy(), runtime).nbytes for name in OURS}
    assert sizes["csr-scalar"] == sizes["csr-vector"] == csr


def test_row_bins_by_hand(monkeypatch):
    # With bins of up to 4 nonzeros, 8 staged, pieces of 8, blocks of 4 rows; lengths and starts:
    # 1@0 2@1 | 3@3, which begins in the first 4 | 0@6 0@6 | 5@6 alone | 9@11 in 2 pieces | 1@20
    for name, value in (("SHORT", 4), ("STAGED", 8), ("PIECE", 8), ("THREADS", 4)):
        monkeypatch.setattr(gpu_kernels, name, value)
    ptr = np.cumsum([0, 1, 2, 3, 0, 0, 5, 9, 1])
    bins, split_rows, split_start = gpu_kernels.row_bins(ptr)
    assert bins.tolist() == [
        [0, 3, 0, 6], [3, 1, 6, 6], [4, 1, 6, 6], [5, 1, 6, 11], [0, 0, 11, 19], [1, 0, 19, 20],
        [7, 1, 20, 21],
    ]  # fmt: skip
    assert split_rows.tolist() == [6]
    assert split_start.tolist() == [0, 2]


def test_row_bins_cover_everything_once_and_fit_in_shared_memory():
    for matrix in (*awkward_matrices().values(), skewed()):
        bins, split_rows, split_start = gpu_kernels.row_bins(matrix.indptr)
        target, rows, begin, end = bins.astype(np.int64).T
        pieces = rows == 0
        assert_array_equal(begin[1:], end[:-1])
        assert (end - begin).sum() == matrix.nnz
        owned = [np.arange(t, t + n) for t, n in zip(target[~pieces], rows[~pieces], strict=True)]
        owned = np.concatenate([*owned, split_rows, np.empty(0, int)])
        assert_array_equal(np.sort(owned), np.arange(matrix.shape[0]))
        assert (end - begin)[rows > 1].max(initial=0) <= gpu_kernels.STAGED
        assert (end - begin).max(initial=0) <= gpu_kernels.PIECE
        assert_array_equal(target[pieces], np.arange(split_start[-1]))


def test_merge_rows_by_hand(monkeypatch):
    # Row ends 2, 2, 5: the path is nonzero 0, 1, row 0, row 1, nonzero 2, 3, 4, row 2.
    monkeypatch.setattr(gpu_kernels, "TILE", 3)
    assert gpu_kernels.merge_rows(np.array([0, 2, 2, 5])).tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(gpu_kernels, "TILE", 1)
    assert gpu_kernels.merge_rows(np.array([0, 2, 2, 5])).tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3]


def test_slices_by_hand(monkeypatch):
    # Lengths 1, 3, 0, 2 longest first: rows 1, 3, 0, 2. Slices of 2 rows: 3 + 1 steps.
    monkeypatch.setattr(gpu_kernels, "SLICE", 2)
    indices, ptr = np.array([2, 0, 1, 2, 0, 1]), np.array([0, 1, 4, 4, 6])
    a = csr_array((np.arange(1.0, 7.0), indices, ptr), shape=(4, 3))
    order = gpu_kernels.window_order(a.indptr, 4)
    start, col, val = gpu_kernels.sliced_rows("sell", a, order)
    assert order.tolist() == [1, 3, 0, 2]
    assert start.tolist() == [0, 6, 8]
    assert val.tolist() == [2, 5, 3, 6, 4, 0, 1, 0]
    assert col.tolist() == [0, 0, 1, 1, 2, -1, 2, -1]


def test_slices_of_mostly_padding_are_refused():
    matrix = random_csr(32, 200_000, density=0.0, dense_row=7).to_scipy()
    with pytest.raises(InputError, match="'sell': slices of 32 rows would store 6400000 elements"):
        GPU_BASELINES["sell"].build(matrix, EmulatedRuntime())


@pytest.mark.parametrize("name", GPU_BASELINES)
def test_types_that_are_lacking_are_refused(name):
    with pytest.raises(InputError, match=f"'{name}': expected values of float32, float64, got co"):
        GPU_BASELINES[name].build(csr_array(np.eye(3, dtype=np.complex128)), EmulatedRuntime())


def test_indices_beyond_32_bits_are_refused():
    wide = csr_array((3, 1 << 31))
    with pytest.raises(InputError, match="with 0 nonzeros, expected below 2\\*\\*31 of each"):
        GPU_BASELINES["csr-scalar"].build(wide, EmulatedRuntime())


# The published layout


def paper(matrix, **settings):
    config = BuildConfig(layout="paper", hash="paper", **settings)
    return PaperLayout.from_csr(matrix.to_scipy(), config)


@emulated
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (-2.5, 0.0), (0.5, 3.0)])
def test_the_published_product_has_the_bits_of_its_cpu_twin(alpha, beta, dtype):
    matrix = skewed(dtype)  # three strips, one of them short, and block rows without nonzeros
    x, old = x_for(matrix), np.random.default_rng(2).standard_normal(1400).astype(dtype)
    twin, y = old.copy(), old.copy()
    from_csr(matrix.to_scipy(), layout="paper", hash="paper").matvec(
        x, out=twin, alpha=alpha, beta=beta
    )
    PaperProduct(paper(matrix), EmulatedRuntime())(x, y, alpha, beta)
    assert_array_equal(y, twin)


@emulated
@pytest.mark.parametrize(("height", "width"), [(50, 100), (64, 5000)])
def test_allocation_and_place_of_x_change_no_bit(height, width):
    matrix = skewed()
    layout, x = paper(matrix, width=width, height=height), x_for(matrix)
    results = []
    for fixed_share in (1.0, 0.8, 0.0):
        call = PaperProduct(layout, EmulatedRuntime(), fixed_share=fixed_share)
        for operand in (x, -x, x):
            y = np.full(1400, np.nan)
            call(operand, y)
        results.append(y)
    assert_close_to_reference(results[0], matrix, x)
    assert all((y == results[0]).all() for y in results)


@emulated
def test_strips_are_added_in_order_and_old_nan_does_not_matter():
    # In order: (1 + 1e16) - 1e16 = 0 in float64, while 1 + (1e16 - 1e16) would be 1.
    a = csr_array(np.array([[1.0, 0, 1e16, 0, -1e16, 0]]))
    layout = PaperLayout.from_csr(a, BuildConfig(layout="paper", hash="paper", width=2))
    y = np.full(1, np.nan)
    PaperProduct(layout, EmulatedRuntime())(np.ones(6), y)
    assert y.tolist() == [0.0]


@emulated
def test_every_block_with_nonzeros_is_one_task_of_one_run_or_the_ticket():
    matrix = skewed()
    layout = paper(matrix, width=100, height=64)
    tasks, runs = gpu_paper._allocate(layout, 0.8)
    filled = np.unique(
        matrix.indices // 100 * 22 + matrix.rows() // 64  # 22 block rows, strip by strip
    )
    assert_array_equal(tasks, filled)
    assert len(runs) == gpu_paper.WARPS + 1
    assert runs[0] == 0
    assert (np.diff(runs.astype(int)) >= 0).all()
    assert 0.7 * len(tasks) < runs[-1] < len(tasks)


@emulated
def test_the_ticket_is_zero_after_every_product():
    matrix = skewed()
    call = PaperProduct(paper(matrix, width=100, height=64), EmulatedRuntime(), fixed_share=0.5)
    y = np.empty(1400)
    for seed in range(5):
        x = x_for(matrix, seed)
        call(x, y)
        assert_close_to_reference(y, matrix, x)
        assert call._ticket[0] == 0


def test_groups_that_are_no_warps_are_refused():
    with pytest.raises(InputError, match="groups of 16 rows, expected 32, a warp"):
        PaperProduct(paper(skewed(), lanes=16), EmulatedRuntime())


# Libraries


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_torch_multiplies_the_arrays_that_it_is_given(index):
    pytest.importorskip("torch")
    name = "csr-torch" if index is np.int32 else "csr-torch-int64"
    for matrix in awkward_matrices().values():
        operator = GPU_BASELINES[name].build(matrix.to_scipy(), EmulatedRuntime())
        x = x_for(matrix)
        assert_close_to_reference(product(operator, matrix, x), matrix, x)
    matrix = random_csr(513, 300, empty_every=4)
    operator = GPU_BASELINES[name].build(matrix.to_scipy(), EmulatedRuntime())  # shares NumPy's
    for seed in range(12):
        x = x_for(matrix, seed)
        assert_close_to_reference(product(operator, matrix, x), matrix, x)
        assert_close_to_reference(operator.matvec(x).numpy(), matrix, x)
    size = np.dtype(index).itemsize
    assert operator.nbytes == (514 + matrix.nnz) * size + matrix.nnz * 8


@pytest.mark.skipif(cupy_or_none() is not None, reason="a CUDA device is here")
@pytest.mark.parametrize("name", GPU_BASELINES)
def test_probes_say_why_nothing_runs_without_a_device(name):
    assert GPU_BASELINES[name].probe().startswith("no CUDA device through CuPy: ")


# On a device


@pytest.mark.gpu
@pytest.mark.skipif(cupy_or_none() is None, reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", GPU_BASELINES)
def test_every_baseline_keeps_the_bound_on_the_device(name, dtype):
    if reason := GPU_BASELINES[name].probe():
        pytest.skip(reason)
    runtime = cuda_runtime()
    cupy = runtime.xp
    for matrix in (*awkward_matrices(dtype).values(), skewed(dtype)):
        operator = GPU_BASELINES[name].build(matrix.to_scipy(), runtime)
        x = x_for(matrix)
        results = []
        for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream.null, cupy.cuda.Stream()):
            with stream:
                y = cupy.full(matrix.shape[0], cupy.nan, dtype)
                operator.launch(cupy.asarray(x), y)
                results.append(y.get())
            stream.synchronize()
        for y in results:
            assert_close_to_reference(y, matrix, x)
        if name in OURS:
            assert all((y == results[0]).all() for y in results)


# Reads and writes outside of arrays


UNDER_SANITIZER = """
import numpy as np
from hbp_spmv.gpu_baselines import GPU_BASELINES
from tenfold_core.testing.cuda import EmulatedRuntime
from tenfold_core.testing.sparse import csr_from_lengths
rng = np.random.default_rng(0)
lengths = rng.integers(0, 12, 700)
lengths[[3, 9, 699]] = 5000, 1500, 5000
a = csr_from_lengths(lengths, 5000, rng).to_scipy()
x = rng.standard_normal(5000)
for name in {names}:
    y = np.empty(700)
    GPU_BASELINES[name].build(a, EmulatedRuntime()).launch(x[:{columns}].copy(), y)
    assert {columns} < 5000 or np.allclose(y, a @ x), name
"""


def run_under_sanitizer(names, columns):
    command = [compiler(), "-print-file-name=libasan.so"]
    library = Path(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    if not library.is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0",
        "TENFOLD_EMULATOR_FLAGS": "-fsanitize=address --param=asan-stack=0",
        "PYTHONMALLOC": "malloc",
    }
    code = UNDER_SANITIZER.format(names=names, columns=columns)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


@emulated
@pytest.mark.slow
def test_a_memory_checker_finds_nothing():
    done = run_under_sanitizer(OURS[:-2], 5000)
    assert done.returncode == 0, done.stderr[-2000:]


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("name", ["csr-merge", "hbp-paper"])
def test_the_memory_checker_would_find_a_read_past_the_end(name):
    # The test above means something only if this one passes.
    done = run_under_sanitizer([name], 4999)
    assert "heap-buffer-overflow" in done.stderr


# Machine code


def machine_code(source, macros, architecture, folder):
    """Return name, registers and spills of each kernel of a source file."""
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    command = ["nvcc", f"-arch={architecture}", "-std=c++17", *defines, "-Xptxas", "-v", "-cubin"]
    built = subprocess.run(
        [*command, "-o", folder / "a.cubin", source], capture_output=True, text=True, check=True
    ).stderr
    found = re.findall(r"function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) reg", built, re.S)
    return [(name, int(registers), int(spilt)) for name, spilt, registers in found]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler to look at machine code")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_machine_code_uses_few_registers_and_spills_none(dtype, architecture, tmp_path):
    cases = [(gpu_kernels.SOURCE, gpu_kernels.NAMES, gpu_kernels.macros(np.dtype(dtype)))]
    for pointer, width in (("int32", 4096), ("int32", 5000), ("int64", 4096)):
        settings = gpu_paper.macros(np.dtype(dtype), np.dtype(pointer), width)
        cases.append((gpu_paper.SOURCE, gpu_paper.NAMES, settings))
    for source, names, macros in cases:
        found = machine_code(source, macros, architecture, tmp_path)
        assert sorted(name for name, _, _ in found) == sorted(names)
        assert max(registers for _, registers, _ in found) <= 48
        assert all(spilt == 0 for _, _, spilt in found)
