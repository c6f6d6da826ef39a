# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels themselves, emulated on the CPU, against the definition of the layout."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from tenfold_core.errors import InputError
from tenfold_core.sparse import CSR
from tenfold_core.sparse.gpu import GroupedProduct, reference_grouped_product
from tenfold_core.sparse.gpu.product import SOURCE
from tenfold_core.testing.cuda import EmulatedRuntime, compiler
from tenfold_core.testing.grouped import literal_grouped_rows
from tenfold_core.testing.sparse import csr_from_lengths

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to emulate kernels")

U = {"float32": 2.0**-24, "float64": 2.0**-53}


def matrix(dtype="float64", rows=150, columns=700, seed=0, uniform=False):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, rows)
    lengths[[3, 77]] = 400, 130  # longer than a group takes
    lengths[10:20] = 0
    a = csr_from_lengths(lengths, columns, rng)
    values = np.full(len(a.data), 0.75) if uniform else a.data
    return CSR(a.shape, a.indptr, a.indices, values.astype(dtype))


def check(a, x, y, alpha=1.0, beta=0.0, old=0.0):
    """Compare with exact sums within the componentwise bound."""
    dense = a.to_scipy().toarray().astype(np.longdouble)
    exact = alpha * (dense @ x.astype(np.longdouble)) + beta * old
    size = np.abs(alpha) * (np.abs(dense) @ np.abs(x)) + np.abs(beta * old)
    terms = np.diff(a.indptr) + 4
    assert np.all(np.abs(y - exact) <= terms * U[a.data.dtype.name] * size)


def multiply(layout, runtime, x, *, columns=1, **factors):
    y = np.full((layout.shape[0], columns) if columns > 1 else layout.shape[0], np.nan, x.dtype)
    if "old" in factors:
        y[...] = factors.pop("old")
    flat = np.ascontiguousarray(x).reshape(-1)
    GroupedProduct(layout, runtime)(flat, y.reshape(-1), columns=columns, **factors)
    return y


VARIANTS = [  # dtype, pack, narrow, uniform
    ("float64", 1, True, False), ("float64", 2, True, False), ("float64", 4, False, False),
    ("float32", 1, False, True), ("float32", 2, False, False), ("float32", 4, True, False),
    ("float64", 2, True, True),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "pack", "narrow", "uniform"), VARIANTS)
def test_grouped_products_equal_the_definition(dtype, pack, narrow, uniform):
    a = matrix(dtype, uniform=uniform)
    layout = literal_grouped_rows(a, pack=pack, narrow=narrow, uniform=uniform)
    x = np.random.default_rng(1).standard_normal(a.shape[1]).astype(dtype)
    runtime = EmulatedRuntime()
    y = multiply(layout, runtime, x)
    check(a, x, y)
    np.testing.assert_allclose(y, reference_grouped_product(layout, x), atol=16000 * U[dtype])
    assert runtime.launches == ["grouped_product", "combine_parts"]


def test_rows_of_a_group_are_chains_of_fused_multiply_adds_in_their_order():
    a = matrix()
    x = np.random.default_rng(1).standard_normal(a.shape[1])
    y = multiply(literal_grouped_rows(a), EmulatedRuntime(), x)
    for row in np.flatnonzero(np.diff(a.indptr) <= 12):
        total = 0.0
        for p in range(a.indptr[row], a.indptr[row + 1]):
            exact = Fraction(a.data[p]) * Fraction(x[a.indices[p]]) + Fraction(total)
            total = float(exact)
        assert y[row] == total


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (-2.5, 0.0), (0.5, 1.0), (1.0, -3.0)])
def test_alpha_and_beta(alpha, beta):
    a = matrix()
    x, old = (
        np.random.default_rng(seed).standard_normal(size) for seed, size in [(1, 700), (2, 150)]
    )
    layout = literal_grouped_rows(a)
    y = multiply(layout, EmulatedRuntime(), x, alpha=alpha, beta=beta, old=old)
    check(a, x, y, alpha, beta, old)


@pytest.mark.parametrize("columns", [2, 3, 7, 8, 13])
def test_several_columns_have_the_bits_of_each_alone(columns):
    a = matrix()
    layout, runtime = literal_grouped_rows(a, pack=2), EmulatedRuntime()
    x = np.random.default_rng(1).standard_normal((a.shape[1], columns))
    y = multiply(layout, runtime, x, columns=columns)
    for j in range(columns):
        alone = multiply(layout, runtime, np.ascontiguousarray(x[:, j]))
        np.testing.assert_array_equal(y[:, j], alone)


@pytest.mark.parametrize("local_x", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_strips(dtype, local_x):
    a = matrix(dtype, rows=1500, columns=900)
    layout = literal_grouped_rows(a, strip_width=200, pack=2)
    x = np.random.default_rng(1).standard_normal(a.shape[1]).astype(dtype)
    runtime = EmulatedRuntime()
    product = GroupedProduct(layout, runtime, local_x=local_x)
    results = []
    for _ in range(4):  # the ticket starts at 0 every time
        y = np.full(a.shape[0], np.nan, dtype)
        product(x, y)
        results.append(y)
        check(a, x, y)
    assert all((y == results[0]).all() for y in results)
    assert runtime.launches[:3] == ["strip_product", "grouped_product", "combine_parts"]
    several = multiply(layout, runtime, np.stack([x, -x], axis=1), columns=2)
    np.testing.assert_array_equal(several, np.stack([results[0], -results[0]], axis=1))


@pytest.mark.parametrize("fixed_share", [0.0, 0.5, 1.0])
def test_strip_results_do_not_depend_on_the_allocation(fixed_share):
    a = matrix(rows=3000, columns=900)
    layout, runtime = literal_grouped_rows(a, strip_width=300), EmulatedRuntime()
    x = np.random.default_rng(1).standard_normal(a.shape[1])
    y = np.full(a.shape[0], np.nan)
    product = GroupedProduct(layout, runtime, fixed_share=fixed_share)
    product(x, y)
    np.testing.assert_array_equal(y, multiply(layout, runtime, x))
    owned = int(product._strips.runs[-1])
    assert {0.0: owned == 0, 1.0: owned == product._strips.units}.get(fixed_share, True)


@pytest.mark.parametrize("processors", [1, 2, 5, 64])
def test_strip_results_do_not_depend_on_the_number_of_blocks(processors):
    a = matrix(rows=3000, columns=900)
    layout = literal_grouped_rows(a, strip_width=300)
    x = np.random.default_rng(1).standard_normal(a.shape[1])
    y = multiply(layout, EmulatedRuntime(processors=processors), x)
    np.testing.assert_array_equal(y, multiply(layout, EmulatedRuntime(), x))
    check(a, x, y)


def test_a_strip_that_shared_memory_cannot_hold_is_read_from_memory():
    a = matrix()
    layout = literal_grouped_rows(a, strip_width=350)
    x = np.random.default_rng(1).standard_normal(a.shape[1])
    check(a, x, multiply(layout, EmulatedRuntime(shared_bytes=350 * 8 - 1), x))


def test_streams_have_their_own_partial_sums():
    a = matrix()
    layout, runtime = literal_grouped_rows(a, strip_width=100), EmulatedRuntime()
    product = GroupedProduct(layout, runtime)
    x = np.random.default_rng(1).standard_normal(a.shape[1])
    y = np.empty(a.shape[0])
    product(x, y)
    ((partial, ticket),) = product._workspace.values()
    partial[...], ticket[...] = np.nan, 10**6  # another stream is in the middle of a product
    runtime.current_stream = 1
    product(x, y)
    check(a, x, y)
    assert len(product._workspace) == 2


def test_a_product_without_split_rows_is_one_launch_and_no_memory():
    rng = np.random.default_rng(0)
    a = csr_from_lengths(rng.integers(0, 5, 70), 90, rng)
    runtime = EmulatedRuntime()
    product = GroupedProduct(literal_grouped_rows(a), runtime)
    x, y = rng.standard_normal(90), np.empty(70)
    product(x, y)
    check(a, x, y)
    assert runtime.launches == ["grouped_product"]
    assert set(product._workspace.values()) == {(None, None)}


def test_nan_in_x_touches_exactly_the_rows_that_store_its_column():
    a = matrix()
    x = np.random.default_rng(1).standard_normal(a.shape[1])
    x[5] = np.nan
    for options in ({"pack": 4}, {"strip_width": 100}):
        y = multiply(literal_grouped_rows(a, **options), EmulatedRuntime(), x)
        rows = np.repeat(np.arange(a.shape[0]), np.diff(a.indptr))
        assert set(np.flatnonzero(np.isnan(y))) == set(rows[a.indices == 5])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 3)])
def test_matrices_without_elements(shape):
    a = csr_from_lengths(np.zeros(shape[0], int), shape[1], np.random.default_rng(0))
    y = multiply(literal_grouped_rows(a), EmulatedRuntime(), np.ones(shape[1]))
    np.testing.assert_array_equal(y, np.zeros(shape[0]))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pack": 3}, "pack is 3"),
        ({"lengths": np.zeros(7, np.uint16)}, "lengths has length 7"),
        ({"targets": np.zeros(128, np.int64)}, "targets has type int64, expected"),
        ({"strip_width": 10}, "strip_groups is missing"),
    ],
)
def test_contradictions_are_refused_before_a_launch(changes, text):
    layout = replace(literal_grouped_rows(matrix()), **changes)
    with pytest.raises(InputError, match=text):
        GroupedProduct(layout, EmulatedRuntime())


def run_under_sanitizer(code):
    """Run a script whose emulated kernels are checked for reads and writes outside of arrays."""
    command = [compiler(), "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True)
    library = Path(found.stdout.strip())
    if not library.is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0",
        "TENFOLD_EMULATOR_FLAGS": "-fsanitize=address --param=asan-stack=0",
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


UNDER_SANITIZER = """
import numpy as np
from tenfold_core.sparse.gpu import GroupedProduct
from tenfold_core.testing.cuda import EmulatedRuntime
from tenfold_core.testing.grouped import literal_grouped_rows
from tenfold_core.testing.sparse import csr_from_lengths
rng = np.random.default_rng(0)
lengths = rng.integers(0, 12, 150)
lengths[3] = 400
a = csr_from_lengths(lengths, 700, rng)
x = rng.standard_normal(700)
for options in ({"pack": 2}, {"strip_width": 200}):
    product = GroupedProduct(literal_grouped_rows(a, **options), EmulatedRuntime())
    y = np.empty(150)
    product(x, y)
    assert np.allclose(y, a.to_scipy() @ x)
"""


def test_a_memory_checker_finds_nothing():
    done = run_under_sanitizer(UNDER_SANITIZER)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_memory_checker_would_find_a_read_past_the_end():
    # The test above means something only if this one passes.
    done = run_under_sanitizer(UNDER_SANITIZER.replace("l(700)", "l(650)"))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler to look at machine code")
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "index", "pack", "columns"), [
    ("double", "u16", 1, 1), ("double", "u16", 2, 1), ("double", "unsigned", 2, 1),
    ("float", "u16", 4, 1), ("float", "unsigned", 4, 1), ("double", "u16", 2, 4),
])  # fmt: skip
def test_machine_code_uses_few_registers_and_wide_loads(dtype, index, pack, columns, tmp_path):
    macros = {"VALUE": dtype, "INDEX": index, "PACK": pack, "UNIFORM": 0, "COLUMNS": columns,
              "LOCAL_X": 1}  # fmt: skip
    command = ["nvcc", "-arch=sm_90", "-std=c++17", *(f"-D{k}={v}" for k, v in macros.items())]
    built = subprocess.run(
        [*command, "-Xptxas", "-v", "-cubin", "-o", tmp_path / "a.cubin", SOURCE],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    for kernel, text in re.findall(r"function '(\w+)'.*?\n(.*?) barriers", built, re.S):
        assert int(re.search(r"Used (\d+) registers", text)[1]) <= (40 if kernel[0] == "g" else 64)
        assert "0 bytes spill stores, 0 bytes spill loads" in text
    subprocess.run([*command, "-ptx", "-o", tmp_path / "a.ptx", SOURCE], check=True)
    ptx = (tmp_path / "a.ptx").read_text()
    widest = min(16, pack * {"double": 8, "float": 4}[dtype])
    kind = {16: "v4.u32", 8: "v2.u32"}[widest]
    assert f"ld.global.nc.L1::no_allocate.{kind}" in ptx
