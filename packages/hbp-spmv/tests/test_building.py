# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
from hbp_spmv import bench, building, from_csr
from hbp_spmv.building import default_threads, workers_for
from tenfold_core.device import cpu_info
from tenfold_core.errors import ConfigError
from tenfold_core.testing.sparse import random_csr


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = replace(cpu_info(), usable_cores=8)
    monkeypatch.setattr(building, "cpu_info", lambda: found)


def test_a_product_uses_the_cores_of_the_process(eight_cores):
    assert default_threads() == 8
    assert workers_for(None, 1 << 30) == 8
    assert workers_for(None, 3 * building.WORKER_NNZ) == 3


@pytest.mark.parametrize(
    ("text", "threads"),
    [("3", 3), (" 3 ", 3), ("3,2", 3), ("8", 8), ("100", 8)]
    + [(text, 8) for text in ("", "0", "-1", "2.5", "all", ",3")],
)
def test_the_variable_of_openmp_lowers_the_default(eight_cores, monkeypatch, text, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert default_threads() == threads
    assert workers_for(None, 1 << 30) == threads
    assert bench.BenchConfig().cases == [("float64", threads, False)]


def test_an_argument_is_stronger_than_the_variable(eight_cores, monkeypatch, several_workers):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    a = random_csr(60, 50, density=0.2, seed=3).to_scipy()
    assert from_csr(a).threads == 1
    assert from_csr(a, threads=5).threads == 5
    assert from_csr(a, threads=12).threads == 12


@pytest.mark.parametrize("threads", [0, -2, 1.0, "2", True, False])
def test_threads_are_a_positive_integer(threads):
    with pytest.raises(ConfigError, match=f"threads: expected a positive int, got {threads!r}"):
        workers_for(threads, 1 << 30)
