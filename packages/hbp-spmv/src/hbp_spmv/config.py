# SPDX-License-Identifier: Apache-2.0
"""How a matrix is laid out: the settings that API, command line and records share."""

from dataclasses import dataclass

from tenfold_core.errors import ConfigError

__all__ = ["LAYOUTS", "PAPER", "PAPER_HASH", "BuildConfig", "HashParams"]

LAYOUTS = ("auto", "compact", "paper", "csr")
_HASHES = ("lut", "paper", "tuned", "sort", "none")
_LANES = (4, 8, 16, 32)


def _one_of(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        names = ", ".join(str(item) for item in allowed)
        raise ConfigError(f"{name}: expected one of {names}, got {value!r}")


def _in_range(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name}: expected an int in {low}..{high}, got {value!r}")


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
        for name in ("k0", "s", "t", "u"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value <= 31:
                raise ConfigError(
                    f"hash parameter {name!r}: expected an int in 0..31, got {value!r}"
                )


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
        for name in ("k0", "s", "t", "u"):
            _in_range(name, getattr(self, name), 0, 31)
        _in_range("height", self.height, 1, 1 << 20)
        _in_range("width", self.width, 1, 1 << 31)
        if self.sigma is not None:
            _in_range("sigma", self.sigma, 1, 1 << 31)
        if self.strips is not None:
            _in_range("strips", self.strips, 1, 1 << 31)
        if self.lanes is not None and self.layout != "paper":
            _one_of("lanes", self.lanes, _LANES)
        if self.lanes is not None:
            _in_range("lanes", self.lanes, 1, 1024)

    @property
    def fixed_share(self) -> float:
        """Share of the work that is allocated in advance."""
        return {"mixed": 0.8, "fixed": 1.0, "ticket": 0.0}[self.schedule]


PAPER = BuildConfig(layout="paper", hash="paper")
"""The published settings: blocks of 512 x 4096, warps of 32, (k0, s, t, u) = (0, 4, 8, 0)."""
