# SPDX-License-Identifier: Apache-2.0
"""Run CUDA kernels without a GPU: the source itself, compiled by the system's C++ compiler.

The kernels see one fiber per thread (`cuda_emulator.h`), so warp operations, shared memory and
barriers do what they do on a device, and what would be undefined there stops the test.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tenfold_core.sparse.gpu.runtime import Kernel

__all__ = ["EmulatedRuntime", "compiler"]

_HEADER = Path(__file__).with_name("cuda_emulator.h")


@cache
def compiler() -> str | None:
    """Return the C++ compiler that kernels can be emulated with, or None."""
    if sys.platform != "linux":  # fibers by ucontext
        return None
    return shutil.which("g++") or shutil.which("clang++")


@dataclass(slots=True)
class EmulatedRuntime:
    """A runtime on the CPU: NumPy arrays, emulated kernels, streams by number."""

    processors: int = 3
    shared_bytes: int = 48 << 10
    l2_bytes: int = 1 << 20
    xp: Any = np
    current_stream: int = 0
    launches: list[str] = field(default_factory=list)
    """Names of the kernels launched so far."""

    def kernels(
        self, source: Path, names: Sequence[str], macros: Mapping[str, str | int]
    ) -> dict[str, Kernel]:
        """Compile a source file with macros and return its kernels by name."""
        library = _library(source, tuple(names), tuple(sorted(macros.items())))
        return {name: self._kernel(library, name) for name in names}

    def _kernel(self, library: ctypes.CDLL, name: str) -> Kernel:
        function = getattr(library, f"emulate_{name}")

        def launch(
            grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0
        ) -> None:
            self.launches.append(name)
            if shared_mem > self.shared_bytes:
                raise ValueError(f"{name}: {shared_mem} bytes of shared memory")
            size = np.array([grid[0], grid[1] if len(grid) > 1 else 1, block[0]], np.uint32)
            words = [_word(arg) for arg in args]
            pointers = (ctypes.c_void_p * len(words))(*(word.ctypes.data for word in words))
            function(ctypes.c_void_p(size.ctypes.data), ctypes.c_uint(shared_mem), pointers)

        return launch

    def stream(self) -> int:
        """Return the number of the current stream."""
        return self.current_stream

    def active(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()


def _word(arg: Any) -> np.ndarray:
    """Return an argument as memory to point to; Python numbers, which have no size, are refused."""
    if arg is None:
        return np.zeros(1, np.int64)
    if isinstance(arg, np.ndarray):
        if not arg.flags.c_contiguous:
            raise ValueError("a kernel was given an array that is not contiguous")
        return np.array([arg.ctypes.data], np.int64)
    if not isinstance(arg, np.generic):
        raise TypeError(f"a kernel was given {arg!r}, whose size C++ cannot know")
    return np.array([arg])


@cache
def _library(
    source: Path, names: tuple[str, ...], macros: tuple[tuple[str, Any], ...]
) -> ctypes.CDLL:
    found = compiler()
    if found is None:
        raise RuntimeError("no C++ compiler to emulate kernels with")
    lines = [f"#define {name} {value}" for name, value in macros]
    lines += [f'#include "{_HEADER}"', f'#include "{source.resolve()}"']
    lines += [f"EMULATE({name})" for name in names]
    text = "\n".join(lines)
    more = os.environ.get("TENFOLD_EMULATOR_FLAGS", "").split()  # a sanitizer, say
    key = hashlib.sha256(
        repr((text, more)).encode() + source.read_bytes() + _HEADER.read_bytes()
    ).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"tenfold-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{key[:24]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            unit, built = Path(work) / "kernels.cpp", Path(work) / "kernels.so"
            unit.write_text(text)
            flags = [
                "-std=c++20",
                "-O1",
                "-g",
                "-fPIC",
                "-shared",
                "-ffp-contract=off",
                "-w",
                *more,
            ]
            command = [found, *flags, str(unit), "-o", str(built)]
            subprocess.run(command, check=True)
            built.rename(target)
    return ctypes.CDLL(str(target))
