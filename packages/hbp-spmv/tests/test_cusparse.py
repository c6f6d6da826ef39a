# SPDX-License-Identifier: Apache-2.0
"""The binding of cuSPARSE against a library of our own; what needs a device is in the baselines."""

import ctypes
import gc
from types import SimpleNamespace

import numpy as np
import pytest
from hbp_spmv import cusparse, gpu_kernels
from hbp_spmv.cusparse import CusparseError, CusparseProduct, Library
from hbp_spmv.gpu_baselines import GPU_BASELINES
from numpy.testing import assert_array_equal
from scipy.sparse import csr_array
from tenfold_core.errors import MissingExtraError
from tenfold_core.testing.cuda import EmulatedRuntime
from tenfold_core.testing.sparse import random_csr


class FakeFunction:
    """A C function that records its calls and returns a status."""

    def __init__(self, name, calls, status):
        self.name, self.calls, self.status = name, calls, status
        self.argtypes = self.restype = None

    def __call__(self, *arguments):
        # What ctypes would do to call C: as many arguments, and each of its type.
        converted = [
            kind.from_param(value) for kind, value in zip(self.argtypes, arguments, strict=True)
        ]
        assert len(converted) == len(arguments)
        self.calls.append((self.name, arguments))
        return self.status.get(self.name, 0)


def fake_library(*, without=(), **status):
    calls = []
    functions = {
        name: FakeFunction(name, calls, status)
        for name in cusparse._SIGNATURES
        if name not in without
    }
    return Library(SimpleNamespace(**functions), "libfake.so.1 (a test's)"), calls


def bound_csr(library, algorithm="CUSPARSE_SPMV_CSR_ALG2"):
    a = random_csr(40, 30, density=0.2).to_scipy()
    parts = gpu_kernels.device_csr(a, EmulatedRuntime())
    return CusparseProduct.csr(library, EmulatedRuntime(), a.shape, *parts, algorithm)


def test_cusparse_is_set_up_once_and_closed():
    library, calls = fake_library()
    call = bound_csr(library)
    assert [name for name, _ in calls] == [
        "cusparseCreate", "cusparseCreateCsr", "cusparseCreateDnVec", "cusparseCreateDnVec",
        "cusparseSetStream", "cusparseGetVersion", "cusparseSpMV_bufferSize",
        "cusparseSpMV_preprocess",
    ]  # fmt: skip
    assert "CUSPARSE_SPMV_CSR_ALG2, int32 indices, preprocessed, workspace of 0 bytes" in call.notes
    calls.clear()
    x, y = np.ones(30), np.ones(40)
    call(x, y)
    call(x, y)
    assert [name for name, _ in calls] == [
        "cusparseSetStream", "cusparseDnVecSetValues", "cusparseDnVecSetValues", "cusparseSpMV",
        "cusparseSpMV",
    ]  # fmt: skip
    assert calls[1][1][1] == x.ctypes.data
    assert calls[2][1][1] == y.ctypes.data
    assert calls[3][1][7:9] == (1, 3)  # CUDA_R_64F, CUSPARSE_SPMV_CSR_ALG2
    calls.clear()
    del call
    gc.collect()
    assert [name for name, _ in calls] == [
        "cusparseDestroyDnVec", "cusparseDestroyDnVec", "cusparseDestroySpMat", "cusparseDestroy"
    ]  # fmt: skip


def test_an_older_cusparse_is_not_preprocessed_and_says_so():
    library, calls = fake_library(without=("cusparseSpMV_preprocess", "cusparseCreateSlicedEll"))
    assert "not preprocessed: the library cannot" in bound_csr(library).notes
    assert "cusparseSpMV_preprocess" not in [name for name, _ in calls]
    with pytest.raises(
        CusparseError, match=r"^cusparseCreateSlicedEll: libfake.so.1 \(a test's\) h"
    ):
        library.call("cusparseCreateSlicedEll")


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("cusparseCreate", 1, "NOT_INITIALIZED"),
        ("cusparseCreateCsr", 3, "INVALID_VALUE"),
        ("cusparseSpMV_bufferSize", 10, "NOT_SUPPORTED"),
        ("cusparseSpMV_preprocess", 11, "INSUFFICIENT_RESOURCES"),
        ("cusparseSpMV", 6, "EXECUTION_FAILED"),
        ("cusparseSpMV", 77, "unknown"),
    ],
)
def test_a_status_is_one_line_that_names_the_call(name, status, text):
    library, _ = fake_library(**{name: status})
    with pytest.raises(CusparseError) as caught:
        bound_csr(library)(np.ones(30), np.ones(40))
    assert str(caught.value) == (
        f"{name}: CUSPARSE_STATUS_{text} ({status}), from libfake.so.1 (a test's)"
    )


def test_sliced_ell_is_described_to_cusparse():
    library, calls = fake_library()
    a = random_csr(40, 30, density=0.2).to_scipy()
    start, col, val = gpu_kernels.sliced_rows("cusparse-sell", a, np.arange(40))
    CusparseProduct.sell(
        library, EmulatedRuntime(), a.shape, a.nnz, start.astype(np.int32), col, val, slice_size=32
    )
    made = dict(calls)["cusparseCreateSlicedEll"][1:]
    assert made[:5] == (40, 30, a.nnz, len(val), 32)
    assert made[6:] == (col.ctypes.data, val.ctypes.data, 2, 2, 0, 1)
    assert "cusparseSpMV_preprocess" not in dict(calls)


def test_matrices_without_elements_need_no_cusparse():
    library, calls = fake_library()
    for matrix in (csr_array((3, 4)), csr_array((0, 4)), csr_array((3, 0))):
        parts = gpu_kernels.device_csr(matrix, EmulatedRuntime())
        call = CusparseProduct.csr(
            library, EmulatedRuntime(), matrix.shape, *parts, "CUSPARSE_SPMV_CSR_ALG1"
        )
        y = np.full(matrix.shape[0], np.nan)
        call(np.ones(matrix.shape[1]), y)
        assert_array_equal(y, 0)
    assert calls == []


@pytest.fixture
def no_library(monkeypatch):
    """Let no library be found."""

    def refuse(name, mode=0):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cusparse.ctypes, "CDLL", refuse)
    cusparse.cusparse_library.cache_clear()
    yield
    cusparse.cusparse_library.cache_clear()


def test_a_missing_library_is_a_reason(no_library):
    reason = cusparse.library_reason()
    assert reason.startswith("cuSPARSE: no library could be loaded (")
    assert "libcusparse.so.12: cannot open shared object file" in reason
    assert "pip install nvidia-cusparse" in reason
    assert "\n" not in reason
    with pytest.raises(MissingExtraError, match="no library could be loaded"):
        GPU_BASELINES["cusparse-csr-alg1"].build(csr_array(np.eye(3)), EmulatedRuntime())


def test_a_library_without_a_function_is_a_reason(monkeypatch):
    library, _ = fake_library(without=("cusparseCreateSlicedEll",))
    monkeypatch.setattr(cusparse, "cusparse_library", lambda: library)
    assert cusparse.library_reason() is None
    reason = cusparse.library_reason("cusparseCreateSlicedEll")
    assert (
        reason == "cuSPARSE: libfake.so.1 (a test's) has no cusparseCreateSlicedEll; it is too old"
    )
    with pytest.raises(MissingExtraError, match="it has no cusparseSpMV; cuSPARSE 11 or newer"):
        fake_library(without=("cusparseSpMV",))


def test_wheels_are_looked_through_before_the_system(monkeypatch, tmp_path):
    folder = tmp_path / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcusparse.so.12").touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(
        cusparse.importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None
    )
    found = list(cusparse._candidates())
    assert found[0] == (str(folder / "libcusparse.so.12"), "NVIDIA's wheel")
    assert found[1:] == [(name, "the system's") for name in cusparse.SONAMES]


def test_the_signatures_are_those_of_the_real_library():
    # Descriptors need no device; where the library is missing there is nothing to compare with.
    try:
        library = cusparse.cusparse_library()
    except MissingExtraError as error:
        pytest.skip(str(error))
    place, made = np.zeros(64).ctypes.data, ctypes.c_void_p()
    for name, sizes in (
        ("cusparseCreateCsr", (2, 2, 2)),
        ("cusparseCreateSlicedEll", (2, 2, 2, 64, 32)),
    ):
        library.call(name, ctypes.byref(made), *sizes, place, place, place, 2, 2, 0, 1)
        library.call("cusparseDestroySpMat", made)
