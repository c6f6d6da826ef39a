# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest
import tenfold_core
import tenfold_core.run
import tenfold_core.sparse

HEAVY = ("torch", "scipy", "numba", "matplotlib", "rich", "tyro", "cupy", "safetensors", "pandas")


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import tenfold_core.errors, tenfold_core.run, tenfold_core.run.cli", (*HEAVY, "numpy")),
        (
            "import tenfold_core.sparse, tenfold_core.device, tenfold_core.run.record, "
            "tenfold_core.run.timing, tenfold_core.run.seeds, tenfold_core.run.report, "
            "tenfold_core.run.checkpoint",
            HEAVY,
        ),
    ],
)
def test_imports_stay_light(statement, forbidden):
    code = f"import sys\n{statement}\nprint(*(set({forbidden!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names_resolve_on_first_use():
    assert all(hasattr(tenfold_core, name) for name in tenfold_core.__all__)
    assert all(hasattr(tenfold_core.run, name) for name in tenfold_core.run.__all__)
    assert all(hasattr(tenfold_core.sparse, name) for name in tenfold_core.sparse.__all__)
    assert tenfold_core.__version__


@pytest.mark.parametrize("module", [tenfold_core, tenfold_core.run])
def test_unknown_names_are_attribute_errors(module):
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_a_source_tree_that_is_not_installed_has_a_version_too(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert tenfold_core.__version__ == "0+unknown"


def test_the_module_prints_the_environment():
    done = subprocess.run(
        [sys.executable, "-m", "tenfold_core"], capture_output=True, text=True, check=True
    )
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert {"python", "processor", "memory", "numpy", "cupy"} <= set(names)
