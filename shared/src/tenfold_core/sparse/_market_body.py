# SPDX-License-Identifier: Apache-2.0
"""The entries of a Matrix Market file as a bounded stream, and the line that is wrong.

SciPy's reader stops number parsing at the first character it does not know and drops the rest of
the line: ``1D3`` is read as 1, ``1.5`` under an ``integer`` header as 1, and a value under a
``pattern`` header not at all. The stream here translates Fortran exponents and lets through only
characters and token counts that the header allows, at about 1.5 GB/s.
"""

import re
from itertools import islice
from pathlib import Path

import numpy as np

from tenfold_core.errors import InputError
from tenfold_core.sparse._market_header import DAMAGED, INTEGERS, Header, open_text

__all__ = ["Body", "bad_line", "count_entries"]

_BLOCK = 1 << 18
_ENTRY_LIMIT = 512  # bytes a line may take on average; bounds what a gzip bomb can expand to
_SPACE = b" \t\r\n\v\f"
_FORTRAN = bytes.maketrans(b"dDE", b"eee")  # 1D3 -> 1e3
_MALFORMED = (b"..", b".-", b"--", b"ee", b"e.")  # what is left of 1.5.2 or 1.5-103, digits removed
_REAL = re.compile(r"[+-]?(\d+\.?\d*([ed][+-]?\d+)?|\.\d+([ed][+-]?\d+)?|inf(inity)?|nan)", re.I)
_INTEGER = re.compile(r"[+-]?\d+")


class Body:
    """A readable stream of a normal header and the checked entries of a file."""

    def __init__(self, path: Path, header: Header) -> None:
        self.header = header
        self.found_tokens = 0
        self.suspect_line: int | None = None
        self._file = open_text(path)
        self._file.seek(header.offset)
        self._pending = header.text.encode()
        self._lines = header.lines
        self._left = header.entries * _ENTRY_LIMIT + (1 << 20)
        self._limit = self._left
        self._path = path
        self._in_token = False
        self._last = b"\n"
        whole = header.field in INTEGERS
        self._table = None if whole else _FORTRAN
        self._allowed = _SPACE + (b"-" if whole else b"-.enaiftyENAIFTY")

    def __enter__(self) -> "Body":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, _: int = -1) -> bytes:
        """Return the next block, of a size of our own choice, or nothing at the end.

        Raises:
            InputError: The text is far longer than the header allows.
            ValueError: Text no entry may contain, from ``suspect_line`` on.
        """
        block = self._pending
        self._pending = b""
        while not block:
            raw = self._file.read1(_BLOCK)  # read would drop what a damaged gzip file still has
            if not raw:
                return self._last_newline()
            self._left -= len(raw)
            if self._left < 0:
                raise InputError(
                    f"{self._path}: more than {self._limit} bytes follow the header, "
                    f"expected {self.header.entries} entries; the size line is wrong"
                )
            block = raw.translate(self._table, b"+")
            marks = block.translate(None, b"0123456789")
            if marks.translate(None, self._allowed) or any(bad in marks for bad in _MALFORMED):
                raise self._suspect()
            self._count(block)
            self._lines += raw.count(b"\n")
        return block

    def _last_newline(self) -> bytes:
        """End an unfinished last line: SciPy 1.17 crashes on some, such as ``1e`` or ``.5e3 ``."""
        last, self._last = self._last, b"\n"
        if last in (b"e", b"-"):
            raise self._suspect()
        return b"" if last == b"\n" else b"\n"

    def _suspect(self) -> ValueError:
        self.suspect_line = self._lines + 1
        return ValueError("not a number")

    def _count(self, block: bytes) -> None:
        word = np.frombuffer(block, np.uint8) > 32
        if not word.size:
            return
        self.found_tokens += int(np.count_nonzero(word[1:] > word[:-1]))
        self.found_tokens += int(word[0] and not self._in_token)
        self._in_token = bool(word[-1])
        self._last = block[-1:]


def bad_line(
    path: Path, header: Header, start: int | None = None, *, only: bool = False
) -> InputError | None:
    """Say what is wrong with the first bad line from ``start`` on, or with that line only."""
    start = start or header.lines + 1
    with open_text(path) as file:
        lines = iter(lambda: file.readline(1 << 16), b"")
        for number, raw in enumerate(islice(lines, start - 1, start if only else None), start):
            problem = _problem(header, raw.decode("latin-1"))
            cut = len(raw.split()) < header.tokens or not raw.endswith(b"\n")
            if problem and cut and not raw.startswith(b"%") and not file.read(1 << 20).strip():
                found = min(count_entries(path, header), header.entries - 1)
                problem = (
                    f"the file ends inside an entry: expected {header.entries} entries, "
                    f"found {found}; it is truncated"
                )
            if problem:
                return InputError(f"{path}:{number}: {problem}")
    return None


def count_entries(path: Path, header: Header) -> int:
    """Count the whole entries that can be read, for the text of an error."""
    found = 0
    with Body(path, header) as body:
        body.read()
        try:
            while body.read():
                found = body.found_tokens // max(header.tokens, 1)
        except (ValueError, *DAMAGED):
            pass
    return found


def _problem(header: Header, text: str) -> str | None:
    words = text.split()
    if not words:
        return None
    shown = text.strip()[:60]
    if shown.startswith("%"):
        return f"found the comment {shown!r}, expected an entry; comments go above the size line"
    if len(words) != header.tokens:
        return (
            f"found {len(words)} words in {shown!r}, expected {header.tokens} for "
            f"'{header.layout} {header.field}'"
        )
    if header.layout == "coordinate":
        for name, word, size in zip(
            ("row", "column"), words, (header.rows, header.columns), strict=False
        ):
            if not _INTEGER.fullmatch(word):
                return f"{name} is {word[:40]!r}, expected an integer"
            if not 1 <= int(word[:20]) <= size:
                return (
                    f"{name} {word[:40]} is outside 1..{size}; "
                    "the file is truncated or the size line is wrong"
                )
        words = words[2:]
    for word in words:
        pattern, name = (
            (_INTEGER, "an integer") if header.field in INTEGERS else (_REAL, "a number")
        )
        if not pattern.fullmatch(word):
            return f"value is {word[:40]!r}, expected {name}; the banner says {header.field!r}"
        if header.field in INTEGERS and abs(int(word[:25])) > 2**53:
            return (
                f"integer {word[:40]} is beyond 2**53 and has no exact float64; "
                "change the banner to 'real' to accept rounding"
            )
    return None
