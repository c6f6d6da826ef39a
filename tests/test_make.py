# SPDX-License-Identifier: Apache-2.0
"""The Makefile where uv is not installed: benchmarks run with a Python that is named."""

import os
import shutil
import subprocess

import pytest


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_benchmark_runs_without_uv_by_the_python_that_is_named(root, tmp_path):
    tools = ("sh", "make", "sed", "sort", "env", "echo", "test")
    for name in tools:
        if found := shutil.which(name):
            (tmp_path / name).symlink_to(found)
    command = ["make", "bench", "PKG=hbp-spmv", "ARGS=--device=cuda", "RUN=env echo python3"]
    found = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": str(tmp_path), "HOME": os.environ.get("HOME", "")},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    folder = "packages/hbp-spmv/benchmarks"
    assert f"python3 {folder}/bench_gpu.py --device=cuda" in lines
    assert len(lines) == len(list((root / folder).glob("bench_*.py")))
