# SPDX-License-Identifier: Apache-2.0
"""Errors a Tenfold package raises on purpose, each with the exit code of its command.

The text of an error answers four questions in one line: *where: what was found, what was
expected; what to do*. :func:`tenfold_core.run.cli.main` prints it after the program's name and
exits with ``exit_code``; everything that is not a :class:`TenfoldError` is a bug.
"""

from typing import ClassVar

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DivergedError",
    "InputError",
    "MissingExtraError",
    "TenfoldError",
    "TenfoldWarning",
]


class TenfoldError(Exception):
    """Base of all errors raised on purpose; the run failed (exit code 1)."""

    exit_code: ClassVar[int] = 1


class ConfigError(TenfoldError):
    """A setting or a command line contradicts itself or the data.

    Not a ``ValueError``: the command-line parser would catch that one and print its own text.
    """

    exit_code: ClassVar[int] = 2


class InputError(TenfoldError, ValueError):
    """A file or an array is not what the function documents."""

    exit_code: ClassVar[int] = 2


class MissingExtraError(TenfoldError, ImportError):
    """An optional dependency is needed; the text names the extra that brings it."""

    exit_code: ClassVar[int] = 2


class CheckpointError(TenfoldError):
    """A saved file is truncated, inconsistent or from another run."""

    exit_code: ClassVar[int] = 2


class DivergedError(TenfoldError):
    """A computation produced NaN or left its stated bound."""


class TenfoldWarning(UserWarning):
    """Something the user should know that does not stop the run."""
