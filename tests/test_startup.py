# SPDX-License-Identifier: Apache-2.0
"""Start-up: asking for help or the version, or importing, loads nothing heavy."""

import re
import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "diffusers", "transformers", "torch_geometric", "cupy", "matplotlib")
HEAVY = (*FRAMEWORKS, "scipy", "polars", "numba", "sklearn", "triton")

# A hook on sys.meta_path, because a None entry in sys.modules is visible to libraries that look
# there. BaseException, because `except ImportError` would hide the attempt.
PROBE = """
import sys

class Loaded(BaseException):
    pass

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise Loaded(f"start-up loads {name}")

BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Refuse())
"""
CALL = """
import importlib
target = sys.argv.pop(1)
module, _, function = target.partition(":")
sys.exit(getattr(importlib.import_module(module), function)())
"""
IMPORT = """
import importlib
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
"""


def run(script, blocked, *arguments):
    """Run a script in a fresh interpreter that refuses to import what is blocked."""
    command = [sys.executable, "-c", PROBE + script, ",".join(blocked), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_help_loads_nothing_heavy(installed_command):
    member, name = installed_command
    result = run(CALL, HEAVY, member.scripts[name], "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "\x1b" not in result.stdout + result.stderr


def test_version_is_answered_before_the_command_line_is_built(installed_command):
    member, name = installed_command
    result = run(CALL, (*HEAVY, "tyro", "rich"), member.scripts[name], "--version")
    assert result.returncode == 0, result.stderr
    assert re.search(rf"\b{re.escape(member.version)}\b", result.stdout)
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""


def test_importing_a_package_loads_no_framework(installed_member):
    result = run(IMPORT, FRAMEWORKS, installed_member.module)
    assert result.returncode == 0, result.stderr


def test_the_core_works_with_numpy_alone():
    pytest.importorskip("tenfold_core")
    modules = ("errors", "run", "sparse", "device")
    result = run(
        IMPORT,
        (*HEAVY, "safetensors"),
        "tenfold_core",
        *(f"tenfold_core.{module}" for module in modules),
    )
    assert result.returncode == 0, result.stderr


def test_the_module_runs_as_the_command(installed_member):
    if installed_member.name not in installed_member.scripts:
        pytest.skip(f"{installed_member.name} has no command")
    command = [sys.executable, "-m", installed_member.module, "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert installed_member.version in result.stdout


def test_the_probe_itself_refuses():
    result = run("import json.tool", ("json",))
    assert result.returncode != 0
    assert "start-up loads json" in result.stderr
