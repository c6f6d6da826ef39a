# SPDX-License-Identifier: Apache-2.0
"""Ground of the Tenfold packages: run records, timing, checkpoints, commands, sparse matrices.

Nothing heavy is imported here; submodules load on first use.
"""

from importlib import import_module
from typing import Any

__all__ = ["__version__", "device", "errors", "run", "sparse", "testing"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tenfold-core")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+unknown"
