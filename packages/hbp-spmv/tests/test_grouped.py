# SPDX-License-Identifier: Apache-2.0
"""Building grouped rows on a device, its kernels emulated on the CPU."""

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hbp_spmv import grouped
from hbp_spmv.compact import CompactLayout
from hbp_spmv.config import BuildConfig
from hbp_spmv.grouped import DeviceCSR, build_grouped, choose_pack
from tenfold_core.errors import ConfigError
from tenfold_core.sparse.gpu import GroupedProduct, reference_grouped_product
from tenfold_core.testing.cuda import EmulatedRuntime, compiler
from tenfold_core.testing.sparse import csr_from_lengths

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to emulate kernels")


def matrix(rows=1500, columns=900, seed=0, mean=6):
    rng = np.random.default_rng(seed)
    lengths = rng.poisson(mean, rows)
    lengths[::7] = 0
    lengths[[3, 700]] = 600, 890
    return csr_from_lengths(lengths, columns, rng).to_scipy()


def wide_matrix(rows=3000, columns=400_000, spread=3000, far=()):
    """Columns near each other in a row; rows in `far` reach across all of them."""
    rng = np.random.default_rng(5)
    row = np.repeat(np.arange(rows), 8)
    steps = np.sort(rng.integers(0, spread, len(row)).reshape(rows, 8), axis=1).ravel()
    col = row * (columns - spread) // rows + steps
    for place in far:
        row = np.append(row, np.full(700, place))
        col = np.append(col, rng.integers(0, columns, 700))
    a = sp.csr_array((rng.standard_normal(len(row)), (row, col)), shape=(rows, columns))
    a.sum_duplicates()
    return a


def built(a, *, pack=None, **settings):
    runtime = EmulatedRuntime()
    source = DeviceCSR.from_host(a, np)
    config = BuildConfig(layout="compact", **settings)
    return build_grouped(source, config, runtime, pack=pack), runtime


def check(a, found, runtime):
    """The arrays hold the matrix, and the definition and the kernels multiply it."""
    found.rows.check()
    row, col, val = found.triplets()
    again = sp.csr_array((val, (row, col)), shape=a.shape)
    again.sort_indices()
    np.testing.assert_array_equal(again.indptr, a.indptr)
    np.testing.assert_array_equal(again.indices, a.indices)
    np.testing.assert_array_equal(again.data, a.data)
    x = np.random.default_rng(1).standard_normal(a.shape[1]).astype(a.dtype)
    scale = np.abs(a) @ np.abs(x) * np.finfo(a.dtype).eps * 8 + 1e-300
    y = np.full(a.shape[0], np.nan, a.dtype)
    GroupedProduct(found.rows, runtime)(x, y)
    exact = a.astype(np.float64) @ x.astype(np.float64)
    assert np.all(np.abs(y - exact) <= scale)
    assert np.all(np.abs(reference_grouped_product(found.rows, x) - exact) <= scale)


@pytest.mark.parametrize("method", ["lut", "sort", "none", "paper", "tuned"])
def test_groups_are_those_of_the_cpu(method):
    a = matrix(mean=25)  # above eight a class of lengths is not one length
    found, runtime = built(a, hash=method, sigma=512, pack=1)
    config = BuildConfig(layout="compact", hash=method, sigma=512, lanes=32)
    expected = CompactLayout.from_csr(a, config)
    np.testing.assert_array_equal(found.rows.lengths, expected.lengths)
    light = expected.targets < a.shape[0]
    np.testing.assert_array_equal(found.rows.targets[light], expected.targets[light])
    np.testing.assert_array_equal(found.rows.empty_rows, expected.empty_rows)
    grouped = int(expected.start[-1])
    np.testing.assert_array_equal(found.rows.col[:grouped], expected.col[:grouped])
    np.testing.assert_array_equal(found.rows.val[:grouped], expected.val[:grouped])
    assert found.quality() == expected.quality()
    check(a, found, runtime)


@pytest.mark.parametrize("pack", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"strips": 200}], ids=["whole", "strips"])
def test_packs_and_strips(pack, settings):
    a = matrix()
    found, runtime = built(a, pack=pack, **settings)
    assert found.rows.pack == pack
    check(a, found, runtime)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float32_and_equal_values(dtype):
    a = matrix().astype(dtype)
    check(a, *built(a))
    a.data[:] = 2.5
    found, runtime = built(a)
    assert found.rows.uniform
    check(a, found, runtime)


def test_sixteen_bit_offsets_where_groups_are_narrow():
    a = wide_matrix()
    found, runtime = built(a, sigma=256)
    assert found.rows.col.dtype == np.uint16
    assert found.rows.group_base.max() > 1 << 16
    check(a, found, runtime)
    found, runtime = built(a, index="u32")
    assert found.rows.col.dtype == np.uint32
    check(a, found, runtime)


def test_long_rows_are_cut_where_sixteen_bits_end():
    a = wide_matrix(far=(7, 200))
    found, runtime = built(a, sigma=256)
    assert found.heavy_rows == 2
    assert found.rows.col.dtype == np.uint16
    assert found.rows.segment_base.max() > 1 << 16
    check(a, found, runtime)


def test_scattered_columns_take_32_bits():
    rng = np.random.default_rng(0)
    a = csr_from_lengths(np.full(200, 5), 200_000, rng).to_scipy()
    found, runtime = built(a)
    assert found.rows.col.dtype == np.uint32
    check(a, found, runtime)
    with pytest.raises(ConfigError, match="index='u16': a group spans"):
        built(a, index="u16")
    found, runtime = built(a, index="u16", strips=50_000)
    assert (found.rows.col.dtype, found.rows.group_base.max()) == (np.uint16, 150_000)
    check(a, found, runtime)
    with pytest.raises(ConfigError, match="strips of 70000 columns"):
        built(a, index="u16", strips=70_000)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 511, 512, 513])
def test_sizes_around_groups_and_windows(rows):
    rng = np.random.default_rng(rows)
    a = csr_from_lengths(rng.integers(0, 9, rows), 60, rng).to_scipy()
    check(a, *built(a, sigma=512, pack=1))


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0), (40, 3)])
def test_matrices_without_elements(shape):
    a = sp.csr_array(shape)
    found, runtime = built(a)
    y = np.full(shape[0], np.nan)
    GroupedProduct(found.rows, runtime)(np.ones(shape[1]), y)
    np.testing.assert_array_equal(y, np.zeros(shape[0]))


@pytest.mark.parametrize("settings", [{}, {"strips": 200}])
def test_values_are_replaced_through_the_permutation(settings):
    a = matrix()
    found, runtime = built(a, keep_perm=True, pack=2, **settings)
    b = a.copy()
    b.data = np.random.default_rng(9).standard_normal(a.nnz)
    check(b, found.with_values(b.data, np), runtime)


def test_a_window_that_shared_memory_cannot_sort_is_refused():
    with pytest.raises(ConfigError, match="sigma is 16384, expected at most 8192"):
        built(matrix(), sigma=16384)


def test_packs_are_taken_where_padding_is_small():
    assert choose_pack(np.full(320, 64), 4) == 4
    assert choose_pack(np.full(320, 64), 8) == 2  # 16 bytes of values
    assert choose_pack(np.full(320, 3), 4) == 1


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_every_array_function_exists_in_cupy():
    """The builder runs on NumPy here and on CuPy on a device, which lacks some functions."""
    import cupy

    tree = ast.parse(Path(grouped.__file__).read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id == "xp")
            or (isinstance(node.value, ast.Attribute) and node.value.attr == "xp")
        )
    }
    assert {"cumsum", "argsort", "searchsorted"} <= used
    assert [name for name in used if not hasattr(cupy, name)] == []
