# SPDX-License-Identifier: Apache-2.0
"""What the machine offers: processor, caches, memory and, if asked, a CUDA device."""

import ctypes
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal

from tenfold_core.errors import ConfigError, MissingExtraError

__all__ = [
    "CpuInfo",
    "Device",
    "cpu_info",
    "cupy_or_none",
    "cupy_reason",
    "hardware",
    "load_average",
    "memory_limit",
    "report",
    "resolve",
]


@dataclass(frozen=True, slots=True)
class Device:
    """A device that was found, and why it was chosen."""

    kind: Literal["cpu", "cuda"]
    index: int = 0
    reason: str = ""

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


@dataclass(frozen=True, slots=True)
class CpuInfo:
    """The processor as one process sees it; zero where the system does not say."""

    model: str
    physical_cores: int
    logical_cores: int
    usable_cores: int
    """Cores this process may keep busy: its affinity, or less where a container grants less."""
    l1_bytes: int
    """Data cache of one core."""
    l2_bytes: int
    """Second level of one core."""
    l3_bytes: int
    """Last level, as shared by the cores of one socket or cluster."""
    memory_bytes: int
    """Physical memory, or the limit of the container if that is less."""


def resolve(name: str, *, via: Literal["cupy", "torch"] = "cupy") -> Device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` into a device that exists.

    Args:
        name: What the user asked for; ``auto`` takes a GPU if there is one.
        via: The library that is going to compute there, imported unless ``name`` is ``cpu``.

    Raises:
        ConfigError: The name is not known, or no such GPU answers.
        MissingExtraError: A GPU was asked for and the library is not installed.
    """
    match = re.fullmatch(r"(auto|cpu|cuda(?::(\d+))?)", name)
    if not match:
        raise ConfigError(f"device is {name!r}, expected auto, cpu, cuda or cuda:<number>")
    if name == "cpu":
        return Device("cpu", reason="asked for")
    count, reason = _cuda_count(via)
    index = int(match[2] or 0)
    if name == "auto":
        return Device("cuda", 0, reason) if count else Device("cpu", reason=f"{via}: {reason}")
    if reason == "not installed":
        extra = "cuda13" if via == "cupy" else "torch"
        other = " (or [cuda12] for a CUDA 12 driver)" if via == "cupy" else ""
        raise MissingExtraError(
            f"device {name!r} needs {via}: pip install 'tenfold-core[{extra}]'{other}"
        )
    if index >= count:
        raise ConfigError(
            f"device is {name!r}, found {count} CUDA devices ({reason}); use --device cpu or auto"
        )
    return Device("cuda", index, reason)


def cupy_or_none() -> Any | None:
    """Return CuPy if it is installed and a GPU answers, else None; never raises."""
    return _cupy()[0]


def cupy_reason() -> str:
    """Say in a few words why :func:`cupy_or_none` answers as it does."""
    return _cupy()[1]


@cache
def cpu_info() -> CpuInfo:
    """Describe the processor, from the system's own tables and without a third library."""
    logical, allowed = os.cpu_count() or 1, _allowed_cores()
    found = {"linux": _linux, "darwin": _darwin}.get(sys.platform, _other)()
    return CpuInfo(
        model=found.get("model") or platform.processor() or platform.machine(),
        physical_cores=int(found.get("physical", logical)),
        logical_cores=logical,
        usable_cores=max(1, min(allowed, found.get("granted", allowed))),
        l1_bytes=int(found.get("l1", 0)),
        l2_bytes=int(found.get("l2", 0)),
        l3_bytes=int(found.get("l3", 0)),
        memory_bytes=int(found.get("memory", 0)),
    )


def load_average() -> tuple[float, float, float] | None:
    """Return the load of the last 1, 5 and 15 minutes, or None where it is not kept."""
    try:
        return os.getloadavg()
    except (AttributeError, OSError):
        return None


def memory_limit() -> int:
    """Return the bytes a process may hope for: physical memory, or 4 GiB if nothing is known."""
    return cpu_info().memory_bytes or 4 << 30


def hardware() -> dict[str, Any]:
    """Return the processor and its present load as plain values, for a run record."""
    return asdict(cpu_info()) | {
        "architecture": platform.machine(),
        "system": platform.system(),
        "load_average": load_average(),
    }


def report() -> list[tuple[str, str]]:
    """List what is installed and usable, for ``python -m tenfold_core``."""
    from importlib.metadata import PackageNotFoundError, version

    cpu = cpu_info()
    sizes = " / ".join(f"{size >> 10} KiB" for size in (cpu.l1_bytes, cpu.l2_bytes, cpu.l3_bytes))
    lines = [
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("processor", cpu.model),
        ("cores", f"{cpu.physical_cores} physical, {cpu.logical_cores} logical"),
        ("usable cores", str(cpu.usable_cores)),
        ("caches", sizes),
        ("memory", f"{cpu.memory_bytes / 2**30:.1f} GiB"),
        ("load", " ".join(f"{value:.2f}" for value in load_average() or ()) or "not known"),
    ]
    for name in ("tenfold-core", "numpy", "scipy", "numba", "safetensors", "torch"):
        try:
            lines.append((name, version(name)))
        except PackageNotFoundError:
            lines.append((name, "not installed"))
    return [*lines, ("cupy", cupy_reason())]


@cache
def _cupy() -> tuple[Any | None, str]:
    # `import cupy` succeeds on a machine without a GPU; is_available() tells, and does not raise.
    try:
        import cupy
    except ImportError:
        return None, "not installed"
    except Exception as error:  # a CUDA library that does not load raises many things
        return None, f"cannot be imported: {' '.join(str(error).split())[:120]}"
    if not cupy.is_available():
        return None, f"{cupy.__version__}: no CUDA device"
    return cupy, f"{cupy.__version__}: {cupy.cuda.runtime.getDeviceCount()} CUDA devices"


def _cuda_count(via: str) -> tuple[int, str]:
    if via == "cupy":
        module = cupy_or_none()
        return (module.cuda.runtime.getDeviceCount() if module else 0), cupy_reason()
    try:
        import torch
    except ImportError:
        return 0, "not installed"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, f"{torch.__version__}: {count or 'no'} CUDA device{'s' if count > 1 else ''}"


def _allowed_cores() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _linux() -> dict[str, Any]:
    found: dict[str, Any] = {}
    text = _text("/proc/cpuinfo")
    if match := re.search(r"^(?:model name|Processor|cpu model)\s*:\s*(.+)$", text, re.M):
        found["model"] = match[1].strip()
    pairs = re.findall(r"^physical id\s*:\s*(\d+)$.*?^core id\s*:\s*(\d+)$", text, re.M | re.S)
    if pairs:
        found["physical"] = len(set(pairs))
    for cache_folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level = _text(cache_folder / "level").strip()
        kind = _text(cache_folder / "type").strip()
        size = re.fullmatch(r"(\d+)([KMG]?)", _text(cache_folder / "size").strip())
        if size and level in "123" and kind in ("Data", "Unified"):
            found[f"l{level}"] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (
        _text("/sys/fs/cgroup/memory.max"),
        _text("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    )
    found["memory"] = min([total, *(int(limit) for limit in limits if limit.strip().isdigit())])
    if quotas := _cpu_quotas():
        found["granted"] = math.ceil(min(quotas))
    return found


def _cpu_quotas() -> list[float]:
    """Return the processor time per second that each control group above this process grants."""
    own = {"": "/", "cpu": "/"}  # version 2 names no controller; a container sees itself as /
    for line in _text("/proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        own |= {name: path for name in controllers.split(",") if name in own}
    quotas = []
    for top, path in (("/sys/fs/cgroup", own[""]), ("/sys/fs/cgroup/cpu", own["cpu"])):
        inner = PurePosixPath(path.lstrip("/"))
        for group in (inner, *inner.parents):
            folder = PurePosixPath(top) / group
            words = _text(folder / "cpu.max").split() or [
                _text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
            ]
            if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
                quotas.append(int(words[0]) / int(words[1]))
    return quotas


def _darwin() -> dict[str, Any]:
    keys = {
        "model": "machdep.cpu.brand_string",
        "physical": "hw.physicalcpu",
        "l1": "hw.l1dcachesize",
        "l2": "hw.l2cachesize",
        "l3": "hw.l3cachesize",
        "memory": "hw.memsize",
    }
    found: dict[str, Any] = {}
    for name, key in keys.items():
        try:
            text = subprocess.run(
                ["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, timeout=5
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            continue
        if name == "model" or text.isdigit():
            found[name] = text
    return found


def _other() -> dict[str, Any]:
    windll = getattr(ctypes, "windll", None)
    if windll is None:
        return {}
    # MEMORYSTATUSEX: two 32-bit fields, then seven of 64 bits, the first of them the total.
    status = (ctypes.c_uint64 * 8)(64)
    windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return {"memory": status[1]}


def _text(path: str | PurePath) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
