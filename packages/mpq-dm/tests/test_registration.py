# SPDX-License-Identifier: Apache-2.0
"""Diffusers knows packed models after `import mpq_dm`, which imports nothing heavy."""

import subprocess
import sys
from importlib.abc import MetaPathFinder

import pytest
from mpq_dm import registration
from tenfold_core.errors import TenfoldWarning


def test_either_import_may_come_first():
    pytest.importorskip("diffusers")
    program = """
import sys
import mpq_dm
assert not {"torch", "diffusers", "numpy"} & set(sys.modules), "import mpq_dm is not light"
from diffusers.quantizers import auto
tables = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
print([table["mpq-dm"].__name__ for table in tables])
assert not any("mpq_dm" in type(finder).__module__ for finder in sys.meta_path)
for table in tables:
    del table["mpq-dm"]
for name in [name for name in sys.modules if name.startswith("mpq_dm")]:
    del sys.modules[name]
import mpq_dm
print([table["mpq-dm"].__name__ for table in tables])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["['MPQDMQuantizer', 'MPQDMQuantConfig']"] * 2


def test_registering_again_changes_nothing():
    auto = pytest.importorskip("diffusers.quantizers.auto")
    from mpq_dm.plugin import MPQDMQuantConfig, MPQDMQuantizer

    registration.register_with_diffusers()
    assert auto.AUTO_QUANTIZER_MAPPING["mpq-dm"] is MPQDMQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["mpq-dm"] is MPQDMQuantConfig
    assert not any(isinstance(finder, registration._Finder) for finder in sys.meta_path)


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module in the place of diffusers' tables, and one in that of the plug-in."""
    (tmp_path / "tables_of_tests.py").write_text("value = 3\n")
    (tmp_path / "plugin_of_tests.py").write_text("import tables_of_tests\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "_TABLES", "tables_of_tests")
    monkeypatch.setattr(registration, "_PLUGIN", "plugin_of_tests")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    for name in ("tables_of_tests", "plugin_of_tests"):
        sys.modules.pop(name, None)


def test_the_hook_waits_for_one_module_and_leaves(foreign):
    registration.register_with_diffusers()
    registration.register_with_diffusers()
    finders = [finder for finder in sys.meta_path if isinstance(finder, registration._Finder)]
    assert len(finders) == 1
    import tables_of_tests  # pyrefly: ignore[missing-import]

    assert tables_of_tests.value == 3
    assert type(tables_of_tests.__loader__).__name__ == "SourceFileLoader"
    assert "plugin_of_tests" in sys.modules
    assert finders[0] not in sys.meta_path


def test_a_second_import_of_the_package_and_a_like_minded_finder_do_no_harm(foreign, monkeypatch):
    class Delegating(MetaPathFinder):
        """Asks all finders in turn, as other packages' hooks do."""

        def find_spec(self, fullname, path, target=None):
            if fullname != "tables_of_tests":
                return None
            specs = (f.find_spec(fullname, path, target) for f in sys.meta_path if f is not self)
            return next((spec for spec in specs if spec is not None), None)

    sys.meta_path.insert(0, Delegating())
    registration.register_with_diffusers()
    monkeypatch.setattr(registration, "_Finder", type("_Finder", (registration._Finder,), {}))
    registration.register_with_diffusers()
    waiting = [f for f in sys.meta_path if type(f).__module__ == registration.__name__]
    assert len(waiting) == 1
    import tables_of_tests  # pyrefly: ignore[missing-import]

    assert tables_of_tests.value == 3
    assert "plugin_of_tests" in sys.modules


def test_a_diffusers_we_do_not_fit_stays_usable(foreign):
    (foreign / "plugin_of_tests.py").write_text("raise ImportError('no name DiffusersQuantizer')\n")
    registration.register_with_diffusers()
    with pytest.warns(TenfoldWarning, match="cannot register with diffusers: no name Diffusers"):
        import tables_of_tests  # pyrefly: ignore[missing-import]
    assert tables_of_tests.value == 3


def test_a_module_nobody_has_is_still_missing(foreign):
    (foreign / "tables_of_tests.py").unlink()
    registration.register_with_diffusers()
    with pytest.raises(ModuleNotFoundError, match="tables_of_tests"):
        import tables_of_tests  # noqa: F401  # pyrefly: ignore[missing-import]
