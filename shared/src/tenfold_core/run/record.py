# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: one JSON record.

It holds no host name and no home path, so it can be committed.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tenfold_core.device import hardware
from tenfold_core.errors import InputError
from tenfold_core.run.atomic import atomic_path
from tenfold_core.run.rows import plain, without_home

__all__ = ["SCHEMA", "RunRecord", "validate"]

SCHEMA = "tenfold.run/1"
_STATUS = ("running", "done", "failed", "interrupted")
_BETTER = ("lower", "higher", None)
_LIBRARIES = ("tenfold-core", "numpy", "scipy", "numba", "torch", "cupy-cuda12x", "cupy-cuda13x")
_FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (str,), "package": (str,), "version": (str,), "command": (list,), "config": (dict,),
    "seed": (int, type(None)), "git": (dict,), "versions": (dict,), "device": (dict,),
    "started": (str,), "seconds": (float, int), "status": (str,), "error": (str, type(None)),
    "metrics": (dict,), "artefacts": (list,), "notes": (list,),
}  # fmt: skip


class RunRecord:
    """One run, from its command to its numbers; a context manager that always writes ``run.json``.

    An exception inside the block is recorded with its text, then raised again.

    Example:
        >>> import tempfile
        >>> with RunRecord(tempfile.mkdtemp(), package="numpy", command=["demo"]) as run:
        ...     run.metric("time", 0.5, unit="s", better="lower")
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        package: str,
        command: Sequence[str],
        config: Any = None,
        seed: int | None = None,
        device: str = "cpu",
    ) -> None:
        """Begin a run whose files go to ``folder``, which is created.

        Args:
            folder: Where ``run.json`` is written.
            package: Distribution that runs, asked for its version and its commit.
            command: The command line, program first.
            config: A dataclass or a mapping, stored as plain values.
            seed: The seed of all streams, if the run has any.
            device: Where it computes, as :func:`tenfold_core.device.resolve` names it.
        """
        self.folder = Path(folder)
        self._clock = time.perf_counter()
        self._fields: dict[str, Any] = {
            "schema": SCHEMA,
            "package": package,
            "version": _version(package) or "0+unknown",
            "command": [str(part) for part in command],
            "config": {} if config is None else plain(config),
            "seed": seed,
            "git": _commit(package),
            "versions": _versions(package),
            "device": {"name": device, **hardware()},
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "status": "running",
            "error": None,
            "metrics": {},
            "artefacts": [],
            "notes": [],
        }

    def metric(
        self,
        name: str,
        value: float | None,
        *,
        unit: str,
        better: Literal["lower", "higher"] | None = None,
    ) -> None:
        """Set a number with its unit and the direction that is an improvement.

        A value that is not finite is stored as null.
        """
        self._fields["metrics"][name] = {"value": plain(value), "unit": unit, "better": better}

    def artefact(self, path: str | os.PathLike[str]) -> None:
        """Add a finished file by its size and SHA-256, named relative to the folder if inside."""
        path = Path(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        inside = path.resolve().is_relative_to(self.folder.resolve())
        shown = path.resolve().relative_to(self.folder.resolve()) if inside else path
        self._fields["artefacts"].append(
            {"path": shown.as_posix(), "sha256": digest, "bytes": path.stat().st_size}
        )

    def note(self, text: str) -> None:
        """Keep a sentence a reader of the numbers needs, such as why a backend was not used."""
        self._fields["notes"].append(text)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as it would be written now."""
        return without_home(plain(self._fields))

    def write(self) -> Path:
        """Write ``run.json`` atomically and return its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "run.json"
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        return path

    def finish(self, error: BaseException | None = None) -> Path:
        """Set the duration and the outcome, and write the record."""
        self._fields["seconds"] = round(time.perf_counter() - self._clock, 6)
        self._fields["status"] = "done"
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            self._fields["status"] = "interrupted" if interrupted else "failed"
            self._fields["error"] = f"{type(error).__name__}: {error}"
        return self.write()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish(error)


def validate(record: Mapping[str, Any]) -> None:
    """Check that a loaded record obeys the schema.

    Raises:
        InputError: It does not; the text names the first wrong field.
    """
    for name, kinds in _FIELDS.items():
        if name not in record:
            raise InputError(f"run record: field {name!r} is missing")
        if not isinstance(record[name], kinds) or isinstance(record[name], bool):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise InputError(f"run record: {name!r} is {record[name]!r}, expected {names}")
    if unknown := sorted(set(record) - set(_FIELDS)):
        raise InputError(f"run record: unknown fields {', '.join(unknown)}")
    if record["schema"] != SCHEMA:
        raise InputError(f"run record: schema is {record['schema']!r}, expected {SCHEMA!r}")
    if record["status"] not in _STATUS:
        raise InputError(f"run record: status is {record['status']!r}, expected one of {_STATUS}")
    if (record["status"] == "failed") != bool(record["error"]) and record[
        "status"
    ] != "interrupted":
        raise InputError("run record: a failed run, and only that, carries an error")
    for name, metric in record["metrics"].items():
        if not isinstance(metric, dict) or set(metric) != {"value", "unit", "better"}:
            raise InputError(f"run record: metric {name!r} needs exactly value, unit and better")
        number = isinstance(metric["value"], int | float) and not isinstance(metric["value"], bool)
        if not (number or metric["value"] is None) or metric["better"] not in _BETTER:
            raise InputError(
                f"run record: metric {name!r} is {metric!r}, not a number or direction"
            )
    for artefact in record["artefacts"]:
        if not isinstance(artefact, dict) or set(artefact) != {"path", "sha256", "bytes"}:
            raise InputError(f"run record: artefact {artefact!r} needs path, sha256 and bytes")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions(package: str) -> dict[str, str]:
    found = {name: _version(name) for name in (package, *_LIBRARIES)}
    installed = {name: version for name, version in found.items() if version}
    return {"python": platform.python_version(), **installed}


def _commit(package: str) -> dict[str, Any]:
    """Return the commit of the package's own source: its checkout's, or the one it came from."""
    module = sys.modules.get(package.replace("-", "_"))
    source = getattr(module, "__file__", None)
    if source:
        # A package in a virtual environment inside someone's checkout is not tracked there.
        tracked = _git(Path(source).parent, "ls-files", "--error-unmatch", Path(source).name)
        commit = _git(Path(source).parent, "rev-parse", "HEAD") if tracked else None
        if commit:
            changes = _git(Path(source).parent, "status", "--porcelain", "--untracked-files=no")
            return {"commit": commit, "dirty": bool(changes)}
    try:
        origin = metadata.distribution(package).read_text("direct_url.json")
        commit = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    except (metadata.PackageNotFoundError, ValueError):
        commit = None
    return {"commit": commit, "dirty": False if commit else None}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
