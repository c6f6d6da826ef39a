# SPDX-License-Identifier: Apache-2.0
"""Values as JSON holds them, and rows of them that survive an interruption."""

import dataclasses
import enum
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tenfold_core.errors import InputError

__all__ = ["JsonlStream", "plain", "read_jsonl", "without_home"]


class JsonlStream:
    """Append rows to a JSON-lines file; each is on the disk when :meth:`append` returns."""

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        """Open a new file, or with ``resume`` an older one after cutting off a half-written row."""
        path = Path(path)
        if resume and path.exists():
            whole = path.read_bytes().rpartition(b"\n")
            os.truncate(path, len(whole[0]) + len(whole[1]))
        self._file = path.open("ab" if resume else "wb")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, flush it and wait for the disk."""
        text = json.dumps(without_home(plain(row)), ensure_ascii=False, allow_nan=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the whole rows of a JSON-lines file; a last line without its end is left out.

    Raises:
        InputError: A line that is not the unfinished last one cannot be read.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}:{number}: found {line[:40]!r}, expected a JSON object; "
                "the file was edited or is not a result file"
            )
        rows.append(row)
    return rows


def plain(value: Any) -> Any:
    """Turn a value into what JSON holds: dataclasses, enums, paths and arrays included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):  # a bool is an int
        return value
    if isinstance(value, set | frozenset):
        return sorted(plain(part) for part in value)
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "tolist"):  # a NumPy scalar or array
        return plain(value.tolist())
    return str(value)


def without_home(value: Any) -> Any:
    """Replace the path of the user's home in every text by ``~``."""
    home = str(Path.home())
    if len(home) < 2:
        return value
    pattern = re.compile(re.escape(home) + r"(?![\w.-])")

    def clean(part: Any) -> Any:
        if isinstance(part, str):
            return pattern.sub("~", part)
        if isinstance(part, dict):
            return {clean(key): clean(entry) for key, entry in part.items()}
        return [clean(entry) for entry in part] if isinstance(part, list) else part

    return clean(value)
