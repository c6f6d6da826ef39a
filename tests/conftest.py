# SPDX-License-Identifier: Apache-2.0
"""What the cross-package tests share: the scripts of .github and the members they find."""

import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".github" / "scripts"))
MEMBERS = importlib.import_module("affected").members(ROOT)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for ``member`` or ``command`` once for each there is."""
    if "member" in metafunc.fixturenames:
        metafunc.parametrize("member", MEMBERS, ids=[member.name for member in MEMBERS])
    if "command" in metafunc.fixturenames:
        commands = [
            pytest.param((member, name), id=name) for member in MEMBERS for name in member.scripts
        ]
        metafunc.parametrize("command", commands)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def affected() -> ModuleType:
    return importlib.import_module("affected")


@pytest.fixture(scope="session")
def changelog() -> ModuleType:
    return importlib.import_module("changelog")


@pytest.fixture(scope="session")
def check_workspace() -> ModuleType:
    return importlib.import_module("check_workspace")


def skip_unless_installed(member) -> None:
    if importlib.util.find_spec(member.module) is None:
        pytest.skip(f"{member.name} is not installed")


@pytest.fixture
def installed_member(member):
    """Return each member that is installed here; skip the others."""
    skip_unless_installed(member)
    return member


@pytest.fixture
def installed_command(command):
    """Return each (member, command) whose member is installed here; skip the others."""
    skip_unless_installed(command[0])
    return command


@pytest.fixture(scope="session")
def uv() -> str:
    """Return the uv that runs the tests, which `uv run` names in the environment."""
    found = os.environ.get("UV") or shutil.which("uv")
    if found is None:
        pytest.skip("uv is not on PATH")
    return found
