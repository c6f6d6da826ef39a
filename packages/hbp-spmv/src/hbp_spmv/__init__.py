# SPDX-License-Identifier: Apache-2.0
"""Hash-based partition SpMV: reorder, balance, multiply; names load on first use."""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "BuildConfig": "config",
    "HBPMatrix": "matrix",
    "HashParams": "config",
    "PAPER": "config",
    "ReadError": "errors",
    "VerificationError": "errors",
    "calibrate": "calibration",
    "from_csr": "matrix",
    "load": "storage",
    "read": "readers",
    "reorder": "hashing",
    "select": "selection",
    "verify": "verification",
}
_MODULES = ("baselines", "generate", "torch")

__all__ = ["__version__", *_MODULE_OF, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hbp-spmv")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+unknown"
