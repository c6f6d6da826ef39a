# SPDX-License-Identifier: Apache-2.0
"""`CudaMatrix`: the same checks with emulated kernels on the CPU and, marked `gpu`, on a device."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from hbp_spmv import cuda, cuda_selection, from_csr, verify
from hbp_spmv.config import BuildConfig
from hbp_spmv.cuda_selection import DeviceCalibration, candidates, plain_features, predict
from tenfold_core.device import cupy_or_none
from tenfold_core.errors import ConfigError, InputError, MissingExtraError
from tenfold_core.sparse.gpu import cuda_runtime
from tenfold_core.testing.cuda import EmulatedRuntime, compiler
from tenfold_core.testing.sparse import csr_from_lengths

DEVICES = [
    pytest.param(
        "emulated",
        marks=pytest.mark.skipif(compiler() is None, reason="no C++ compiler to emulate kernels"),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(cupy_or_none() is None, reason="no CUDA device that CuPy can use"),
        ],
    ),
]
LAYOUTS = [
    {"layout": "csr"},
    {"layout": "compact"},
    {"layout": "compact", "strips": 200},
    {"layout": "compact", "hash": "paper"},
    {"layout": "paper"},
]


@pytest.fixture(params=DEVICES)
def runtime(request):
    return EmulatedRuntime() if request.param == "emulated" else cuda_runtime()


@pytest.fixture(scope="module")
def a():
    rng = np.random.default_rng(0)
    lengths = rng.poisson(5, 600)
    lengths[::9] = 0
    lengths[[4, 300]] = 500, 333
    return csr_from_lengths(lengths, 700, rng).to_scipy()


def build(a, runtime, **settings):
    return cuda.build(a, BuildConfig(**settings), "cuda", runtime=runtime)


def on(runtime, array):
    return runtime.xp.asarray(array)


def host(array):
    return np.asarray(array.get() if hasattr(array, "get") else array)


@pytest.mark.parametrize("settings", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_layout_keeps_the_bound(a, runtime, settings, dtype):
    h = build(a.astype(dtype), runtime, **settings)
    assert h.device == "cuda:0"
    assert verify(h, a.astype(dtype)).worst <= 1
    back = h.to_csr()
    np.testing.assert_array_equal(back.indices, a.indices)
    np.testing.assert_array_equal(back.data, a.astype(dtype).data)


@pytest.mark.parametrize("settings", LAYOUTS, ids=str)
def test_columns_factors_and_out(a, runtime, settings):
    h = build(a, runtime, **settings)
    rng = np.random.default_rng(1)
    x, old = rng.standard_normal((700, 5)), rng.standard_normal((600, 5))
    for operand, before in ((x, old), (x[:, 0].copy(), old[:, 0].copy())):
        out = on(runtime, before.copy())
        result = h.matvec(on(runtime, operand), out=out, alpha=0.5, beta=-2.0)
        assert result is out
        np.testing.assert_allclose(host(out), 0.5 * (a @ operand) - 2 * before, atol=1e-10)


def test_transposed(a, runtime):
    h = build(a, runtime, layout="compact")
    g = np.random.default_rng(2).standard_normal(600)
    np.testing.assert_allclose(host(h.rmatvec(on(runtime, g))), a.T @ g, atol=1e-10)
    np.testing.assert_allclose(host(on(runtime, g) @ h), a.T @ g, atol=1e-10)
    assert h.T.T is h


@pytest.mark.parametrize("settings", LAYOUTS, ids=str)
def test_new_values_without_leaving_the_device(a, runtime, settings):
    h = build(a, runtime, keep_perm=True, **settings)
    new = np.random.default_rng(3).standard_normal(a.nnz)
    b = sp.csr_array((new, a.indices, a.indptr), shape=a.shape)
    assert verify(h.update_values(new), b).worst <= 1
    assert verify(h.update_values(on(runtime, new)), b).worst <= 1
    assert verify(h, a).worst <= 1


def test_values_that_do_not_fit_are_refused(a, runtime):
    h = build(a, runtime, layout="compact")
    with pytest.raises(InputError, match="permutation was not kept"):
        h.update_values(a.data)
    h = build(a.astype(np.float32), runtime, layout="csr")
    with pytest.raises(InputError, match="digits would be lost"):
        h.update_values(a.data.tolist())
    with pytest.raises(InputError, match="type float64, expected"):
        h.update_values(on(runtime, a.data.astype(np.float64)))


def test_complex_operands_are_two_columns(a, runtime):
    h = build(a, runtime, layout="compact")
    rng = np.random.default_rng(4)
    x = rng.standard_normal(700) + 1j * rng.standard_normal(700)
    np.testing.assert_allclose(host(h @ on(runtime, x)), a @ x, atol=1e-10)


def test_bound_products_have_memory_of_their_own(a, runtime):
    h = build(a, runtime, layout="compact", strips=200)
    x, y = on(runtime, np.ones(700)), on(runtime, np.full(600, 7.0))
    launch = h.bind(x, y, beta=1.0)
    np.testing.assert_array_equal(host(y), np.full(600, 7.0))  # bound, not yet computed
    launch()
    np.testing.assert_allclose(host(y), 7 + a @ np.ones(700), atol=1e-10)
    x[:] = 2.0
    launch()
    np.testing.assert_allclose(host(y), 7 + 3 * (a @ np.ones(700)), atol=1e-10)


@pytest.mark.parametrize(
    ("operand", "text"),
    [
        (np.ones(5), r"x has shape \(5,\), expected \(700,\)"),
        (np.ones((700, 2, 2)), "x has shape"),
        (np.full(700, "a"), "expected numbers"),
    ],
)
def test_operands_that_do_not_fit_are_refused(a, operand, text):
    h = build(a, EmulatedRuntime(), layout="csr")
    with pytest.raises(InputError, match=text):
        h @ operand


def test_results_that_do_not_fit_are_refused(a, runtime):
    h = build(a, runtime, layout="csr")
    x = on(runtime, np.ones(700))
    with pytest.raises(InputError, match="expected an out array"):
        h.matvec(x, beta=1.0)
    with pytest.raises(InputError, match=r"expected an array of shape \(600,\)"):
        h.matvec(x, out=on(runtime, np.ones(5)))
    with pytest.raises(InputError, match="out has shape"):
        h.bind(x, on(runtime, np.ones(5)))
    single = build(a.astype(np.float32), runtime, layout="csr")
    with pytest.raises(InputError, match="digits would be lost"):
        single @ x


def test_complex_matrices_are_refused(a):
    with pytest.raises(InputError, match="multiplies float32 and float64, got complex128"):
        build(a.astype(complex), EmulatedRuntime())


def test_facts(a, runtime):
    h = build(a, runtime, layout="compact", strips=200)
    stats = h.stats
    assert (stats.nnz, stats.strips, stats.heavy_rows) == (a.nnz, 4, 3)
    assert stats.bytes == h.nbytes == sum(int(v.nbytes) for v in h.arrays().values()) + 20
    assert stats.std_after <= stats.std_before
    assert "cuda:0" in repr(h)
    np.testing.assert_array_equal(h.diagonal(), a.diagonal())
    with pytest.raises(InputError, match="lies on cuda:0"):
        h.with_threads(2)
    assert h.astype("float32").dtype == np.float32


@pytest.fixture
def calibration(monkeypatch):
    found = DeviceCalibration(
        bandwidth=((1 << 25, 6000.0), (1 << 28, 4300.0)), launch_us=3.0, sector_gbs=2000.0,
        warps=6336,
    )  # fmt: skip
    monkeypatch.setattr(cuda_selection, "calibrate_device", lambda runtime: found)
    return found


def test_auto_times_what_is_close_and_says_why(a, runtime, calibration):
    h = cuda.build(a, BuildConfig(), "cuda", runtime=runtime)
    assert h.layout in ("csr", "compact")
    assert any("timed: " in reason or "predicted" in reason for reason in h.reasons)
    assert verify(h, a).worst <= 1
    few = cuda.build(a, BuildConfig(), "cuda", n_products=1, runtime=runtime)
    assert few.layout == "csr"
    with pytest.raises(ConfigError, match="n_products"):
        cuda.build(a, BuildConfig(), "cuda", n_products=0, runtime=runtime)


def test_a_calibration_is_measured_once(runtime):
    found = cuda_selection.calibrate_device(runtime)
    assert found is cuda_selection.calibrate_device(runtime)
    assert found.bandwidth_at(1) > 0
    assert found.launch_us > 0
    assert found.sector_gbs > 0


def test_predictions_follow_bytes_and_occupancy(a, calibration):
    f = plain_features(a)
    big = replace(f, rows=10**7, columns=10**6, nnz=6 * 10**7)
    names = ("csr", "cusparse", "compact")
    small, large = (predict(g, calibration, names) for g in (f, big))
    assert all(large[name] > small[name] > calibration.launch_us for name in names)
    assert large["compact"] < large["csr"]  # fewer bytes


def test_strips_are_considered_where_x_exceeds_the_cache():
    runtime = EmulatedRuntime(l2_bytes=1 << 12)
    a = sp.random_array((50, 3000), density=0.01, format="csr", rng=np.random.default_rng(0))
    found = candidates(a, BuildConfig(), runtime)
    assert found["compact-strips"].strips == (48 << 10) // 8
    assert "compact-strips" not in candidates(a[:, :100], BuildConfig(), runtime)


@pytest.mark.skipif(cupy_or_none() is not None, reason="there is a CUDA device")
def test_without_a_device_the_reason_is_told(a):
    with pytest.raises((ConfigError, MissingExtraError), match=r"device.*'cuda'"):
        from_csr(a, device="cuda")
    h = from_csr(a, layout="csr", device="auto")
    assert h.device == "cpu"
    assert h.to("cpu") is h
    with pytest.raises((ConfigError, MissingExtraError)):
        h.to("cuda:1")


gpu = pytest.mark.skipif(cupy_or_none() is None, reason="no CUDA device that CuPy can use")


@pytest.mark.gpu
@gpu
def test_to_and_fro(a):
    h = from_csr(a, layout="compact").to("cuda")
    assert isinstance(h, cuda.CudaMatrix)
    assert h.to("cuda") is h
    assert verify(h.to("cpu"), a).worst <= 1
    assert verify(pickle.loads(pickle.dumps(h)), a).worst <= 1
    np.testing.assert_allclose(h @ np.ones(700), a @ np.ones(700), atol=1e-10)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("settings", [s for s in LAYOUTS if s["layout"] != "paper"], ids=str)
def test_a_hundred_launches_on_two_streams(a, settings):
    import cupy

    h = from_csr(a, device="cuda", **settings)
    expected = {sign: (h @ cupy.full(700, float(sign))).get() for sign in (1, -1)}
    streams = {sign: cupy.cuda.Stream(non_blocking=True) for sign in (1, -1)}
    x = {sign: cupy.full(700, float(sign)) for sign in (1, -1)}
    cupy.cuda.Device().synchronize()
    results = []
    for turn in range(100):
        sign = 1 if turn % 2 else -1
        with streams[sign]:
            results.append((sign, h @ x[sign]))
    cupy.cuda.Device().synchronize()
    for sign, y in results:
        np.testing.assert_array_equal(y.get(), expected[sign])


@pytest.mark.gpu
@gpu
def test_torch_tensors_graphs_and_gradients(a):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    h = from_csr(a, layout="compact", device="cuda", keep_perm=True)
    x = torch.ones(700, dtype=torch.float64, device="cuda")
    y = h @ x
    assert y.is_cuda
    np.testing.assert_allclose(y.cpu().numpy(), a @ np.ones(700), atol=1e-10)
    out = torch.zeros(600, dtype=torch.float64, device="cuda")
    launch = h.bind(x, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    x.fill_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    np.testing.assert_allclose(out.cpu().numpy(), 3 * (a @ np.ones(700)), atol=1e-10)
    from hbp_spmv.torch import spmv

    small = from_csr(a[:40, :30], layout="compact", device="cuda", keep_perm=True)
    x = torch.randn(30, dtype=torch.float64, device="cuda", requires_grad=True)
    values = torch.randn(small.nnz, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(lambda u, v: spmv(small, u, v), (x, values))
