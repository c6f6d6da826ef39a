# SPDX-License-Identifier: Apache-2.0
"""What a config file says of one packed layer; stdlib only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenfold_core.errors import InputError

__all__ = ["HALF", "LayerEntry"]

HALF = 16
"""Bits of a weight kept in half precision."""
_KEYS = ("role", "act_bits", "groups", "smooth")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEntry:
    """The description from which, with the replaced module, all shapes follow.

    Raises:
        InputError: the values contradict each other.
    """

    role: str
    """The layer's place in the model."""
    act_bits: int
    """Width of the input's codes; 16 where it has none, as has a weight of 16 bits."""
    groups: tuple[tuple[int, int], ...]
    """Pairs of a width and how many rows have it, in storage order."""
    smooth: bool
    """Whether input channels have a divisor."""

    def __post_init__(self) -> None:
        if not isinstance(self.role, str) or not isinstance(self.smooth, bool):
            raise InputError(
                f"role and smooth: found {self.role!r} and {self.smooth!r}, expected text and "
                "true or false"
            )
        if type(self.act_bits) is not int or self.act_bits not in (*range(1, 9), HALF):
            raise InputError(f"act_bits: found {self.act_bits!r}, expected 1 to 8, or {HALF}")
        if not self.groups or not all(_is_pair(pair) for pair in self.groups):
            raise InputError(
                f"groups: found {str(self.groups)[:60]}, expected pairs of bits (1 to 8, or one "
                f"pair of {HALF}) and rows (1 or more)"
            )
        widths = [bits for bits, _ in self.groups]
        halves = HALF in widths
        if halves != (self.act_bits == HALF) or (halves and (self.smooth or len(widths) > 1)):
            raise InputError(
                f"groups {str(self.groups)[:60]} with act_bits {self.act_bits} and smooth "
                f"{self.smooth}: a weight of {HALF} bits has one group, act_bits {HALF} and no "
                "smooth, any other act_bits 1 to 8"
            )

    @property
    def is_half(self) -> bool:
        """Whether the weight is in half precision, without codes."""
        return self.act_bits == HALF

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "LayerEntry":
        """Read what `to_dict` gave.

        Raises:
            InputError: a key is unknown or missing, or a value is not allowed.
        """
        if set(entry) != set(_KEYS):
            raise InputError(f"found {', '.join(entry) or 'nothing'}, expected {', '.join(_KEYS)}")
        groups = entry["groups"]
        if not isinstance(groups, (list, tuple)):
            raise InputError(f"groups: found {str(groups)[:60]}, expected a list of pairs")
        pairs = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in groups)
        settings: dict[str, Any] = {**entry, "groups": pairs}
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the description in JSON types."""
        return {
            "role": self.role,
            "act_bits": self.act_bits,
            "groups": [list(pair) for pair in self.groups],
            "smooth": self.smooth,
        }


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, tuple)
        and len(pair) == 2
        and all(type(number) is int for number in pair)
        and pair[0] in (*range(1, 9), HALF)
        and pair[1] > 0
    )
