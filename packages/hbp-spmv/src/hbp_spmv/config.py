# SPDX-License-Identifier: Apache-2.0
"""How a matrix is laid out: the settings that API, command line and records share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import index
from typing import Any

from tenfold_core.errors import ConfigError

__all__ = [
    "LAYOUTS",
    "PAPER",
    "PAPER_HASH",
    "SIGMAS",
    "WINDOW_SPAN",
    "BuildConfig",
    "HashParams",
    "as_int",
    "configured",
]

SIGMAS = (512, 2048, 8192)
"""Rows of the reordering windows that are tried."""
WINDOW_SPAN = 1 << 16
"""Columns that a 16-bit offset reaches."""
LAYOUTS = ("auto", "compact", "paper", "csr")
_HASHES = ("lut", "paper", "tuned", "sort", "none")
_LANES = (4, 8, 16, 32)
_HASH_NAMES = ("k0", "s", "t", "u")
_FREE = ("lanes", "sigma", "strips")  # None, or "auto" in a call, leaves them to the build
_RANGES = {
    **dict.fromkeys(_HASH_NAMES, (0, 31)),
    "height": (1, 1 << 20),
    "width": (1, 1 << 31),
    "sigma": (1, 1 << 31),
    "strips": (1, 1 << 31),
    "lanes": (1, 1024),
}


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        names = ", ".join(str(item) for item in allowed)
        raise ConfigError(f"{name}: expected one of {names}, got {value!r}")


def as_int(name: str, value: object, low: int = 1, high: int | None = None) -> int:
    """Return a whole number in a range as an int, whatever type holds it; a bool is none.

    Raises:
        ConfigError: it is not a whole number, or out of range.
    """
    try:
        number = None if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        expected = "a positive int" if high is None else f"an int in {low}..{high}"
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")
    return number


@dataclass(frozen=True, slots=True, kw_only=True)
class HashParams:
    """Parameters of the published hash `a(k) = ((b >> s) << t) + u*b`, `b = max(k - k0, 0)`."""

    k0: int = 0
    """Lengths up to k0 share home slot 0."""
    s: int = 4
    """Right shift: 2**s neighbouring lengths share a home."""
    t: int = 8
    """Left shift: homes lie 2**t slots apart."""
    u: int = 0
    """Linear term."""

    def __post_init__(self) -> None:
        for name in _HASH_NAMES:
            value = as_int(f"hash parameter {name!r}", getattr(self, name), 0, 31)
            object.__setattr__(self, name, value)


PAPER_HASH = HashParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """Settings of one build; the defaults are ours, `PAPER` holds the published ones."""

    layout: str = "auto"
    """auto (see `select`), compact, paper (the six published arrays) or csr (plain row gather)."""
    hash: str = "lut"
    """Row order: lut, paper, tuned, sort or none."""
    k0: int = 0
    """Hash parameter of the published family: lengths up to k0 share a home."""
    s: int = 4
    """Hash parameter of the published family: right shift."""
    t: int = 8
    """Hash parameter of the published family: left shift."""
    u: int = 0
    """Hash parameter of the published family: linear term."""
    height: int = 512
    """Rows of a block, layout paper."""
    width: int = 4096
    """Columns of a block, layout paper."""
    lanes: int | None = None
    """Rows per group; None: 16 for compact, 32 (a warp) for paper."""
    sigma: int | None = None
    """Rows of a reordering window, layout compact; None: 512 to 8192 by lane efficiency."""
    strips: int | None = None
    """Columns of a strip, layout compact; None: no strips."""
    index: str = "auto"
    """Column offsets: auto, u16 or u32."""
    schedule: str = "mixed"
    """mixed (fixed runs and tickets), fixed or ticket."""
    keep_perm: bool = False
    """Keep the permutation of the values, which `update_values` needs."""

    def __post_init__(self) -> None:
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("hash", self.hash, _HASHES)
        _one_of("index", self.index, ("auto", "u16", "u32"))
        _one_of("schedule", self.schedule, ("mixed", "fixed", "ticket"))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in _FREE:
                object.__setattr__(self, name, as_int(name, value, low, high))
        if self.lanes is not None and self.layout != "paper":
            _one_of("lanes", self.lanes, _LANES)

    @property
    def fixed_share(self) -> float:
        """Share of the work that is allocated in advance."""
        return {"mixed": 0.8, "fixed": 1.0, "ticket": 0.0}[self.schedule]


PAPER = BuildConfig(layout="paper", hash="paper")
"""The published settings: blocks of 512 x 4096, warps of 32, (k0, s, t, u) = (0, 4, 8, 0)."""


def configured(
    base: BuildConfig | None,
    settings: Mapping[str, Any],
    *,
    block: tuple[int, int] | None = None,
    hash_params: Mapping[str, int] | None = None,
) -> BuildConfig:
    """Return `base` with what the arguments of a call change; None changes nothing.

    Args:
        base: settings to start from; by default `BuildConfig()`.
        settings: fields by name.
        block: height and width.
        hash_params: `k0`, `s`, `t`, `u`.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    foreign = sorted(set(hash_params or ()) - set(_HASH_NAMES))
    if foreign:
        expected = ", ".join(_HASH_NAMES)
        raise ConfigError(f"hash_params: unknown setting {foreign[0]!r}, expected {expected}")
    named: dict[str, Any] = {**(hash_params or {}), **settings}
    if block is not None:
        named["height"], named["width"] = block
    unknown = sorted(set(named) - set(BuildConfig.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"from_csr: unknown setting {unknown[0]!r}; see BuildConfig")
    changes: dict[str, Any] = {
        name: None if name in _FREE and isinstance(value, str) and value == "auto" else value
        for name, value in named.items()
        if value is not None
    }
    return replace(base or BuildConfig(), **changes)
