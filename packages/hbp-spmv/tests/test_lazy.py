# SPDX-License-Identifier: Apache-2.0
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import hbp_spmv
import pytest

HEAVY = {"torch", "numba", "llvmlite", "scipy", "cupy", "matplotlib", "polars"}
WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None
"""
PRODUCTS = """
import numpy as np
from scipy.sparse import csr_array
import hbp_spmv
from hbp_spmv import from_csr
a = csr_array(np.array([[1.0, 0, 2], [0, 3, 0]]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    matrix = from_csr(a)
    others = [from_csr(a), matrix.T, matrix.astype("float32"), from_csr(a * 1j)]
print([warning.category.__name__ for warning in caught])
print(str(caught[0].message))
print({other.layout for other in [matrix, *others]})
print((matrix @ np.ones(3)).tolist(), matrix.rmatvec(np.ones(2)).tolist())
print(matrix.matvec(np.ones(3), np.ones(2), alpha=2.0, beta=3.0).tolist())
print((matrix @ np.ones((3, 2))).tolist(), matrix.update_values([4, 5, 6]).diagonal().tolist())
"""


def run_python(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def assert_scipy_multiplied(lines):
    assert lines[0] == "['TenfoldWarning']"
    assert lines[1].startswith("compiled kernels are not available (")
    assert lines[1].endswith("; products run in SciPy")
    assert lines[2] == "{'scipy'}"
    assert lines[3] == "[3.0, 3.0] [1.0, 3.0, 2.0]"
    assert lines[4] == "[9.0, 9.0]"
    assert lines[5] == "[[3.0, 3.0], [3.0, 3.0]] [4.0, 6.0]"


def test_the_import_is_light():
    code = "import sys, hbp_spmv; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    assert not HEAVY & set(run_python(code)[0].split())


def test_numba_waits_for_a_matrix_and_torch_for_a_tensor():
    code = "import sys, hbp_spmv.matrix, hbp_spmv.storage; print('numba' in sys.modules)"
    assert run_python(code) == ["False"]
    code = """
import sys
import numpy as np
from scipy.sparse import eye_array
from hbp_spmv import from_csr
from_csr(eye_array(3)) @ np.ones(3)
print("numba" in sys.modules, "torch" in sys.modules)
"""
    assert run_python(code) == ["True False"]


@pytest.mark.parametrize("name", sorted(set(hbp_spmv.__all__) - {"torch"}))
def test_every_public_name_resolves(name):
    assert getattr(hbp_spmv, name)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'hbp_spmv' has no attribute 'nothing'"):
        hbp_spmv.nothing  # noqa: B018


def test_a_source_tree_that_is_not_installed_has_a_version_too(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert hbp_spmv.__version__ == "0+unknown"


def test_without_numba_scipy_multiplies_after_one_warning():
    assert_scipy_multiplied(run_python(WITHOUT_NUMBA + PRODUCTS))


def test_without_numba_what_needs_kernels_says_so(tmp_path):
    code = """
import warnings
warnings.simplefilter("ignore")
from scipy.sparse import eye_array
from hbp_spmv import from_csr, load, select, verify
from tenfold_core.errors import MissingExtraError
a = eye_array(4, format="csr")
for layout in ("compact", "paper", "csr"):
    try:
        from_csr(a, layout=layout)
    except MissingExtraError as error:
        print(error)
plan = select(a)
print(plan.format, plan.reasons)
matrix = from_csr(a)
matrix.save(sys.argv[1])
print(load(sys.argv[1]).layout, verify(matrix, a).worst, matrix.stats.layout)
"""
    lines = run_python(WITHOUT_NUMBA + code, str(tmp_path / "a.hbp.safetensors"))
    for line, layout in zip(lines, ("compact", "paper", "csr"), strict=False):
        assert line.startswith(f"layout='{layout}' needs compiled kernels")
    assert lines[3].startswith("scipy ('numba does not work here")
    assert lines[4] == "scipy 0.0 scipy"


def test_a_cache_folder_that_cannot_be_written_leaves_scipy(tmp_path):
    source = Path(hbp_spmv.__file__).parent
    copy = tmp_path / "hbp_spmv"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    blocked = tmp_path / "blocked"
    blocked.touch()
    # a file where a folder should be stops even a user who may write everywhere
    for folder in (copy, *(path for path in copy.iterdir() if path.is_dir())):
        (folder / "__pycache__").touch()
    places = dict.fromkeys(
        ["HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "NUMBA_CACHE_DIR"], str(blocked / "nowhere")
    )
    inherited = os.environ.get("PYTHONPATH", "")
    lines = run_python(
        "import warnings\n" + PRODUCTS + "print(hbp_spmv.__file__)",
        PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, [inherited])]),
        PYTHONDONTWRITEBYTECODE="1",
        **places,
    )
    assert Path(lines[6]).is_relative_to(tmp_path)
    assert "cannot cache function" in lines[1]
    assert_scipy_multiplied(lines)
