# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are either whole or absent, whatever interrupts their writing."""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tenfold_core.errors import InputError

__all__ = ["atomic_directory", "atomic_path"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds.

    The file is flushed to the disk before the rename; an exception removes it and leaves an older
    ``path`` as it was. A symbolic link keeps pointing where it did, and a device such as
    ``/dev/null`` is written directly instead of being replaced.

    Raises:
        InputError: ``path`` is a folder, or its folder does not exist.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise InputError(f"{path}: is a folder, expected a file name; add one")
    if not target.parent.is_dir():
        raise InputError(f"{path}: the folder {target.parent} does not exist; create it first")
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        yield target
        return
    # The suffix stays last: several writers choose the format by it.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}.tmp{target.suffix}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its place when the block succeeds.

    With ``overwrite`` the older folder is moved aside, replaced and then removed; an interruption
    between the two renames leaves it under its temporary name, never half-written.

    Raises:
        InputError: ``path`` exists and ``overwrite`` is false, or its parent does not exist.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not overwrite:
        raise InputError(f"{path}: exists already; choose another folder or ask to overwrite it")
    if not target.parent.is_dir():
        raise InputError(f"{path}: the folder {target.parent} does not exist; create it first")
    token = secrets.token_hex(6)
    temporary = target.with_name(f".{target.name}.{token}.tmp")
    old = target.with_name(f".{target.name}.{token}.old")
    temporary.mkdir()
    try:
        yield temporary
        for entry in sorted(temporary.rglob("*"), reverse=True):
            _sync(entry)
        _sync(temporary)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; folders cannot be opened on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
