# SPDX-License-Identifier: Apache-2.0
"""Compile and launch CUDA kernels through CuPy, the arrays beside them.

A runtime is what the code above needs of a GPU library: an array module `xp`, kernels by source and
macros, the current stream, and memory for a stream. The tests put one in its place that runs the
same kernels on a CPU with NumPy arrays.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from tenfold_core.device import cupy_or_none, resolve
from tenfold_core.errors import MissingExtraError

__all__ = ["CupyRuntime", "Kernel", "Runtime", "cuda_runtime"]

Kernel = Callable[..., None]
"""`kernel(grid, block, args, shared_mem=0)`: grid and block are tuples, args NumPy scalars or
arrays of the runtime; it runs on the current stream."""


class Runtime(Protocol):
    """What the kernels' callers need."""

    @property
    def xp(self) -> Any:
        """The array module: CuPy, or NumPy where kernels are emulated."""
        ...

    @property
    def processors(self) -> int:
        """Multiprocessors of the device."""
        ...

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one block may use."""
        ...

    @property
    def l2_bytes(self) -> int:
        """Second-level cache of the device."""
        ...

    def kernels(
        self, source: Path, names: Sequence[str], macros: Mapping[str, str | int]
    ) -> dict[str, Kernel]:
        """Compile a source file with macros and return its kernels by name."""
        ...

    def stream(self) -> int:
        """Return a number that tells streams apart, of the stream that launches go to."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """Return a context in which arrays are made and kernels launched on this device."""
        ...


@dataclass(frozen=True, slots=True)
class CupyRuntime:
    """Kernels compiled by NVRTC and cached by CuPy, for one device."""

    xp: Any
    index: int
    processors: int
    shared_bytes: int
    l2_bytes: int

    def kernels(
        self, source: Path, names: Sequence[str], macros: Mapping[str, str | int]
    ) -> dict[str, Kernel]:
        """Compile a source file with macros and return its kernels by name."""
        return dict(_compiled(self.index, source, tuple(names), tuple(sorted(macros.items()))))

    def stream(self) -> int:
        """Return the address of CuPy's current stream."""
        return self.xp.cuda.get_current_stream().ptr

    def active(self) -> AbstractContextManager[Any]:
        """Return the context of the device."""
        return self.xp.cuda.Device(self.index)


@cache
def _compiled(
    index: int, source: Path, names: tuple[str, ...], macros: tuple[tuple[str, Any], ...]
) -> dict[str, Kernel]:
    import cupy

    options = ("--std=c++17", *(f"-D{name}={value}" for name, value in macros))
    with cupy.cuda.Device(index):
        module = cupy.RawModule(code=source.read_text(encoding="utf-8"), options=options)
        return {name: module.get_function(name) for name in names}


@cache
def cuda_runtime(device: str = "cuda") -> CupyRuntime:
    """Return the runtime of a device such as `cuda` or `cuda:1`.

    Raises:
        ConfigError: there is no such device.
        MissingExtraError: CuPy is not installed.
    """
    index = resolve(device).index
    cupy = cupy_or_none()
    if cupy is None:
        raise MissingExtraError(
            f"device {device!r} needs cupy: pip install 'tenfold-core[cuda13]' "
            "(or [cuda12] for a CUDA 12 driver)"
        )
    attributes = cupy.cuda.Device(index).attributes
    return CupyRuntime(
        xp=cupy,
        index=index,
        processors=attributes["MultiProcessorCount"],
        shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
        l2_bytes=attributes["L2CacheSize"],
    )
