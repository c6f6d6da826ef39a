# SPDX-License-Identifier: Apache-2.0
"""Banner and size line of a Matrix Market file, read and checked on their own."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from tenfold_core.errors import InputError

__all__ = ["DAMAGED", "INTEGERS", "Header", "open_text", "scan_header"]

DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)
INTEGERS = ("integer", "unsigned-integer", "pattern")

_HEADER_LIMIT = 1 << 24  # bytes of comments before the size line
_GZIP_RATIO = 1032  # the most deflate can reach
_FIELDS = ("real", "double", "integer", "unsigned-integer", "complex", "pattern")
_SYMMETRIES = ("general", "symmetric", "skew-symmetric", "hermitian")
_NUMBERS = {"pattern": 0, "complex": 2}  # values per entry; every other field has one


@dataclass(frozen=True, slots=True)
class Header:
    """What the banner and the size line say, and where the entries begin."""

    layout: str
    field: str
    symmetry: str
    rows: int
    columns: int
    entries: int
    lines: int
    offset: int
    body_limit: int

    @property
    def tokens(self) -> int:
        """Words per entry."""
        return _NUMBERS.get(self.field, 1) + (2 if self.layout == "coordinate" else 0)

    @property
    def text(self) -> str:
        """The header in the one spelling that every reader accepts, two lines."""
        banner = f"%%MatrixMarket matrix {self.layout} {self.field} {self.symmetry}\n"
        if self.layout == "array":
            return f"{banner}{self.rows} {self.columns}\n"
        return f"{banner}{self.rows} {self.columns} {self.entries}\n"


def open_text(path: Path) -> BufferedReader | gzip.GzipFile:
    """Open a plain or gzip-compressed file, recognised by its first bytes."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.GzipFile(path, "rb") if packed else path.open("rb")


def scan_header(path: Path, *, banner: bool) -> Header:
    """Read and check the banner and the size line, allocating nothing they ask for.

    Raises:
        InputError: The header is missing or contradicts itself.
    """
    with open_text(path) as file:
        kind: tuple[str, str, str] | None = None
        number, size = 0, 0
        while line := file.readline(_HEADER_LIMIT - size):
            number, size = number + 1, size + len(line)
            text = line.decode("latin-1").strip()
            if number == 1 and text.lower().startswith(("%%matrixmarket", "%matrixmarket")):
                kind = _banner(path, text)
            elif number == 1 and banner:
                raise InputError(
                    f"{path}:1: found {text[:40]!r}, expected a '%%MatrixMarket' banner; use "
                    "--no-banner if the file starts with its size line, --edgelist if with edges"
                )
            elif text and not text.startswith("%"):
                if kind is None:
                    kind = ("coordinate", _guess_field(file), "general")
                counts = _size_line(path, number, text, kind)
                packed = isinstance(file, gzip.GzipFile)
                limit = path.stat().st_size * (_GZIP_RATIO if packed else 1) - size
                return Header(*kind, *counts, number, size, max(limit, 0))
    raise InputError(
        f"{path}: no size line in the first {number} lines, expected 'rows columns entries'; "
        "the file is truncated"
    )


def _banner(path: Path, text: str) -> tuple[str, str, str]:
    words = text.lower().split()
    if len(words) != 5:
        raise InputError(
            f"{path}:1: the banner has {len(words)} words, "
            "expected '%%MatrixMarket matrix <format> <field> <symmetry>'"
        )
    legal = (("matrix",), ("coordinate", "array"), _FIELDS, _SYMMETRIES)
    for word, choices in zip(words[1:], legal, strict=True):
        if word not in choices:
            raise InputError(
                f"{path}:1: found {word[:40]!r} in the banner, expected {', '.join(choices)}"
            )
    _, layout, field, symmetry = words[1:]
    if field == "pattern" and layout == "array":
        raise InputError(f"{path}:1: an 'array' cannot be 'pattern'; use 'coordinate'")
    if symmetry == "hermitian" and field != "complex":
        raise InputError(f"{path}:1: 'hermitian' needs 'complex', found {field!r}")
    return layout, "real" if field == "double" else field, symmetry


def _size_line(
    path: Path, number: int, text: str, kind: tuple[str, str, str]
) -> tuple[int, int, int]:
    layout, _, symmetry = kind
    expected = "rows columns entries" if layout == "coordinate" else "rows columns"
    words = text.split()
    if len(words) != len(expected.split()) or not all(
        word.isascii() and word.isdigit() and len(word) < 19 for word in words
    ):
        raise InputError(
            f"{path}:{number}: the size line is {text[:60]!r}, "
            f"expected '{expected}' as counts below 10**18"
        )
    rows, columns, *rest = map(int, words)
    if symmetry != "general" and rows != columns:
        raise InputError(
            f"{path}:{number}: a {symmetry} matrix of {rows} x {columns}, expected a square one; "
            "the banner or the size line is wrong"
        )
    if rest:
        entries = rest[0]
    elif symmetry == "general":
        entries = rows * columns
    else:
        entries = rows * (rows - 1 if symmetry == "skew-symmetric" else rows + 1) // 2
    if entries and not rows * columns:
        raise InputError(
            f"{path}:{number}: {entries} entries in a matrix of {rows} x {columns}; "
            "the size line is wrong"
        )
    return rows, columns, entries


def _guess_field(file: BufferedReader | gzip.GzipFile) -> str:
    """Choose the field by the first entry after the size line of a file without a banner."""
    lines: Iterator[bytes] = iter(lambda: file.readline(1 << 16), b"")
    words = next((line.split() for line in lines if line.strip()), [])
    return {2: "pattern", 4: "complex"}.get(len(words), "real")
