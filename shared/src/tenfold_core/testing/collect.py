# SPDX-License-Identifier: Apache-2.0
"""Pytest plugin: leave out the packages that are not installed, and say which.

A plain ``uv run pytest`` has only the light packages; without this, collection stops at the first
test module whose package cannot be imported.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

__all__ = ["pytest_ignore_collect", "pytest_report_header"]


if os.environ.get("PYTEST_XDIST_WORKER"):
    # The workers share the cores: with a team of threads in each, they would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _missing(root: Path) -> list[str]:
    members = sorted(path.parent.name for path in root.glob("packages/*/pyproject.toml"))
    return [name for name in members if find_spec(name.replace("-", "_")) is None]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip ``packages/<dist>`` if its module cannot be found."""
    if collection_path.parent != config.rootpath / "packages":
        return None
    return True if collection_path.name in _missing(config.rootpath) else None


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name the packages left out."""
    missing = _missing(config.rootpath)
    return [f"not installed, left out: {', '.join(missing)}"] if missing else []
