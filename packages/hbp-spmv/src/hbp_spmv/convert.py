# SPDX-License-Identifier: Apache-2.0
"""From one file to another: matrix files, saved layouts, and matrices made on the spot."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy.sparse import csr_array
from tenfold_core.errors import ConfigError
from tenfold_core.run.atomic import atomic_path

from hbp_spmv.config import BuildConfig
from hbp_spmv.generate import GENERATORS

__all__ = ["convert_file", "make_file", "write_matrix"]

_SIZE = {"delaunay_p1": "points", "rmat": "scale", "transport": "sources"}
"""What `n` means where a generator has no parameter of that name."""
_WRITTEN = (".mtx", ".mtx.gz", ".npz")


def convert_file(
    source: str,
    target: str,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    config: BuildConfig | None = None,
    reading: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Convert `source` to what the name of `target` says, and return what was written.

    Args:
        source: matrix file or .hbp.safetensors.
        target: .hbp.safetensors, .mtx, .mtx.gz or .npz.
        dtype: type of the values, such as float32 or f32; by default the source's own.
        threads: threads that the layout is chosen for.
        config: layout of a .hbp.safetensors.
        reading: settings of `hbp_spmv.read`.

    Raises:
        ConfigError: the suffix of `target` names no format, or `dtype` no type of values.
        InputError: the source cannot be read, or its values do not fit `dtype`.
        CheckpointError: a saved source is damaged.
    """
    from hbp_spmv.building import parse_dtype
    from hbp_spmv.matrix import from_csr
    from hbp_spmv.readers import read
    from hbp_spmv.readers.finish import cast
    from hbp_spmv.storage import load

    values = None if dtype is None else parse_dtype(dtype)
    saved = target.lower().endswith(".safetensors")
    if not saved:
        _require_writable(target)
    if source.lower().endswith(".safetensors"):
        a = cast(source, load(source).to_csr(), values)
    else:
        a = read(source, dtype=values, **(reading or {}))
    facts = {"source": source, "target": target, "shape": a.shape, "nnz": a.nnz}
    if not saved:
        write_matrix(target, a)
        return facts | {"bytes": Path(target).stat().st_size}
    matrix = from_csr(a, config=config, dtype=values, threads=threads)
    matrix.save(target)
    return facts | {"layout": matrix.layout, "bytes": Path(target).stat().st_size} | {
        "bytes_per_nnz": matrix.nbytes / max(a.nnz, 1), "reasons": matrix.reasons,
    }  # fmt: skip


def make_file(name: str, target: str, settings: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Make the matrix of a generator, write it, and return what was written.

    Args:
        name: one of `hbp_spmv.generate.GENERATORS`.
        target: .mtx, .mtx.gz or .npz.
        settings: parameters of the generator; `n` is its size, whatever its own name for that.
        seed: seed of the generators that draw.

    Raises:
        ConfigError: the generator is unknown or does not take a setting.
    """
    if name not in GENERATORS:
        raise ConfigError(f"generate: {name!r} is not known, expected {', '.join(GENERATORS)}")
    _require_writable(target)
    accepted = inspect.signature(GENERATORS[name]).parameters
    arguments = {_SIZE.get(name, key) if key == "n" else key: v for key, v in settings.items()}
    if unknown := sorted(set(arguments) - set(accepted)):
        takes = ", ".join(key for key in accepted if key not in ("permute", "probabilities"))
        raise ConfigError(f"generate {name}: does not take {unknown[0]!r}, expected {takes}")
    if "seed" in accepted:
        arguments["seed"] = seed
    a = GENERATORS[name](**arguments)
    comment = f" {name} {' '.join(f'{key}={value}' for key, value in arguments.items())}".rstrip()
    write_matrix(target, a, comment=comment)
    return {"target": target, "shape": a.shape, "nnz": a.nnz, "bytes": Path(target).stat().st_size}


def write_matrix(target: str, a: csr_array, *, comment: str = "") -> None:
    """Write a matrix as .mtx, .mtx.gz or .npz, atomically."""
    if target.lower().endswith(".npz"):
        from scipy.sparse import save_npz

        with atomic_path(target) as temporary, temporary.open("wb") as file:
            save_npz(file, a)
        return
    from tenfold_core.sparse import write_matrix_market

    write_matrix_market(target, a, comment=comment)


def _require_writable(target: str) -> None:
    if not target.lower().endswith(_WRITTEN):
        raise ConfigError(f"{target}: expected a name in .hbp.safetensors, {', '.join(_WRITTEN)}")
    if not Path(target).absolute().parent.is_dir():
        raise ConfigError(f"{target}: the folder does not exist; create it first")
