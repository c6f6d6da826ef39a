# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hbp_spmv import building, calibration
from hypothesis import settings
from scipy.sparse import csr_array
from tenfold_core.testing.sparse import csr_from_lengths

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def no_measured_calibration(tmp_path_factory):
    """Predict from the built-in constants, whatever this host has measured before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HBP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(calibration, "_LOADED", [])
        yield


@pytest.fixture
def several_workers(monkeypatch):
    """Let matrices of any size use as many threads as are asked for."""
    monkeypatch.setattr(building, "WORKER_NNZ", 1)


@pytest.fixture
def worked_example():
    """Row r holds 10(r+1)+c in columns c = 0..k-1, k = [5,0,1,2,3,2,0,4]; M = N = 8, W = 4."""
    lengths = [5, 0, 1, 2, 3, 2, 0, 4]
    col = np.array([0, 1, 2, 3, 4, 0, 0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 3])
    row = np.array([0, 0, 0, 0, 0, 2, 3, 3, 4, 4, 4, 5, 5, 7, 7, 7, 7])
    ptr = np.concatenate([[0], np.cumsum(lengths)])
    return csr_array((10.0 * (row + 1) + col, col, ptr), shape=(8, 8))


@pytest.fixture
def skewed():
    """600 x 500, many short rows, empty ones, and two rows of 450 and 500."""
    rng = np.random.default_rng(5)
    lengths = np.minimum(rng.zipf(1.6, 600) - 1, 60)
    lengths[[7, 300]] = 450, 500
    return csr_from_lengths(lengths, 500, rng).to_scipy()
