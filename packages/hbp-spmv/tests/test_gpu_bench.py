# SPDX-License-Identifier: Apache-2.0
"""The benchmark on a GPU, kernels emulated on the CPU: rows, record, ablation, claims, pages."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hbp_spmv import cuda, cuda_selection, gpu_ablation, gpu_evaluate, gpu_timing, matrix, selection
from hbp_spmv.bench import BenchConfig, device_of, not_here, run
from hbp_spmv.cli import bench_main, main
from hbp_spmv.cuda_selection import DeviceCalibration
from hbp_spmv.evaluate import COLUMNS, Protocol
from hbp_spmv.generate import powerlaw, rmat, stencil5
from hbp_spmv.generate_large import rmat_in_chunks
from hbp_spmv.gpu_baselines import GPU_BASELINES
from hbp_spmv.gpu_evaluate import GPU_FORMATS, LIBRARIES, CudaPlace, Judge, resolve_formats
from hbp_spmv.gpu_report import ablation_table, best_table, gpu_product_table
from hbp_spmv.gpu_summary import gpu_claims
from hbp_spmv.inputs import Source
from hbp_spmv.output import read_rows
from hbp_spmv.report import case_cells, case_title, claim_lines, machine_line, regenerate, verdict
from hbp_spmv.summary import LEFT_OUT
from tenfold_core.device import Device, cupy_or_none
from tenfold_core.errors import ConfigError, MissingExtraError, TenfoldError
from tenfold_core.run.record import validate
from tenfold_core.run.rows import read_jsonl
from tenfold_core.sparse import CSR, reference_product, write_matrix_market
from tenfold_core.testing.cuda import EmulatedRuntime, compiler

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
emulated = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to emulate kernels")
QUICK = Protocol(min_time_s=0, repeats=3)
MEASURED = DeviceCalibration(
    bandwidth=((1 << 20, 6000.0), (1 << 28, 4300.0)), launch_us=3.0, sector_gbs=2000.0, warps=6336
)


@pytest.fixture
def runtime(monkeypatch):
    """An emulated device that has been measured, with short graphs."""
    monkeypatch.setattr(gpu_timing, "GRAPH_LAUNCHES", 2)
    monkeypatch.setattr(gpu_evaluate, "calibrate_device", lambda runtime: MEASURED)
    monkeypatch.setattr(cuda_selection, "calibrate_device", lambda runtime: MEASURED)
    return EmulatedRuntime()


@pytest.fixture
def gpu(runtime, monkeypatch):
    """Let `--device cuda` find the emulated device."""
    found = Device("cuda", 0, "emulated")
    for module in ("tenfold_core.device", matrix, selection):
        name = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(
            f"{name}.resolve", lambda name: found if "cuda" in name else Device("cpu")
        )
    for module in (cuda, cuda_selection, gpu_evaluate):
        monkeypatch.setattr(module, "cuda_runtime", lambda device: runtime)
    return runtime


def script(name):
    """Load a benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources():
    made = {"grid": stencil5(6), "skew": powerlaw(70)}
    return [Source(name, lambda a=a: a, name) for name, a in made.items()]


# A run


@emulated
def test_every_format_is_measured_hot_and_cold_and_resumed(runtime, tmp_path):
    config = BenchConfig(device="cuda", hot_and_cold=True, protocol=QUICK)
    found = run(sources(), config, out=tmp_path / "r.csv", runtime=runtime)
    ours = [name for name in GPU_BASELINES if name not in LIBRARIES]
    assert [(row["matrix"], row["cold"], row["format"]) for row in found.rows] == [
        (name, cold, format_)
        for name in ("grid", "skew")
        for cold in (False, True)
        for format_ in (*GPU_FORMATS, *ours)
    ]
    for row in found.rows:
        assert (row["device"], row["threads"], row["over_scipy"]) == ("emulated", 0, None)
        if row["format"] == "hbp-compact-strips":
            assert row["error"].startswith(f"{LEFT_OUT}x of ")
            continue
        assert row["error"] is None, row
        assert row["error_over_bound"] <= 1
        assert (row["graph_us"] is None) == (row["us"] > 1e6 * gpu_evaluate.LONGEST_CAPTURED_S)
        assert row["copy_gbs"] == (4300 if row["cold"] else 6000)
    by_format = {row["format"]: row for row in found.rows}
    assert by_format["hbp-compact"]["layout"].startswith("compact: packs of ")
    assert by_format["auto"]["layout"].split(":")[0] in ("csr", "compact")
    assert by_format["auto"]["regret_percent"] is not None
    assert len([note for note in found.notes if note.startswith("left out: c")]) == len(LIBRARIES)
    assert read_rows(tmp_path / "r.csv") == found.rows
    record = json.loads((tmp_path / "r.run" / "run.json").read_text(encoding="utf-8"))
    validate(record)
    assert record["device"]["name"] == record["config"]["gpu"]["name"] == "emulated"
    assert record["metrics"]["failed_formats_f64_gpu_cold"]["value"] == 0
    assert "auto_over_scipy_f64_gpu" not in record["metrics"]
    again = run(sources(), config, out=tmp_path / "r.csv", resume=True, runtime=runtime)
    assert again.rows == found.rows


@pytest.mark.gpu
@pytest.mark.skipif(cupy_or_none() is None, reason="no CUDA device that CuPy can use")
def test_every_format_on_a_device(tmp_path):
    config = BenchConfig(device="cuda", dtypes=("f64", "f32"), hot_and_cold=True, protocol=QUICK)
    found = run([Source("skew", lambda: powerlaw(40_000), "skew")], config, out=tmp_path)
    for row in found.rows:
        assert row["error"] is None, row
        assert "in no graph" not in row["layout"], row
        assert row["us"] > 0
        assert (row["graph_us"] or 1) > 0
    assert {row["device"] for row in found.rows} - {"cpu", "emulated"}


@emulated
def test_strips_are_measured_where_x_has_several_and_published_formats_where_they_fit(
    runtime, monkeypatch
):
    monkeypatch.setattr(gpu_evaluate, "STRIP_BYTES", 64 * 8)
    monkeypatch.setattr(gpu_evaluate, "MOST_SLOTS", 0)
    formats = ("hbp-compact-strips", "hbp-paper")
    config = BenchConfig(device="cuda", formats=formats, protocol=QUICK)
    strips, paper = run([Source("m", lambda: powerlaw(200), "m")], config, runtime=runtime).rows
    assert "strips of 64" in strips["layout"]
    assert strips["error_over_bound"] <= 1
    assert paper["error"] == "left out: 200 dense slots, more than 0"


@emulated
def test_a_product_that_lies_or_fails_gets_a_row_with_the_reason(runtime, monkeypatch):
    def lie(a, runtime):
        def launch(x, y):
            y[1:] = (a @ x)[1:]  # row 0 is never written

        return SimpleNamespace(nbytes=1, notes="", matvec=None, launch=launch)

    def fail(a, runtime):
        raise RuntimeError("no\nluck")

    for name, build in (("csr-vector", lie), ("sell", fail)):
        monkeypatch.setitem(GPU_BASELINES, name, SimpleNamespace(name=name, build=build))
    config = BenchConfig(device="cuda", formats=("csr-vector", "sell"), protocol=QUICK)
    rows = run(sources()[:1], config, runtime=runtime).rows
    assert rows[0]["error"].startswith("VerificationError: row 0: the error is inf times")
    assert rows[1]["error"] == "RuntimeError: no luck"


@emulated
def test_complex_matrices_are_refused_by_name(runtime):
    config = BenchConfig(device="cuda", formats=("auto", "csr-vector"), protocol=QUICK)
    rows = run([Source("c", lambda: stencil5(4) * 1j, "c")], config, runtime=runtime).rows
    assert [row["dtype"] for row in rows] == ["complex128"] * 2
    assert all("complex128" in row["error"] for row in rows)


def test_settings_of_a_gpu():
    config = BenchConfig(device="cuda", dtypes=("f64", "f32"), hot_and_cold=True)
    assert config.cases == [
        ("float64", 0, False), ("float64", 0, True), ("float32", 0, False), ("float32", 0, True),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="threads: cuda has none to choose"):
        BenchConfig(device="cuda", threads=(2,))


def test_a_format_that_cannot_run_is_named():
    with pytest.raises(MissingExtraError, match="'cupyx': the arrays are not on a GPU"):
        resolve_formats(("cupyx",), EmulatedRuntime())
    with pytest.raises(ConfigError, match="'csr-scipy' is not known, expected all, auto"):
        resolve_formats(("csr-scipy",), EmulatedRuntime())
    formats, left_out = resolve_formats(("CSR-Merge", "all"), EmulatedRuntime())
    assert formats[:3] == ("csr-merge", "auto", "hbp-compact")
    assert {line.partition(":")[0] for line in left_out} == set(LIBRARIES)


# The reference


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_long_sum_is_as_good_as_an_exact_one(dtype):
    a = powerlaw(300).astype(dtype)
    a.data[3] = 1e30
    x = np.random.default_rng(0).standard_normal(300).astype(dtype)
    matrix = CSR.from_scipy(a)
    exact = reference_product(matrix, x)
    found = gpu_evaluate._summed(matrix, x, chunk=100)
    bound = gpu_evaluate.componentwise_bound(matrix, x)
    spacing = np.spacing(np.abs(exact)) * (dtype == "float64")  # rounded twice
    assert (np.abs(found - exact) <= bound / 500 + spacing).all()


def test_large_products_are_judged_by_the_long_sum(monkeypatch):
    monkeypatch.setattr(gpu_evaluate, "EXACT_NNZ", 10)
    a, x = stencil5(8), np.linspace(-1, 1, 64)
    judge = Judge(a, x)
    assert judge(a @ x) <= 1
    with pytest.raises(TenfoldError, match="row 5: the error is"):
        judge(a @ x + (np.arange(64) == 5))


# Graphs


class FakeCuda:
    """Enough of CuPy to see what is captured, launched and waited for."""

    def __init__(self, broken=False):
        self.log, self.broken = [], broken
        self.runtime = SimpleNamespace(
            deviceSynchronize=lambda: self.log.append("wait"),
            getDeviceProperties=lambda index: {"name": b"Some GPU", "totalGlobalMem": 1 << 30},
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 12090,
        )
        graph = SimpleNamespace(launch=lambda stream: self.log.append("graph"))

        class Stream(nullcontext):
            begin_capture = staticmethod(lambda: self.log.append("begin"))
            synchronize = staticmethod(lambda: None)

            def __init__(stream, *, non_blocking):
                super().__init__()

            def end_capture(stream):
                self.log.append("end")
                return graph

        self.Stream = Stream
        self.Event = lambda: SimpleNamespace(
            record=lambda stream: self.log.append("event"), synchronize=lambda: None
        )

    def get_elapsed_time(self, start, stop):
        return 60.0  # ms


def on_fake(cuda):
    return SimpleNamespace(
        xp=SimpleNamespace(cuda=cuda, __version__="14"), index=0, processors=2, l2_bytes=8,
        shared_bytes=4,
    )  # fmt: skip


def test_launches_are_captured_once_and_replayed_between_two_events():
    cuda = FakeCuda()
    calls = [lambda: cuda.log.append("flush"), lambda: cuda.log.append("launch")]
    replay = gpu_timing.Replay(on_fake(cuda), calls, 2)
    once = ["flush", "launch"]
    assert cuda.log == ["wait", *once, "begin", *once, *once, "end"]
    cuda.log.clear()
    assert replay.seconds(3) == pytest.approx(0.06 / 6)
    assert cuda.log == ["event", "graph", "graph", "graph", "event"]


def test_a_launch_that_cannot_be_captured_is_told_and_ends_the_capture():
    cuda, seen = FakeCuda(), []

    def fails_on_second():
        seen.append(1)
        if len(seen) == 2:
            raise RuntimeError("allocates")

    launches = {"bad": fails_on_second, "good": lambda: None}
    seconds, faults = gpu_timing.graph_seconds(launches, on_fake(cuda), min_time_s=0, repeats=3)
    assert faults == {"bad": "RuntimeError: allocates"}
    assert seconds == {"good": pytest.approx(0.06 / gpu_timing.GRAPH_LAUNCHES)}
    assert cuda.log.index("end") < cuda.log.index("begin", cuda.log.index("begin") + 1)


def test_the_time_of_rewriting_a_buffer_is_subtracted(monkeypatch):
    class Timed:
        def __init__(self, runtime, calls, count):
            self.calls = calls

        def seconds(self, times):
            return {"flush": 5.0, "launch": 7.0}[self.calls[0]] + 2.0 * (len(self.calls) - 1)

    monkeypatch.setattr(gpu_timing, "Replay", Timed)
    settings = {"min_time_s": 0, "repeats": 3}
    hot, _ = gpu_timing.graph_seconds({"a": "launch"}, None, **settings)
    cold, _ = gpu_timing.graph_seconds({"a": "launch"}, None, flush="flush", **settings)
    assert (hot, cold) == ({"a": 7.0}, {"a": 2.0})


def test_a_device_is_described_by_its_name():
    found = CudaPlace("cuda", on_fake(FakeCuda()))
    assert found.name == "Some GPU"
    assert found.facts()["gpu"]["driver"] == 13000


# The command line


@emulated
def test_hbp_bench_on_a_device(gpu, tmp_path, capsys):
    write_matrix_market(tmp_path / "m.mtx", stencil5(6))
    argv = [
        str(tmp_path / "m.mtx"), "--device", "cuda", "--formats", "auto,hbp-csr,csr-vector",
        "--min-time", "0", "--repeats", "3", "--out", str(tmp_path / "o"),
    ]  # fmt: skip
    assert bench_main(argv) == 0
    out = capsys.readouterr().out
    assert "emulated; copy in GB/s: 1 MiB 6000, 256 MiB 4300" in out
    assert "nonzeros (4.3 a row, cv 0.15), float64, emulated, hot" in out
    assert "graph us" in out
    assert bench_main([*argv[:-2], "--cold", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["format"], row["cold"]) for row in rows] == [
        ("auto", True), ("hbp-csr", True), ("csr-vector", True),
    ]  # fmt: skip
    assert bench_main([*argv[:-2], "--threads", "2"]) == 2


@emulated
def test_verify_select_and_calibrate_on_a_device(gpu, tmp_path, capsys):
    write_matrix_market(tmp_path / "m.mtx", stencil5(6))
    saved = str(tmp_path / "m.hbp.safetensors")
    assert main(["convert", str(tmp_path / "m.mtx"), saved, "--layout", "compact"]) == 0
    capsys.readouterr()
    assert main(["verify", saved, "--device", "cuda", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["verdict"]) == ("cuda:0", "within the bound")
    assert "grouped_product" in gpu.launches
    assert main(["select", str(tmp_path / "m.mtx"), "--device", "cuda", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] in ("csr", "compact")
    assert main(["calibrate", "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert "copy,     1024 KiB: 6000.0 GB/s, CSR at most 1000.0 GFLOP/s" in out
    assert "sector gbs  2000" in out


@pytest.mark.skipif(cupy_or_none() is not None, reason="there is a CUDA device")
@pytest.mark.parametrize("verb", ["bench", "demo", "verify", "select", "calibrate"])
def test_without_a_gpu_every_verb_says_so_in_one_line(verb, tmp_path, capsys):
    write_matrix_market(tmp_path / "m.mtx", stencil5(3))
    argv = [verb, *([] if verb in ("demo", "calibrate") else [str(tmp_path / "m.mtx")])]
    assert main([*argv, "--device", "cuda:1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "'cuda:1'" in captured.err


def test_demo_names_the_command_for_a_gpu(gpu, capsys):
    assert main(["demo", "--device", "cuda"]) == 2
    assert "use hbp-bench --device cuda" in capsys.readouterr().err


# The script


@emulated
def test_table_b_and_the_ablation_end_to_end(runtime, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HBP_MATRICES", raising=False)
    monkeypatch.setattr(gpu_ablation, "STRIPS", (0, 65536, 32))
    monkeypatch.setattr(gpu_ablation, "HASHES", ("tuned", "lut"))
    out = tmp_path / "benchmarks" / "results"
    argv = ["--device", "cuda", "--size", "small", "--min-time", "0", "--repeats", "3"]
    argv += ["--formats", "auto,hbp-compact,csr-vector", "--out", str(out)]
    assert script("bench_gpu").main(argv, runtime=runtime) == 0
    assert "not measured auto against the better preprocessed cuSPARSE" in capsys.readouterr().out
    rows = read_rows(out / "gpu" / "rows.jsonl")
    assert len(rows) == 2 * 2 * 2 * 3  # matrices, types, hot and cold, formats
    ablation = read_jsonl(out / "gpu" / "ablation.jsonl")
    # 2 matrices x 2 orders x 2 index widths x (1 schedule without strips, 2 for each width)
    assert len(ablation) == 2 * 2 * 2 * (1 + 2 + 2)
    assert all(
        row["us"] > 0 and row["error_over_bound"] <= 1 for row in ablation if not row["error"]
    )
    left_out = {row["strips"] for row in ablation if row["error"]}
    assert left_out == {65536}
    record = json.loads((out / "gpu" / "run.json").read_text(encoding="utf-8"))
    validate(record)
    assert {part["path"] for part in record["artefacts"]} == {"rows.jsonl", "ablation.jsonl"}
    text = (out / "gpu.md").read_text(encoding="utf-8")
    assert text.startswith("# Table B: emulated\n")
    assert text.count("| stencil27-n4 |") == 8 + 1  # products and graphs, and the fastest
    assert "| 32 | fixed runs, ticket | u16 |" in text
    assert regenerate(tmp_path, check=True) == 0


BARE = """
import importlib.util, sys
BLOCKED = {"tyro", "rich", "numba", "llvmlite", "safetensors", "torch", "matplotlib", "polars"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import importlib.machinery
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in BLOCKED else real(name, *a)
from hbp_spmv import gpu_ablation, gpu_timing
from tenfold_core.testing.cuda import EmulatedRuntime
gpu_timing.GRAPH_LAUNCHES = 1
gpu_ablation.HASHES, gpu_ablation.STRIPS = ("paper", "lut"), (0,)
spec = importlib.util.spec_from_file_location("bench_gpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
code = module.main(sys.argv[2:], runtime=EmulatedRuntime())
from hbp_spmv import cuda
from hbp_spmv.config import BuildConfig
from hbp_spmv.generate import stencil5
h = cuda.build(stencil5(6), BuildConfig(layout="compact"), "cuda", runtime=EmulatedRuntime())
assert h.stats.std_before >= h.stats.std_after
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
sys.exit(code)
"""


def python(*arguments):
    """Run this Python without a suite of matrices."""
    environment = {name: value for name, value in os.environ.items() if name != "HBP_MATRICES"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=100, env=environment
    )


@emulated
def test_the_script_needs_numpy_scipy_and_cupy_alone(tmp_path):
    argv = ["--device=cuda", "--size=small", "--min-time=0", "--repeats=3", "--dtype=f64"]
    argv += ["--out", tmp_path]
    found = python("-c", BARE, SCRIPTS / "bench_gpu.py", *argv)
    assert found.returncode == 0, found.stderr
    assert "left out: hbp-paper: numba does not work here" in found.stdout
    rows = read_rows(tmp_path / "gpu" / "rows.jsonl")
    assert {row["format"] for row in rows if row["us"]} >= {"auto", "hbp-compact", "csr-merge"}
    ablation = read_jsonl(tmp_path / "gpu" / "ablation.jsonl")
    assert all(("numba" in (row["error"] or "")) == (row["hash"] == "paper") for row in ablation)
    assert not (tmp_path / "gpu" / "roofline.svg").exists()


def test_the_limit_on_time_begins_nothing_new(runtime, tmp_path, monkeypatch, capsys):
    module = script("bench_gpu")
    clock = iter([0.0, 1.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    rows = module._ablation(tmp_path, sources(), QUICK, runtime, deadline=-1.0)
    assert rows == []
    assert "ablation: stopped before grid" in capsys.readouterr().err


def test_an_ablation_stops_when_it_is_told():
    asked = iter([True, False])
    rows = list(
        gpu_ablation.ablate("m", stencil5(4), EmulatedRuntime(), QUICK, go_on=lambda: next(asked))
    )
    assert len(rows) == 1


@pytest.mark.parametrize("name", ["bench_suite", "bench_sizes"])
def test_a_benchmark_of_the_cpu_leaves_a_gpu_alone_and_needs_no_parser_for_that(name):
    code = "import runpy, sys; sys.modules['tyro'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    found = python("-c", code, SCRIPTS / f"{name}.py", "--device=cuda", "--limit-time=5")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == (
        f"{name}.py: measures the CPU, nothing to do for --device cuda; give --device cpu\n"
    )


def test_the_benchmark_of_a_gpu_leaves_the_cpu_alone(capsys):
    assert script("bench_gpu").main([]) == 0
    assert "measures a GPU, nothing to do for --device cpu" in capsys.readouterr().out
    assert not_here("x", "auto", on_gpu=False) is None
    assert not_here("x", "cuda:1", on_gpu=True) is None
    assert [device_of(a) for a in ([], ["--device=cuda"], ["-x", "--device", "cuda:1"])] == [
        "cpu", "cuda", "cuda:1",
    ]  # fmt: skip


@pytest.mark.skipif(cupy_or_none() is not None, reason="there is a CUDA device")
def test_the_script_without_a_gpu_is_one_line(capsys, tmp_path):
    assert script("bench_gpu").main(["--device=cuda", "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# A large matrix


def test_a_graph_drawn_in_chunks_is_like_the_other_and_repeats_itself():
    a, b = rmat_in_chunks(9, 8, seed=3), rmat_in_chunks(9, 8, seed=3)
    assert (a != b).nnz == 0
    assert a.shape == (512, 512)
    assert a.data.sum() == 8 * 512
    assert a.data.min() == 1
    a.has_canonical_format = False
    assert a.copy().has_canonical_format
    other = rmat(9, 8, seed=3)
    assert a.nnz == pytest.approx(other.nnz, rel=0.05)
    skew = [np.diff(m.indptr).std() for m in (a, other)]
    assert skew[0] == pytest.approx(skew[1], rel=0.1)


@pytest.mark.parametrize(
    "arguments", [(0, 8), (3, 0), (30, 16), (3, 2, (0.5, 0.5)), (3, 2, (1.2, -0.2, 0, 0))]
)
def test_graphs_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match="rmat: "):
        rmat_in_chunks(*arguments)


# Claims and tables


def row(matrix, format_, us, graph_us=None, **more):
    """Return a row on a device: 2e6 nonzeros, and half the copy bandwidth in a call."""
    facts = dict.fromkeys(COLUMNS) | {
        "matrix": matrix, "rows": 1000, "columns": 1000, "nnz": 2_000_000, "row_mean": 20.0,
        "row_cv": 1.5, "dtype": "float64", "threads": 0, "cold": False, "format": format_,
        "layout": "compact: packs of 2", "bytes": 2048, "build_ms": 1.5, "us": us, "us_p10": us,
        "us_p90": us, "graph_us": graph_us, "gflops": 1.0, "gbs": 1.0, "copy_percent": 50.0,
        "error_over_bound": 0.25, "device": "Some GPU",
    }  # fmt: skip
    return facts | more


ROWS = [
    row("banded", "auto", 20.0, 10.0, over_vendor=1.5, vendor="cusparse-csr-alg2"),
    row("banded", "cusparse-csr-alg1", 40.0, 26.0),
    row("banded", "cusparse-csr-alg2", 30.0, 24.0),
    row("banded", "csr-torch-int64", 50.0),
    row("banded", "hbp-paper", 80.0),
    row("banded", "csr-scalar-8192", 120.0),
    row("small", "auto", 10.0, nnz=9, over_vendor=0.8, vendor="cupyx"),
    row("small", "cupyx", 8.0, nnz=9),
]


def test_claims_by_hand():
    found = {claim.text: (claim.found, claim.passed, claim.detail) for claim in gpu_claims(ROWS)}
    best = "auto against the better preprocessed cuSPARSE CSR (int32)"
    assert found[f"{best}, in graphs, nnz >= 1e6, f64"] == ("2.40x on 1", True, "")  # 24 / 10
    assert found[f"{best}, calls, nnz >= 1e6, f64"] == ("1.50x on 1", True, "")  # 30 / 20
    assert found["auto against torch (int64), calls, nnz >= 1e6, f64"][:2] == ("2.50x on 1", True)
    shares = "auto, share of the copy bandwidth, stencils and bands, nnz >= 1e6, f64"
    assert found[shares] == ("least 100 % of 1", True, "")  # 50 % in a call of twice the time
    assert found["auto against CuPy's A @ x, calls, nnz < 1e6, f64"] == (
        "0.80x on 1", False, "small 0.80",
    )  # fmt: skip
    assert found["auto against the best call of any library, f64"] == (
        "least 0.80x of 2", False, "small 0.80",
    )  # fmt: skip
    paper = "hbp-paper against csr-scalar-8192, cv >= 1, up to 16 strips, f64"
    assert found[paper] == ("1.50x on 1", True, "")


def test_without_rows_every_claim_is_not_measured(tmp_path):
    found = gpu_claims([])
    assert len(found) == 2 * 7 + 1
    assert all(line.startswith("not measured") for line in claim_lines(found))
    (tmp_path / "README.md").write_text("<!-- results: gpu/claims -->\n<!-- /results -->\n")
    assert regenerate(tmp_path) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count("| not measured |") == 15


def combination(us, **more):
    facts = {
        "matrix": "m", "nnz": 2_000_000, "row_cv": 0.5, "hash": "lut", "schedule": "mixed",
        "strips": 0, "index": "u16", "detail": "packs of 2", "build_ms": 1.0, "us": us,
        "graph_us": us, "error": None,
    }  # fmt: skip
    return facts | more


ABLATION = [
    combination(20.0),
    combination(10.0, hash="sort"),
    combination(40.0, strips=4096, schedule="fixed"),
    combination(50.0, matrix="n"),
    combination(None, matrix="n", strips=4096, schedule="fixed", error="left out: x"),
]


def test_the_ablation_as_tables():
    lines = ablation_table(ABLATION).splitlines()
    # 20 / 10 on m, 50 / 50 on n: the geometric mean of 2 and 1; sort was measured on m alone.
    assert lines[2] == "| none | - | u16 | - | - | - | 1.41 | 1.00 (1) |"
    assert lines[3] == "| 4096 | fixed runs | u16 | - | - | - | 4.00 (1) | - |"
    lines = best_table(ABLATION).splitlines()
    assert (
        lines[2] == "| m | 2000000 | 0.50 | sort, mixed, strips none, u16 | 10 | packs of 2 | 0 |"
    )
    assert lines[3].endswith("| 50 | packs of 2 | 1 |")
    assert best_table(ABLATION[-1:]).splitlines()[2] == "| n | 2000000 | - | - | - | - | 1 |"
    claim = gpu_claims([], ABLATION)[-1]
    assert (claim.found, claim.passed, claim.detail) == ("most 50 of 2", False, "m 50.00")


def test_products_as_tables():
    lines = gpu_product_table(ROWS, "float64", cold=False).splitlines()
    assert lines[2] == (
        "| banded | 2000000 | 1.50 | 20 | 40 | 30 | 50 | 80 | 120 | - | compact: packs of 2 | 50 | "
        "1.50 (cusparse-csr-alg2) |"
    )
    lines = gpu_product_table(ROWS, "float64", cold=False, column="graph_us").splitlines()
    assert "| 100 | 2.40 (cusparse-csr-alg2) |" in lines[2]
    assert lines[3].endswith("| - | - |")
    assert len(gpu_product_table(ROWS, "float64", cold=True).splitlines()) == 2


def test_a_case_on_a_device_is_told():
    rows = [
        row("m", "auto", 20.0, 10.0, over_vendor=0.5, vendor="cupyx"),
        row("m", "cupyx", 10.0, over_vendor=1.0, vendor="cupyx", breakeven=0),
        row("m", "hbp-paper", None, error="left out: too many"),
    ]
    assert case_title(rows).endswith("float64, Some GPU, hot")
    cells = case_cells(rows)
    assert cells[0] == [
        "auto (compact: packs of 2)", "2", "1.5", "20", "20", "20", "10", "1", "1", "50", "0.25",
        "0.5", "never",
    ]  # fmt: skip
    assert cells[2][:2] == ["hbp-paper", "left out"]
    lines = verdict(rows)
    assert lines[0] == "hbp-paper left out: too many"
    assert "HBP LOSES: cupyx is 2.00x as fast as auto" in lines[1]
    assert lines[1].endswith("the build never pays against cupyx")
    assert machine_line([(1 << 20, 6000.0)], gpu="Some GPU") == (
        "Some GPU; copy in GB/s: 1 MiB 6000"
    )
