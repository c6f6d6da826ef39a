# SPDX-License-Identifier: Apache-2.0
"""The settings of a quantization, shared by API, command line and records."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, get_args

from tenfold_core.errors import ConfigError

__all__ = [
    "ALLOCATIONS",
    "METHODS",
    "PRESETS",
    "MPQDMConfig",
    "MixConfig",
    "method_config",
    "parse_settings",
]

ALLOCATIONS = ("uniform", "kurtosis", "exact", "exact-layers", "hawq")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixConfig:
    """How many bits the rows of the body get; see `MPQDMConfig` for the rest."""

    weight_bits: int = 2
    """N, the average bits of a weight in the body of the network."""
    allocation: str = "kurtosis"
    """uniform, kurtosis (the paper), exact (per layer), exact-layers (one budget for all), or hawq
    (whole layers, by the trace of the Hessian)."""
    omq_range: str = "paper"
    """Groups that may move: paper (all), or official (the published program: at most one)."""
    plus: float = 0.0
    """Part of the rows, those of largest kurtosis, that get one more bit for nothing; all others
    then have N bits, whatever `allocation` says."""
    skip_bits: int = 8
    """Bits of shortcuts and strided downsamplers; 32 leaves them as they are."""
    edge_bits: int = 8
    """Bits of the first and last layers and of the embedders of timestep and label."""

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATIONS:
            names = ", ".join(ALLOCATIONS)
            raise ConfigError(f"allocation is {self.allocation!r}, expected {names}")
        if self.omq_range not in ("paper", "official"):
            raise ConfigError(f"omq_range is {self.omq_range!r}, expected paper or official")
        if not 1 <= self.weight_bits <= 8:
            raise ConfigError(f"weight_bits is {self.weight_bits}, expected 1 to 8")
        if self.weight_bits == 1 and self.allocation != "uniform":
            raise ConfigError(
                "weight_bits is 1: mixing needs 0, 1 and 2 bits; use allocation='uniform', plus, "
                "or 2 bits"
            )
        if not 0 <= self.plus <= 1:
            raise ConfigError(f"plus is {self.plus}, expected a fraction between 0 and 1")
        if self.plus and self.weight_bits == 8:
            raise ConfigError("weight_bits is 8: no row can be raised, expected plus=0")
        for name, allowed in (("skip_bits", (8, 16, 32)), ("edge_bits", (8, 16, 32))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 8, 16 or 32")

    @property
    def choices(self) -> tuple[int, ...]:
        """Bits that a row of the body may have, the raise by `plus` aside."""
        if self.allocation == "uniform" or self.weight_bits == 8:
            return (self.weight_bits,)
        return (self.weight_bits - 1, self.weight_bits, self.weight_bits + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MPQDMConfig(MixConfig):
    """All settings of `quantize`; the defaults are the paper's for LDM-4 on ImageNet at W2A6."""

    act_bits: int = 6
    """Bits of the body's inputs."""
    steps: int = 20
    """Sampling steps of the sampler that will be used."""
    eta: float = 0.0
    """Noise of a DDIM sampler, 0 for none."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 for none."""
    batch_size: int = 4
    """Images sampled together."""
    seed: int = 3407
    """Seed of noises, conditions, calibration and LoRA."""

    calib_samples: int = 32
    """Images whose sampling gives the calibration inputs."""
    calib_bytes: int = 2 << 30
    """Memory for calibration inputs; the sampler runs again where it does not hold all layers."""
    smooth_alpha: float = 0.5
    """How much of the inputs' size pre-scaling moves into the weights, 0 (off) to 1."""
    scale_method: str = "mse"
    """First scales of weights and inputs: mse (shrunk range of least error) or minmax."""
    act_init: str = "step"
    """First scales of inputs: step (each sampling step its own) or pooled (all steps one)."""
    rounding: str = "nearest"
    """nearest, or adaround: learned block by block from the calibration inputs."""
    rounding_steps: int = 20_000
    """Steps of learned rounding for each block."""
    cache_temb: bool = False
    """Replace the embedding of the timestep by a table of its values at the sampling steps."""
    omq_scale_method: str | None = None
    """Scales within the search for bits; by default `scale_method`."""
    omq_acts: bool = True
    """Quantize the inputs within the search for bits."""

    trajectories: int = 800
    """Trajectories of fine-tuning, each of all sampling steps; 0 for none."""
    rank: int = 32
    """Largest rank of the change of a weight."""
    lora_init: str = "zero"
    """zero, or svd-residual: start from what rounding loses."""
    lora_lr: float = 1 / 2500
    """Learning rate of LoRA, in multiples of the layer's mean scale."""
    weight_lr: float = 1e-6
    """Learning rate of the weights' scales and zero points."""
    act_lr: float = 5e-4
    """Learning rate of the inputs' scales (relative) and zero points."""
    scale_decay: float = 0.0
    """Weight decay of scales and zero points."""
    lora_decay: float = 0.01
    """Weight decay of LoRA."""
    save_every: int = 10
    """Trajectories between two checkpoints of fine-tuning."""

    trd_weight: float = 100.0
    """Factor of the relation loss; 0 for none."""
    trd_window: int = 2
    """Sampling steps whose features are averaged."""
    trd_tau: float = 1.0
    """Temperature of the relations."""
    trd_grad: str = "last"
    """last (the current step's feature has a gradient), or none (the published program)."""
    trd_rows: int | None = None
    """Positions drawn for the relation loss; by default all, in blocks."""

    def __post_init__(self) -> None:
        # not super(): a dataclass with slots is made anew, and super() would still name the old one
        for item in fields(self):
            _require_type(item.name, item.type, getattr(self, item.name))
        MixConfig.__post_init__(self)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(str(value) for value in allowed)
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected {expected}")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name} is {value}, expected {least} to {most}")


def _require_type(name: str, kind: Any, value: Any) -> None:
    """Refuse text for numbers, fractions for counts and the like, as `--set` may bring them."""
    allowed = {float: (float, int), int: (int,), bool: (bool,), str: (str,)}
    kinds = [part for part in (get_args(kind) or (kind,)) if part is not type(None)]
    if value is None and type(None) in get_args(kind):
        return
    fits = any(isinstance(value, allowed[part]) for part in kinds)
    if not fits or (isinstance(value, bool) and bool not in kinds) or value != value:
        expected = " or ".join(part.__name__ for part in kinds)
        raise ConfigError(f"{name} is {value!r}, expected {expected}")


_CHOICES: dict[str, tuple[Any, ...]] = {
    "scale_method": ("mse", "minmax"),
    "omq_scale_method": (None, "mse", "minmax"),
    "act_init": ("step", "pooled"),
    "rounding": ("nearest", "adaround"),
    "lora_init": ("zero", "svd-residual"),
    "trd_grad": ("last", "none"),
}
_RANGES: dict[str, tuple[float, float]] = {
    "act_bits": (1, 8),
    "steps": (1, 10_000),
    "eta": (0, 1),
    "guidance": (0, 1000),
    "batch_size": (1, 1 << 20),
    "seed": (0, 2**63 - 1),
    "calib_samples": (1, 1 << 30),
    "calib_bytes": (1, 1 << 50),
    "smooth_alpha": (0, 1),
    "rounding_steps": (1, 1 << 40),
    "trajectories": (0, 1 << 40),
    "rank": (1, 1 << 16),
    "lora_lr": (0, 1e6),
    "weight_lr": (0, 1e6),
    "act_lr": (0, 1e6),
    "scale_decay": (0, 1e6),
    "lora_decay": (0, 1e6),
    "save_every": (1, 1 << 40),
    "trd_weight": (0, 1e12),
    "trd_window": (1, 10_000),
    "trd_tau": (1e-6, 1e6),
    "trd_rows": (1, 1 << 40),
}

_PTQ = {"allocation": "uniform", "trajectories": 0, "trd_weight": 0.0}
_ROUNDING = _PTQ | {"act_init": "pooled"}
METHODS: dict[str, dict[str, Any]] = {
    "rtn-minmax": _ROUNDING | {"scale_method": "minmax", "smooth_alpha": 0.0},
    "rtn-mse": _ROUNDING | {"smooth_alpha": 0.0},
    "smooth-mse": _ROUNDING,
    "stepwise-mse": _PTQ,
    "adaround": _PTQ | {"rounding": "adaround"},
    "hawq": _PTQ | {"allocation": "hawq"},
    "ptqd": _PTQ,
    "tfmq": _PTQ | {"cache_temb": True},
    "efficientdm": {"allocation": "uniform", "trd_weight": 0.0},
    "efficientdm-omq": {"trd_weight": 0.0},
    "mpq-dm": {},
    "mpq-dm-exact": {"allocation": "exact"},
    "mpq-dm-official": {
        "omq_range": "official", "omq_scale_method": "minmax", "omq_acts": False,
        "act_init": "pooled", "scale_decay": 0.01, "trd_grad": "none", "skip_bits": 32,
    },
}  # fmt: skip
"""What a method sets beside the defaults: the paper's baselines, its own, and its program's."""

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet-ldm4": {"steps": 20, "guidance": 3.0, "trajectories": 800, "calib_samples": 32},
    "lsun-bedrooms-ldm4": {
        "steps": 100, "eta": 1.0, "trajectories": 320, "calib_samples": 256,
    },
}  # fmt: skip
"""The published settings by model."""


def method_config(method: str, *, preset: str | None = None, **settings: Any) -> MPQDMConfig:
    """Return the settings of a method; `settings` go before what preset and method set.

    Raises:
        ConfigError: no such method, preset or setting, or a value out of its range.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"preset is {preset!r}, expected {', '.join(PRESETS)}")
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, expected {', '.join(METHODS)}")
    known = {item.name for item in fields(MPQDMConfig)}
    for name in settings:
        if name not in known:
            raise ConfigError(f"no setting {name!r}, expected one of {', '.join(sorted(known))}")
    published: dict[str, Any] = {} if preset is None else PRESETS[preset]
    return MPQDMConfig(**published | METHODS[method] | settings)


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Return settings written as `name=value`; values are JSON, or else text.

    Raises:
        ConfigError: a pair has no name or no value.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not name or not sign or not text:
            raise ConfigError(f"--set {pair}: expected name=value")
        try:
            found[name.replace("-", "_")] = json.loads(text)
        except ValueError:
            found[name.replace("-", "_")] = text
    return found
