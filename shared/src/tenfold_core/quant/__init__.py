# SPDX-License-Identifier: Apache-2.0
"""Quantization: affine codes, scales, rounding, packing, activations, exact integer products.

Names load on first use: `packing` works with NumPy alone, `plugin` needs diffusers and is imported
by name (`tenfold_core.quant.plugin`), everything else needs torch.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "activations": ("ActQuant", "DynamicTokenQuant", "StepwiseActQuant", "TimestepContext"),
    "affine": (
        "LearnableAffine", "check_finite", "clamp_codes", "dequantize", "fake_quant", "max_code",
        "quantize", "round_ste", "storable",
    ),
    "calibration": ("InputCollector", "Reservoir"),
    "integer": ("IntWeight", "int_conv1d", "int_conv2d", "int_linear"),
    "lowrank": ("LowRankDelta",),
    "packing": (
        "PackedWeight", "pack_rows", "packed_layout", "packed_nbytes", "row_nbytes", "unpack_rows",
    ),
    "rounding": ("AdaRound", "rectified_sigmoid"),
    "scales": ("init_scale",),
    "smoothing": (
        "RangeMax", "activation_multiplier", "channel_max", "smooth_scale", "smooth_weight",
        "weight_channel_max",
    ),
    "state": ("bits_of", "float_of", "stored_bytes", "tied_names"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
