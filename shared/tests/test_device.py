# SPDX-License-Identifier: Apache-2.0
import sys
import types
from pathlib import Path

import pytest
from tenfold_core import device
from tenfold_core.errors import ConfigError, MissingExtraError


@pytest.fixture(autouse=True)
def forget():
    caches = (device.cpu_info, device._cupy)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def cupy(monkeypatch, count):
    runtime = types.SimpleNamespace(getDeviceCount=lambda: count)
    module = types.SimpleNamespace(
        __version__="14.2",
        is_available=lambda: count > 0,
        cuda=types.SimpleNamespace(runtime=runtime),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_the_processor_is_described():
    cpu = device.cpu_info()
    assert cpu.model
    assert 1 <= cpu.usable_cores <= cpu.logical_cores
    assert 1 <= cpu.physical_cores <= cpu.logical_cores
    assert cpu.memory_bytes == device.memory_limit() > 2**27
    assert device.cpu_info() is cpu


@pytest.mark.skipif(sys.platform != "linux", reason="reads /sys")
def test_the_limit_of_a_container_counts_as_memory(monkeypatch):
    text = device._text
    limit = {"/sys/fs/cgroup/memory.max": "1234567\n"}
    monkeypatch.setattr(device, "_text", lambda path: limit.get(str(path)) or text(path))
    assert device.cpu_info().memory_bytes == 1234567


@pytest.fixture
def groups(monkeypatch):
    """The files of the control groups as the test says, on a host of 16 cores."""
    files = {}
    text = device._text
    monkeypatch.setattr(
        device,
        "_text",
        lambda path: files.get(str(path), "") if "cgroup" in str(path) else text(path),
    )
    monkeypatch.setattr(device, "_allowed_cores", lambda: 16)
    return files


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /sys")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),  # 1.5 cores keep two threads busy
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 16),
        ({"cpu.max": "damaged\n"}, 16),
        ({"cpu.max": "200000 0\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "300000\n"}, 16),
    ],
    ids=str,
)
def test_the_quota_of_a_container_limits_the_cores(groups, files, cores):
    groups.update({f"/sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert device.cpu_info().usable_cores == cores


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /sys")
@pytest.mark.parametrize(
    ("own", "folder"), [("0::/a/b\n", ""), ("3:pids:/x\n2:cpu,cpuacct:/a/b\n0::/y\n", "/cpu")]
)
def test_the_least_quota_of_all_groups_above_counts(groups, own, folder):
    groups["/proc/self/cgroup"] = own
    for path, quota in {"/a": 300_000, "/a/b": 500_000, "/a/c": 100_000, "/x": 100_000}.items():
        top = f"/sys/fs/cgroup{folder}{path}/cpu"
        if folder:
            groups[f"{top}.cfs_quota_us"], groups[f"{top}.cfs_period_us"] = f"{quota}", "100000"
        else:
            groups[f"{top}.max"] = f"{quota} 100000"
    assert device.cpu_info().usable_cores == 3


def test_newer_pythons_know_the_cores_of_the_process(monkeypatch):
    monkeypatch.setattr(device.os, "process_cpu_count", lambda: 1, raising=False)
    assert device.cpu_info().usable_cores == 1


def test_macos_is_asked_by_sysctl(monkeypatch):
    answers = {"machdep.cpu.brand_string": "M9", "hw.physicalcpu": "1", "hw.l1dcachesize": "65536"}

    def sysctl(command, **_):
        if command[-1] == "hw.memsize":
            raise OSError("denied")
        return types.SimpleNamespace(stdout=answers.get(command[-1], "") + "\n")

    monkeypatch.setattr(device.subprocess, "run", sysctl)
    monkeypatch.setattr(sys, "platform", "darwin")
    cpu = device.cpu_info()
    assert (cpu.model, cpu.physical_cores, cpu.l1_bytes, cpu.l3_bytes) == ("M9", 1, 65536, 0)
    assert device.memory_limit() == 4 << 30


def test_windows_is_asked_for_its_memory(monkeypatch):
    def fill(pointer):
        pointer._obj[1] = 8 << 30

    kernel = types.SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(
        device.ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False
    )
    monkeypatch.setattr(sys, "platform", "win32")
    assert device.memory_limit() == 8 << 30


def test_an_unknown_system_still_has_a_processor(monkeypatch):
    monkeypatch.setattr(sys, "platform", "plan9")
    monkeypatch.delattr(device.os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(device.os, "getloadavg", raising=False)
    cpu = device.cpu_info()
    assert cpu.model
    assert cpu.usable_cores == cpu.logical_cores
    assert device.load_average() is None
    assert device.hardware()["load_average"] is None


def test_hardware_holds_no_name_of_the_host():
    import platform

    facts = device.hardware()
    assert platform.node() not in [value for value in facts.values() if isinstance(value, str)]
    assert {"model", "physical_cores", "memory_bytes", "load_average"} <= set(facts)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", ""])
def test_unknown_devices_are_refused(name):
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:<number>"):
        device.resolve(name)


def test_the_cpu_is_always_there():
    assert str(device.resolve("cpu")) == "cpu"


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch):
    cupy(monkeypatch, 2)
    assert str(device.resolve("auto")) == "cuda:0"
    assert str(device.resolve("cuda:1")) == "cuda:1"
    assert device.cupy_reason() == "14.2: 2 CUDA devices"
    with pytest.raises(ConfigError, match="'cuda:2', found 2 CUDA devices"):
        device.resolve("cuda:2")


def test_cupy_without_a_gpu_means_cpu_and_says_why(monkeypatch):
    cupy(monkeypatch, 0)
    assert device.cupy_or_none() is None
    found = device.resolve("auto")
    assert (str(found), found.reason) == ("cpu", "cupy: 14.2: no CUDA device")
    with pytest.raises(ConfigError, match="'cuda', found 0 CUDA devices"):
        device.resolve("cuda")


@pytest.mark.parametrize(
    ("via", "extra"), [("cupy", r"tenfold-core\[cuda13\]"), ("torch", r"tenfold-core\[torch\]")]
)
def test_a_missing_library_names_its_extra(monkeypatch, via, extra):
    monkeypatch.setitem(sys.modules, via, None)
    assert device.resolve("auto", via=via).reason == f"{via}: not installed"
    with pytest.raises(MissingExtraError, match=extra):
        device.resolve("cuda", via=via)


def test_a_library_that_does_not_load_is_a_reason_and_no_crash(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise RuntimeError("libcuda.so.1:\ncannot open")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert device.cupy_or_none() is None
    assert device.cupy_reason() == "cannot be imported: libcuda.so.1: cannot open"


def test_torch_can_be_asked_instead(monkeypatch):
    cuda = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.9", cuda=cuda))
    assert device.resolve("auto", via="torch").reason == "2.9: 2 CUDA devices"
    cuda.is_available = lambda: False
    assert device.resolve("auto", via="torch").reason == "torch: 2.9: no CUDA device"


def test_the_report_lists_what_is_and_what_is_not_there(monkeypatch):
    from importlib import metadata

    real = metadata.version

    def without_scipy(name):
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return real(name) if name == "numpy" else "1"

    monkeypatch.setattr(metadata, "version", without_scipy)
    lines = dict(device.report())
    assert lines["scipy"] == "not installed"
    assert lines["numpy"][0].isdigit()
    assert lines["memory"].endswith("GiB")


def test_a_file_that_cannot_be_read_is_empty():
    assert device._text(Path("/no/such/file")) == ""
