# SPDX-License-Identifier: Apache-2.0
"""Which matrices a benchmark runs on: files, folders, a suite, or the generated ones."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scipy.sparse import csr_array
from tenfold_core.errors import ConfigError, InputError

from hbp_spmv.generate import DEMO, GENERATORS, SUITE_SUFFIXES, suite_paths

__all__ = ["SUITE_VARIABLE", "Source", "matrix_sources"]

SUITE_VARIABLE = "HBP_MATRICES"
"""Environment variable with the folder that `@suite` stands for."""


@dataclass(frozen=True, slots=True)
class Source:
    """A matrix that is read or made when its turn comes."""

    name: str
    load: Callable[[], csr_array]
    identity: str
    """What a resumed run must find unchanged: generator and seed, or file name, size, settings."""

    def loaded(self) -> "Source":
        """Return the source with its matrix read or made now."""
        a = self.load()
        return Source(self.name, lambda: a, self.identity)


def matrix_sources(
    inputs: Sequence[str], *, suite: str | None = None, seed: int = 0, **reading: Any
) -> list[Source]:
    """List the matrices that `inputs` name, without reading any.

    Args:
        inputs: files, folders of files, `@suite`, and `@demo` for what the extra of that name
            brings (see `hbp_spmv.gallery`); nothing at all means the generated ones.
        suite: the folder that `@suite` stands for, by default that of the variable HBP_MATRICES;
            given alone it is the input.
        seed: seed of the generated matrices.
        reading: settings of `hbp_spmv.read`.

    Raises:
        InputError: a file or folder does not exist, or holds no matrix.
        ConfigError: `@suite` is used and nothing says where it is.
        MissingExtraError: `@demo` is used and the extra is not installed.
    """
    names = list(inputs) or (["@suite"] if suite else [])
    if not names:
        return [Source(name, partial(_generated, name, seed), f"{name} {seed}") for name in DEMO]
    files = [name for name in names if name != "@demo"]
    paths = list(dict.fromkeys(path for name in files for path in _paths(name, suite)))
    short = [_stem(path) for path in paths]
    found = [
        _file(path, stem if short.count(stem) == 1 else path.as_posix(), reading)
        for path, stem in zip(paths, short, strict=True)
    ]
    return found + _gallery() if len(files) < len(names) else found


def _gallery() -> list[Source]:
    from hbp_spmv.gallery import GALLERY, load_gallery, require_gallery

    require_gallery()
    return [Source(name, partial(load_gallery, name), f"@demo {name}") for name in GALLERY]


def _paths(name: str, suite: str | None) -> list[Path]:
    if name == "@suite":
        folder = suite or os.environ.get(SUITE_VARIABLE)
        if not folder:
            raise ConfigError(
                f"@suite: found no folder; give --suite DIR or set the variable {SUITE_VARIABLE}"
            )
        return suite_paths(folder)
    path = Path(name)
    if path.is_dir():
        return suite_paths(path)
    if not path.exists() and not name.rpartition(":")[0].lower().endswith(".mat"):
        raise InputError(f"{name}: no such file or folder, expected a matrix file")
    return [path]


def _generated(name: str, seed: int) -> csr_array:
    make = GENERATORS[name]
    return make(seed=seed) if "seed" in inspect.signature(make).parameters else make()


def _file(path: Path, name: str, reading: Mapping[str, Any]) -> Source:
    def load() -> csr_array:
        from hbp_spmv.readers import read

        return read(path, **reading)

    size = path.stat().st_size if path.exists() else 0
    return Source(name, load, f"{path.name} {size} {sorted(reading.items())}")


def _stem(path: Path) -> str:
    lower = path.name.lower()
    suffix = next((s for s in SUITE_SUFFIXES if lower.endswith(s)), path.suffix)
    return path.name[: len(path.name) - len(suffix)] or path.name
