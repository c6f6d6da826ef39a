# SPDX-License-Identifier: Apache-2.0
"""Numbers from text in blocks of whole lines: NumPy parses, Python only looks for the fault."""

import gzip
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hbp_spmv.errors import ReadError

__all__ = [
    "DAMAGED",
    "EXACT",
    "Block",
    "Words",
    "blocks",
    "is_number",
    "leading_lines",
    "open_bytes",
    "parse",
    "shorten",
]

DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)
_BLOCK_BYTES = 1 << 22
_READ_BYTES = 1 << 16
_INTEGER = re.compile(rb"[+-]?\d+")
_NUMBER = re.compile(rb"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf(inity)?|nan)", re.IGNORECASE)
_COMMENTS = {mark: re.compile(rb"(?m)^[ \t]*[" + mark + rb"][^\n]*") for mark in (b"#%", b"%")}
EXACT = 2**53
"""Integers beyond it have no exact float64."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some whole lines of a file; ``first_line`` is the number of the first, from 1."""

    path: Path
    first_line: int
    text: bytes

    def fault(self, line: int, problem: str) -> ReadError:
        """Return the error for a line of this block, counted from 0."""
        return ReadError(f"{self.path}:{self.first_line + line}: {problem}")

    def line(self, line: int) -> bytes:
        """Return the text of a line of this block, counted from 0."""
        return self.text.split(b"\n", line + 1)[line]


@dataclass(frozen=True, slots=True)
class Words:
    """The numbers of a block in reading order, int64 if all are integers, and their lines."""

    values: npt.NDArray[np.int64] | npt.NDArray[np.float64]
    lines: npt.NDArray[np.int64]
    num_lines: int

    def per_line(self) -> npt.NDArray[np.int64]:
        """Count the numbers of each line."""
        return np.bincount(self.lines, minlength=self.num_lines)


def open_bytes(path: Path) -> gzip.GzipFile | BufferedReader:
    """Open a plain or gzip-compressed file, recognised by its first bytes."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.GzipFile(path, mode="rb") if packed else path.open("rb")


def blocks(path: Path, limit: int) -> Iterator[Block]:
    """Cut a file into blocks of whole lines, adding the last newline if it is missing.

    Raises:
        ReadError: The compressed data are damaged, or one line alone is longer than ``limit``.
    """
    rest, number = b"", 1
    with open_bytes(path) as file:
        while True:
            fresh, damage = _some_bytes(file)
            head, newline, tail = fresh.rpartition(b"\n")
            if newline:
                text = rest + head + newline
                if damage is None:
                    yield Block(path, number, text)
                number += text.count(b"\n")
                rest = tail
            else:
                rest += fresh
            if damage is not None:
                raise ReadError(
                    f"{path}: the compressed data end early or are damaged in line {number} "
                    f"({damage}); fetch the file again"
                ) from damage
            if not fresh:
                break
            if len(rest) > limit:
                raise ReadError(
                    f"{path}:{number}: a line longer than {limit / 1e9:.3g} GB, expected numbers "
                    "in lines; the file is of another kind"
                )
    if rest:
        yield Block(path, number, rest + b"\n")


def _some_bytes(file: gzip.GzipFile | BufferedReader) -> tuple[bytes, Exception | None]:
    """Read a block's worth of bytes, and what is readable in front of any damage."""
    parts, size = [], 0
    try:
        while size < _BLOCK_BYTES and (part := file.read1(_READ_BYTES)):
            parts.append(part)
            size += len(part)
    except DAMAGED as error:
        return b"".join(parts), error
    return b"".join(parts), None


def parse(block: Block, *, comments: bytes, commas: bool = False) -> Words:
    """Parse all words of a block as numbers; lines that begin with a comment mark are empty.

    Raises:
        ReadError: A word is not a number, or is an integer that float64 does not hold.
    """
    text = block.text.translate(bytes.maketrans(b",", b" ")) if commas else block.text
    if any(mark in text for mark in (comments[i : i + 1] for i in range(len(comments)))):
        text = _COMMENTS[comments].sub(b"", text)
    letters = np.frombuffer(text, np.uint8)
    in_word = letters > 32
    starts = np.flatnonzero(in_word[1:] > in_word[:-1]) + 1
    if in_word[0]:
        starts = np.concatenate([[0], starts])
    line_ends = np.flatnonzero(letters == 10)
    lines = np.searchsorted(line_ends, starts)
    values = _values(text, len(starts))
    if values is None:
        raise _not_a_number(block, text)
    return Words(values, lines, len(line_ends))


def _values(text: bytes, count: int) -> npt.NDArray | None:
    """Return the ``count`` numbers in ``text``, or None if a word is none or is not exact."""
    if not count:
        return np.empty(0, dtype=np.int64)
    for kind in (np.int64, np.float64):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # older NumPy warns and returns what it could read
            try:
                values = np.fromstring(text, dtype=kind, sep=" ")
            except (ValueError, DeprecationWarning):
                continue
        if len(values) == count:
            large = np.abs(values) >= EXACT
            exact = not large.any() or (kind is np.float64 and not _has_long_integer(text))
            return values if exact else None
    return None


def _has_long_integer(text: bytes) -> bool:
    return any(_beyond(word) for word in text.split())


def _beyond(word: bytes) -> bool:
    return bool(_INTEGER.fullmatch(word)) and (len(word) > 25 or abs(int(word)) > EXACT)


def _not_a_number(block: Block, text: bytes) -> ReadError:
    """Find the first word that :func:`_values` did not accept."""
    for line, words in enumerate(text.split(b"\n")):
        for word in words.split():
            if not is_number(word):
                return block.fault(line, f"found {shorten(word)}, expected a number")
            if _beyond(word):
                return block.fault(
                    line,
                    f"integer {shorten(word)} is beyond 2**53 and has no exact float64; "
                    "write it as a decimal number to accept rounding",
                )
    return block.fault(0, "numbers that cannot be told apart; the file is damaged")


def leading_lines(path: Path, marks: bytes, limit: int = 2000) -> str:
    """Return the lines at the start of a file that begin with one of ``marks``."""
    kept = b""
    with open_bytes(path) as file:
        while len(kept) < limit and (line := file.readline(limit))[:1] and line[:1] in marks:
            kept += line
    return kept.decode("latin-1").rstrip()


def is_number(word: bytes) -> bool:
    """Tell whether a word is a decimal number."""
    return _NUMBER.fullmatch(word) is not None


def shorten(word: bytes) -> str:
    """Quote a word for an error text, at most 40 characters of it."""
    return repr(word[:40].decode("latin-1"))
