# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the definition of the layout, interpreted or on a device.

A process has one of both: triton decides at its import. Without a CUDA device this module chooses
the interpreter; on a machine with one, TRITON_INTERPRET=1 chooses it.
"""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from tenfold_core.errors import InputError, MissingExtraError
from tenfold_core.sparse import CSR, gpu
from tenfold_core.sparse.gpu import GroupedProduct, reference_grouped_product
from tenfold_core.sparse.gpu.triton_product import TritonProduct, to_torch
from tenfold_core.testing.cuda import EmulatedRuntime, compiler
from tenfold_core.testing.grouped import literal_grouped_rows
from tenfold_core.testing.sparse import csr_from_lengths

torch = pytest.importorskip("torch")
with pytest.MonkeyPatch.context() as environment:
    if not torch.cuda.is_available():
        environment.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from tenfold_core.sparse.gpu import triton_kernels

INTERPRETED = triton_kernels.INTERPRETED
U = {"float32": 2.0**-24, "float64": 2.0**-53}


@pytest.fixture(autouse=True)
def same_mode_as_at_import(monkeypatch):
    """The interpreter looks again while it runs; other modules need not know of it."""
    monkeypatch.setenv("TRITON_INTERPRET", str(int(INTERPRETED)))


on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="no CUDA device, or TRITON_INTERPRET=1"),
]
on_cpu = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled: no TRITON_INTERPRET=1")


@pytest.fixture(params=[pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=on_device)])
def device(request):
    return request.param


def matrix(dtype="float64", rows=150, columns=700, seed=0, uniform=False):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, rows)
    lengths[[3, 77]] = 400, 130  # longer than a group takes
    lengths[10:20] = 0
    a = csr_from_lengths(lengths, columns, rng)
    values = np.full(len(a.data), 0.75) if uniform else a.data
    return CSR(a.shape, a.indptr, a.indices, values.astype(dtype))


def operand(a, columns=1):
    x = np.random.default_rng(1).standard_normal((a.shape[1], columns)).astype(a.data.dtype)
    return x if columns > 1 else x.reshape(-1)


def check(a, x, y, alpha=1.0, beta=0.0, old=0.0):
    """Compare with exact sums within the componentwise bound."""
    dense = a.to_scipy().toarray().astype(np.longdouble)
    exact = alpha * (dense @ x.astype(np.longdouble)) + beta * old
    size = np.abs(alpha) * (np.abs(dense) @ np.abs(x)) + np.abs(beta * old)
    terms = np.diff(a.indptr) + 4
    assert np.all(np.abs(y - exact) <= terms * U[a.data.dtype.name] * size)


def multiply(layout, device, x, *, columns=1, old=np.nan, **factors):
    shape = (layout.shape[0], columns) if columns > 1 else layout.shape[0]
    y = torch.tensor(np.full(shape, old, x.dtype), device=device)
    product = TritonProduct(to_torch(layout, device))
    product(torch.tensor(x, device=device).reshape(-1), y.reshape(-1), columns=columns, **factors)
    return y.cpu().numpy()


def multiply_by_cuda(layout, x, *, columns=1, old=np.nan, **factors):
    if compiler() is None:
        pytest.skip("no C++ compiler to emulate CUDA kernels")
    y = np.full((layout.shape[0], columns) if columns > 1 else layout.shape[0], old, x.dtype)
    product = GroupedProduct(layout, EmulatedRuntime())
    product(x.reshape(-1), y.reshape(-1), columns=columns, **factors)
    return y


VARIANTS = [  # dtype, pack, narrow, uniform
    ("float64", 1, True, False), ("float64", 2, True, False), ("float64", 4, False, False),
    ("float32", 1, False, True), ("float32", 2, False, False), ("float32", 4, True, False),
    ("float64", 2, True, True),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "pack", "narrow", "uniform"), VARIANTS)
def test_grouped_products_equal_the_definition(device, dtype, pack, narrow, uniform):
    a = matrix(dtype, uniform=uniform)
    layout = literal_grouped_rows(a, pack=pack, narrow=narrow, uniform=uniform)
    x = operand(a)
    y = multiply(layout, device, x)
    check(a, x, y)
    np.testing.assert_allclose(y, reference_grouped_product(layout, x), atol=16000 * U[dtype])


@pytest.mark.parametrize(("dtype", "pack", "narrow", "uniform"), VARIANTS)
def test_sums_have_the_bits_of_the_cuda_kernels(device, dtype, pack, narrow, uniform):
    a = matrix(dtype, uniform=uniform)
    layout = literal_grouped_rows(a, pack=pack, narrow=narrow, uniform=uniform)
    options = {"alpha": -0.7, "beta": 0.3, "old": 1.1}
    y = multiply(layout, device, operand(a), **options)
    np.testing.assert_array_equal(y, multiply_by_cuda(layout, operand(a), **options))


@pytest.mark.parametrize(("dtype", "pack", "narrow", "uniform"), VARIANTS)
def test_groups_of_full_packs_have_the_bits_of_the_cuda_kernels(
    device, dtype, pack, narrow, uniform
):
    # Each of the four groups of the first program has 32 rows of 9 to 15 elements.
    rng = np.random.default_rng(0)
    a = csr_from_lengths(rng.integers(9, 16, 4 * 32 + 1), 70, rng)
    a = CSR(a.shape, a.indptr, a.indices, a.data.astype(dtype))
    layout = literal_grouped_rows(a, pack=pack, narrow=narrow, uniform=uniform)
    x = operand(a, columns=2)
    y = multiply(layout, device, x, columns=2)
    np.testing.assert_array_equal(y, multiply_by_cuda(layout, x, columns=2))
    np.testing.assert_array_equal(y[:, 0], multiply(layout, device, x[:, 0].copy()))


@pytest.mark.parametrize("segment", [128, 16, 4])  # parts: 4, 25, 100, so 1, 4 and 32 lanes
def test_split_rows_have_the_bits_of_the_cuda_kernels(device, segment):
    a = matrix()
    a = CSR((4, 700), a.indptr[:5], a.indices[: a.indptr[4]], a.data[: a.indptr[4]])
    layout = literal_grouped_rows(a, segment=segment)
    y = multiply(layout, device, operand(a))
    check(a, operand(a), y)
    np.testing.assert_array_equal(y, multiply_by_cuda(layout, operand(a)))


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.0, 0.0), (-2.5, 0.0), (0.5, 1.0), (0.1, -1 / 3), (0.0, 1.0)]
)
def test_alpha_and_beta_keep_their_64_bits(device, alpha, beta):
    a = matrix()
    old = np.random.default_rng(2).standard_normal(150)
    y = multiply(literal_grouped_rows(a), device, operand(a), alpha=alpha, beta=beta, old=old)
    check(a, operand(a), y, alpha, beta, old)


def test_what_y_held_is_not_read_if_beta_is_zero_and_is_if_beta_is_nan(device):
    a = matrix()
    layout = literal_grouped_rows(a, strip_width=350)
    y = multiply(layout, device, operand(a), alpha=np.inf, beta=-0.0)
    np.testing.assert_array_equal(y[np.diff(a.indptr) == 0], 0)
    assert np.isinf(y[np.diff(a.indptr) > 0]).all()
    assert np.isnan(multiply(layout, device, operand(a), beta=np.nan, old=0.0)).all()


@pytest.mark.parametrize("columns", [2, 3, 11])
def test_several_columns_have_the_bits_of_each_alone(device, columns):
    a = matrix(rows=90)
    layout = literal_grouped_rows(a, pack=2)
    x = operand(a, columns)
    y = multiply(layout, device, x, columns=columns, beta=0.3, old=1.0)
    for j in range(columns):
        alone = multiply(layout, device, np.ascontiguousarray(x[:, j]), beta=0.3, old=1.0)
        np.testing.assert_array_equal(y[:, j], alone)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_strips(device, dtype):
    a = matrix(dtype, columns=900)
    layout = literal_grouped_rows(a, strip_width=450, pack=2, heavy=64)
    x = operand(a)
    y = multiply(layout, device, x)
    check(a, x, y)
    np.testing.assert_array_equal(y, multiply_by_cuda(layout, x))
    several = multiply(layout, device, np.stack([x, -x], axis=1), columns=2)
    np.testing.assert_array_equal(several, np.stack([y, -y], axis=1))


def test_nan_in_x_touches_exactly_the_rows_that_store_its_column(device):
    a = matrix()
    x = operand(a)
    x[5] = np.nan
    for options in ({"pack": 4}, {"strip_width": 350}, {"uniform": True, "pack": 2}):
        y = multiply(literal_grouped_rows(a, **options), device, x)
        rows = np.repeat(np.arange(a.shape[0]), np.diff(a.indptr))
        assert set(np.flatnonzero(np.isnan(y))) == set(rows[a.indices == 5])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 3), (200, 3)])
def test_matrices_without_elements(device, shape):
    a = csr_from_lengths(np.zeros(shape[0], int), shape[1], np.random.default_rng(0))
    y = multiply(literal_grouped_rows(a), device, np.ones(shape[1]))
    np.testing.assert_array_equal(y, np.zeros(shape[0]))


def test_partial_sums_are_allocated_once_and_only_for_split_rows(device):
    a = csr_from_lengths(np.arange(40) % 7, 90, np.random.default_rng(0))
    x = torch.tensor(operand(a), device=device)
    for options, split in (({"strip_width": 45}, True), ({}, False)):
        product = TritonProduct(to_torch(literal_grouped_rows(a, **options), device))
        y = torch.empty(40, dtype=x.dtype, device=device)
        product(x, y)
        (first,) = product._workspace.values()
        product(x, y)
        (second,) = product._workspace.values()
        assert first is second
        assert (first is not None) == split


def test_bound_products_have_their_own_memory_and_leave_y_alone_until_they_run(device):
    a = matrix()
    x = torch.tensor(operand(a), device=device)
    product = TritonProduct(to_torch(literal_grouped_rows(a), device))
    y = torch.full((150,), 2.0, dtype=x.dtype, device=device)
    run = product.bind(x, y, alpha=2.0, beta=1.0)
    assert (y == 2).all()
    assert product._workspace == {}
    x += 1  # read when it runs
    run()
    check(a, operand(a) + 1, y.cpu().numpy(), 2.0, 1.0, 2.0)


def test_torchs_unsigned_types_are_taken_as_well(device):
    a = matrix()
    layout = literal_grouped_rows(a)
    moved = layout.moved(lambda array: torch.tensor(array, device=device))
    x = torch.tensor(operand(a), device=device)
    y = torch.empty(150, dtype=x.dtype, device=device)
    TritonProduct(moved)(x, y)
    np.testing.assert_array_equal(y.cpu().numpy(), multiply(layout, device, operand(a)))


def test_contradictions_are_refused_before_a_launch(monkeypatch):
    layout = to_torch(literal_grouped_rows(matrix()), "cpu")
    with pytest.raises(InputError, match=r"targets has type torch.int64, expected"):
        TritonProduct(replace(layout, targets=layout.targets.long()))
    with pytest.raises(InputError, match="lengths has length 7"):
        TritonProduct(replace(layout, lengths=layout.lengths[:7]))
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    with pytest.raises(InputError, match="lie on cpu, expected a CUDA device"):
        TritonProduct(layout)


def test_without_triton_the_error_names_what_to_install(monkeypatch):
    layout = to_torch(literal_grouped_rows(matrix()), "cpu")
    monkeypatch.delattr(gpu, "triton_kernels")
    monkeypatch.setitem(sys.modules, "tenfold_core.sparse.gpu.triton_kernels", None)
    with pytest.raises(MissingExtraError, match="pip install torch triton"):
        TritonProduct(layout)


def test_the_import_needs_neither_torch_nor_triton():
    code = (
        "import sys, tenfold_core.sparse.gpu.triton_product\n"
        "print(*({'torch', 'triton', 'cupy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tenfold_core.sparse.gpu import triton_kernels
from tenfold_core.sparse.gpu.triton_product import OPTIONS

def build(kernel, types, constants):
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in ("col", "val") if n in names},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS).asm["ptx"]

for value, offset, pack, uniform, columns, lanes in VARIANTS:
    types = dict.fromkeys(["x", "y", "partial", "val"], "*" + value)
    types |= dict.fromkeys(["alpha", "beta"], "i64") | {"col": "*" + offset, "lengths": "*i16"}
    types |= dict.fromkeys(["start", "segment_start", "split_start"], "*i64")
    names = ["targets", "group_base", "segment_target", "segment_base", "empty_rows", "split_rows"]
    types |= dict.fromkeys(names, "*i32")
    fixed = {"COLUMNS": columns} | ({"stride": 1} if columns == 1 else {})
    ptx = build(
        triton_kernels.grouped_product, types, fixed | dict(PACK=pack, UNIFORM=uniform, TILE=4)
    )
    for wide in ("v2.b64", "v2.b32", "v4.b32"):
        print(value, offset, pack, columns, wide, f"ld.global.cg.{wide}" in ptx)
    build(triton_kernels.combine_parts, types, fixed | dict(LANES=lanes, TILE=128 // lanes))
"""


def test_kernels_compile_for_a_device_and_load_packs_at_once(tmp_path):
    # What the interpreter does not see: types that differ between branches, and widths of loads.
    variants = [
        ("fp64", "i16", 2, False, 1, 1),
        ("fp32", "i32", 4, True, 1, 32),
        ("fp32", "i16", 4, False, 8, 4),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", f"VARIANTS = {variants}\n{COMPILE}"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert "fp64 i16 2 1 v2.b64 True" in lines
    assert "fp32 i32 4 1 v4.b32 True" in lines
    assert "fp32 i16 4 8 v4.b32 True" in lines


@pytest.fixture
def on_gpu():
    """A product with split rows, and operands on the device with the results of each."""
    a = matrix(rows=3000, columns=900)
    product = TritonProduct(to_torch(literal_grouped_rows(a, strip_width=300, pack=2)))
    xs = [torch.tensor(operand(a) * factor, device="cuda") for factor in (1, 2)]
    ys = [torch.full((3000,), torch.nan, dtype=x.dtype, device="cuda") for x in xs]
    for x, y in zip(xs, ys, strict=True):
        product(x, y)
    torch.cuda.synchronize()
    check(a, operand(a), ys[0].cpu().numpy())
    return product, xs, ys


class TestOnADevice:
    pytestmark = on_device

    def test_streams_run_independently_and_allocate_nothing_more(self, on_gpu):
        product, xs, expected = on_gpu
        streams = [torch.cuda.Stream() for _ in xs]
        ys = [[torch.full_like(y, torch.nan) for _ in range(100)] for y in expected]
        torch.cuda.synchronize()
        for launch in range(100):
            for stream, x, y in zip(streams, xs, ys, strict=True):
                with torch.cuda.stream(stream):
                    product(x, y[launch])
            if launch == 0:
                before = torch.cuda.memory_stats()["allocation.all.allocated"]
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        torch.cuda.synchronize()
        assert len({stream for stream, _ in product._workspace}) == 3  # one is the first call's
        for results, wanted in zip(ys, expected, strict=True):
            assert all(torch.equal(y, wanted) for y in results)

    @pytest.mark.parametrize("bound", [True, False])
    def test_products_can_be_captured_in_a_graph(self, on_gpu, bound):
        product, xs, expected = on_gpu
        x, y = xs[0].clone(), torch.empty_like(expected[0])
        run = product.bind(x, y) if bound else lambda: product(x, y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
            run()
        for new, wanted in zip(xs, expected, strict=True):
            x.copy_(new)
            y.fill_(torch.nan)
            graph.replay()
            product(xs[1], torch.empty_like(y))  # what runs beside does not disturb it
            torch.cuda.synchronize()
            assert torch.equal(y, wanted)

    def test_graphs_of_one_product_run_at_the_same_time(self, on_gpu):
        product, xs, expected = on_gpu
        ys = [torch.empty_like(y) for y in expected]
        graphs, streams = [], []
        for x, y in zip(xs, ys, strict=True):
            graphs.append(torch.cuda.CUDAGraph())
            streams.append(torch.cuda.Stream())
            with torch.cuda.graph(graphs[-1]):
                product(x, y)
        torch.cuda.synchronize()
        for _ in range(100):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, wanted) for y, wanted in zip(ys, expected, strict=True))
