# SPDX-License-Identifier: Apache-2.0
"""The settings of a mixture of bits, shared by API, command line and records."""

from dataclasses import dataclass

from tenfold_core.errors import ConfigError

__all__ = ["ALLOCATIONS", "MixConfig"]

ALLOCATIONS = ("uniform", "kurtosis", "exact", "exact-layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixConfig:
    """How many bits the rows of the body get; `PAPER` holds the published settings."""

    weight_bits: int = 2
    """N, the average bits of a weight in the body of the network."""
    allocation: str = "kurtosis"
    """uniform, kurtosis (the paper), exact (per layer) or exact-layers (one budget for all)."""
    omq_range: str = "paper"
    """Groups that may move: paper (all), or official (the published program: at most one)."""
    plus: float = 0.0
    """Part of the rows, those of largest kurtosis, that get one more bit for nothing."""
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
        for name, allowed in (("skip_bits", (8, 16, 32)), ("edge_bits", (8, 16, 32))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 8, 16 or 32")

    @property
    def choices(self) -> tuple[int, ...]:
        """Bits that a row of the body may have, the raise by `plus` aside."""
        if self.allocation == "uniform" or self.weight_bits == 8:
            return (self.weight_bits,)
        return (self.weight_bits - 1, self.weight_bits, self.weight_bits + 1)


PAPER = MixConfig()
"""Kurtosis, the full range of groups, 2 bits."""
