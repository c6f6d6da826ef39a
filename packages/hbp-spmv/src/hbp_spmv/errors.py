# SPDX-License-Identifier: Apache-2.0
"""Errors of this package beyond those of :mod:`tenfold_core.errors`."""

from typing import ClassVar

from tenfold_core.errors import InputError, TenfoldError

__all__ = ["ReadError", "VerificationError"]


class ReadError(InputError):
    """A matrix could not be read: *path[:line]: found, expected; remedy*.

    The text may quote names found in a file, so whatever would not print in one line is masked.
    """

    def __init__(self, text: str) -> None:
        super().__init__("".join(mark if mark.isprintable() else "?" for mark in text))


class VerificationError(TenfoldError):
    """A product left its error bound; the text names the row, both values and the bound."""

    exit_code: ClassVar[int] = 1
