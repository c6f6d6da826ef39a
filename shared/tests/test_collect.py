# SPDX-License-Identifier: Apache-2.0
import types

import pytest
from tenfold_core.testing import collect


@pytest.fixture
def config(tmp_path):
    for name in ("present-one", "absent-one"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "pyproject.toml").touch()
    (tmp_path / "packages" / "leftover").mkdir()
    return types.SimpleNamespace(rootpath=tmp_path)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(collect, "find_spec", lambda name: name == "present_one" or None)


def test_a_package_that_is_not_installed_is_left_out_and_named(config):
    packages = config.rootpath / "packages"
    assert collect.pytest_ignore_collect(packages / "absent-one", config) is True
    assert collect.pytest_ignore_collect(packages / "present-one", config) is None
    assert collect.pytest_report_header(config) == ["not installed, left out: absent-one"]


def test_everything_else_is_collected(config):
    for path in (".", "packages", "packages/leftover", "tests", "packages/absent-one/tests"):
        assert collect.pytest_ignore_collect(config.rootpath / path, config) is None


def test_nothing_is_said_when_nothing_is_missing(config):
    (config.rootpath / "packages" / "absent-one" / "pyproject.toml").unlink()
    assert collect.pytest_report_header(config) == []
