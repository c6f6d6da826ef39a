# SPDX-License-Identifier: Apache-2.0
"""Mixed-precision quantization of diffusion models at 2 to 4 bits; names load on first use."""

from importlib import import_module
from typing import Any

from mpq_dm.registration import register_with_diffusers

_MODULE_OF = {
    "LatentSampler": "sampler",
    "MPQDMConfig": "config",
    "MPQDMQuantConfig": "plugin",
    "MixConfig": "config",
    "PipelineSampler": "sampler",
    "QuantResult": "method",
    "account": "sizes",
    "allocate": "allocation",
    "analyze": "analysis",
    "find_layers": "roles",
    "kurtosis": "omq",
    "load": "plugin",
    "load_model": "models",
    "method_config": "config",
    "quantize": "method",
    "set_mode": "packed",
}

__all__ = ["__version__", *_MODULE_OF]

register_with_diffusers()


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mpq-dm")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+unknown"
