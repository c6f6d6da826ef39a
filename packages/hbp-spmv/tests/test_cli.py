# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, one line per error, one line of JSON, nothing heavy for help."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from hbp_spmv import load
from hbp_spmv.cli import bench_main, main
from hbp_spmv.generate import powerlaw, stencil5
from hbp_spmv.readers import read
from scipy.sparse import save_npz
from tenfold_core.sparse import write_matrix_market

VERBS = (
    "demo", "bench", "info", "convert", "verify", "select", "calibrate", "generate", "warmup",
)  # fmt: skip
HEAVY = ("torch", "cupy", "matplotlib", "scipy", "polars", "numba", "numpy")
PROBE = """
import sys
from hbp_spmv.cli import bench_main, main
code = bench_main(sys.argv[2:]) if sys.argv[1] == "hbp-bench" else main(sys.argv[2:])
found = sorted(set(sys.modules) & set(%r))
sys.exit(f"loaded {found}" if found else code)
"""


@pytest.fixture
def matrix(tmp_path):
    """A small matrix file, 100 x 100 with 460 entries."""
    path = tmp_path / "grid.mtx"
    write_matrix_market(path, stencil5(10))
    return path


@pytest.fixture
def saved(tmp_path, matrix, capsys):
    """The same, saved in the compact layout."""
    path = tmp_path / "grid.hbp.safetensors"
    assert main(["convert", str(matrix), str(path), "--layout", "compact"]) == 0
    capsys.readouterr()
    return path


def refused(argv, capsys, *, code=2, run=main):
    """Run a command that must fail with one line on stderr, nothing on stdout; return the line."""
    assert run([str(part) for part in argv]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from hbp_spmv.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_numba(code, *arguments):
    """Run code in a process in which numba cannot be imported."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize("verb", ["info", "calibrate", "warmup"])
def test_without_numba_a_verb_that_needs_it_says_so_in_one_line(verb, matrix):
    found = without_numba(WITHOUT_NUMBA, verb, *([matrix] if verb == "info" else []))
    assert (found.returncode, found.stdout) == (2, "")
    assert len(found.stderr.splitlines()) == 1, found.stderr
    assert (
        f"error: {verb} needs compiled kernels, and numba does not work here (Mod" in found.stderr
    )
    assert "pip install numba" in found.stderr


@pytest.mark.parametrize("verb", ["bench", "convert", "generate", "select"])
def test_without_numba_the_other_verbs_work(verb, matrix, tmp_path):
    argv = {
        "bench": [matrix, "--formats", "all", "--min-time", 0, "--repeats", 3, "--threads", 1],
        "convert": [matrix, tmp_path / "x.npz"],
        "generate": ["stencil5", "--n", 4, "--out", tmp_path / "x.mtx"],
        "select": [matrix],
    }[verb]
    found = without_numba(WITHOUT_NUMBA, verb, *argv, "--json")
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    if verb == "bench":
        formats = {row["format"] for row in result["rows"] if row["us"]}
        assert {"auto", "csr-scipy", "coo", "bsr"} <= formats
        assert not formats & {"csr-merge", "sell", "ell", "2d", "sort2D", "DP2D", "hbp-csr"}
        for name in ("hbp-compact", "hbp-csr", "hbp-paper", "csr-merge", "sell", "ell", "DP2D"):
            assert f"left out: {name}: numba does not work here" in found.stderr
            assert f"left out: {name}: numba does not work here" in result["notes"]


def test_without_numba_the_reordering_says_so_and_its_parameters_are_there():
    code = """
import sys
sys.modules["numba"] = None
import hbp_spmv as hbp
from tenfold_core.errors import MissingExtraError
print(hbp.HashParams(s=5).s)
try:
    hbp.reorder([1, 2])
except MissingExtraError as error:
    print(error)
"""
    found = without_numba(code)
    assert found.returncode == 0, found.stderr
    shift, text = found.stdout.splitlines()
    assert shift == "5"
    assert text.startswith("compiled functions need numba, which does not work here (Module")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_is_fast_because_it_loads_nothing(verb):
    command = [sys.executable, "-c", PROBE % (HEAVY,), "hbp-spmv", verb, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


def test_help_of_the_second_command(capsys):
    assert bench_main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("--formats", "--dtype", "--cold", "--resume", "--plot", "-o", "--limit-time"):
        assert name in text


def test_overview_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in VERBS)


def test_info_describes_a_matrix_in_text_and_in_json(matrix, capsys):
    assert main(["info", str(matrix)]) == 0
    assert "100 x 100" in capsys.readouterr().out
    assert main(["info", str(matrix), "--json"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert json.loads(out)["nnz"] == 460


def test_info_describes_a_saved_matrix(saved, capsys):
    assert main(["info", str(saved), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layout"], facts["nnz"]) == ("compact", 460)


@pytest.mark.parametrize("name", ["back.mtx", "back.mtx.gz", "back.npz"])
def test_convert_returns_the_same_matrix(name, matrix, saved, tmp_path, capsys):
    assert main(["convert", str(saved), str(tmp_path / name), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    a, b = read(matrix), read(tmp_path / name)
    assert (a != b).nnz == 0
    assert a.nnz == b.nnz


@pytest.mark.parametrize("layout", ["compact", "paper", "csr", "auto"])
def test_convert_builds_the_layout_that_was_asked_for(layout, matrix, tmp_path, capsys):
    path = tmp_path / "x.hbp.safetensors"
    arguments = ["convert", matrix, path, "--layout", layout, "--hash", "paper", "--dtype", "f32"]
    assert main([str(part) for part in arguments]) == 0
    found = load(path)
    assert found.dtype == np.float32
    assert layout in (found.layout, "auto")
    assert "layout" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["int32", "foo", "float16"])
def test_convert_refuses_types_it_does_not_compute_with(name, matrix, saved, tmp_path, capsys):
    for source in (matrix, saved):
        for target in ("x.mtx", "x.hbp.safetensors"):
            line = refused(["convert", source, tmp_path / target, "--dtype", name], capsys)
            assert f"dtype is {name if name != 'foo' else repr(name)}, expected one of" in line
    assert not list(tmp_path.glob("x.*"))


def test_convert_loses_no_imaginary_part(tmp_path, capsys):
    save_npz(tmp_path / "c.npz", powerlaw(30) * (1 + 2j))
    path = tmp_path / "c.hbp.safetensors"
    assert main(["convert", str(tmp_path / "c.npz"), str(path), "--dtype", "c64"]) == 0
    assert load(path).dtype == np.complex64
    capsys.readouterr()
    line = refused(["convert", path, tmp_path / "x.mtx", "--dtype", "f32"], capsys)
    assert "values are complex, expected real ones for float32" in line


def test_convert_refuses_a_target_it_cannot_write(matrix, tmp_path, capsys):
    assert "expected a name in" in refused(["convert", matrix, tmp_path / "x.docx"], capsys)
    missing = tmp_path / "no" / "x.mtx"
    assert "does not exist" in refused(["convert", matrix, missing], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.mtx"]


def test_verify_passes_on_its_source_and_fails_on_another(matrix, saved, tmp_path, capsys):
    assert main(["verify", str(saved)]) == 0
    assert main(["verify", str(saved), "--against", str(matrix), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["worst"] <= 1
    other = stencil5(10)
    other.data[7] += 1  # rows 0 and 1 hold 3 + 4 entries
    write_matrix_market(tmp_path / "other.mtx", other)
    text = refused(["verify", saved, "--against", tmp_path / "other.mtx"], capsys, code=1)
    assert "grid.hbp.safetensors: row 2:" in text


def test_verify_refuses_a_damaged_file(saved, capsys):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-9])
    assert "grid.hbp.safetensors" in refused(["verify", saved], capsys)
    saved.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert "grid.hbp.safetensors" in refused(["verify", saved], capsys)
    saved.write_bytes(b"not a tensor file")
    assert "grid.hbp.safetensors" in refused(["info", saved], capsys)


def test_select_says_why(matrix, capsys):
    assert main(["select", str(matrix), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["format"] in ("csr", "compact")
    assert plan["reasons"]


@pytest.mark.parametrize(
    ("argv", "shape"),
    [
        (["stencil7", "--n", "5"], (125, 125)),
        (["rmat", "--n", "6", "--edge-factor", "4"], (64, 64)),
        (["delaunay_p1", "--n", "50", "--seed", "3"], (50, 50)),
        (["transport", "--n", "3", "--sinks", "4"], (7, 12)),
        (["powerlaw", "--n", "40", "--shortest", "2", "--exponent", "2.5"], (40, 40)),
        (["banded", "--n", "60", "--per-row", "3", "--bandwidth", "9"], (60, 60)),
    ],
)
def test_generate_writes_what_was_asked_for(argv, shape, tmp_path, capsys):
    path = tmp_path / "m.mtx.gz"
    assert main(["generate", *argv, "-o", str(path), "--json"]) == 0
    assert tuple(json.loads(capsys.readouterr().out)["shape"]) == shape
    assert read(path).shape == shape


def test_generate_repeats_itself_for_a_seed(tmp_path):
    for name in ("a.mtx", "b.mtx"):
        argv = ["generate", "powerlaw", "--n", "50", "--seed", "5", "-o", str(tmp_path / name)]
        assert main(argv) == 0
    assert (tmp_path / "a.mtx").read_bytes() == (tmp_path / "b.mtx").read_bytes()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["generate", "nothing", "-o", "x.mtx"], "'nothing' is not known"),
        (["generate", "rmat", "--per-row", "3", "-o", "x.mtx"], "does not take 'per_row'"),
        (["generate", "stencil5", "--n", "0", "-o", "x.mtx"], "n is 0"),
        (["generate", "stencil7", "--n", "1000000", "-o", "x.mtx"], "the memory of this machine"),
        (["generate", "stencil5", "-o", "x.parquet"], "expected a name in"),
        (["bench", "--formats", "csr-nope"], "'csr-nope' is not known, expected all, auto"),
        (["bench", "--dtype", "f16"], "'f16' is not known"),
        (["bench", "--dtype", ","], "found none"),
        (["bench", "--threads", "two"], "'two' is not a number"),
        (["bench", "--threads", "0"], "found 0"),
        (["bench", "--repeats", "1"], "repeats is 1"),
        (["bench", "--n-products", "0"], "n-products is 0"),
        (["bench", "--hot", "--cold"], "exclude each other"),
        (["bench", "--seed", "-1"], "seed is -1"),
        (["bench", "--resume"], "nothing to resume without --out"),
        (["bench", "--device", "tpu"], "'tpu'"),
        (["bench", "--out", "x.xlsx"], "expected a folder or a name in"),
        (["bench", "--out", "no/x.csv"], "does not exist"),
        (["bench", "--plot", "x.docx"], "expected a name in .svg"),
        (["bench", "@suite"], "give --suite DIR or set the variable HBP_MATRICES"),
        (["bench", "@suite", "--suite", "nowhere"], "nowhere: not a folder"),
        (["bench", "missing.mtx"], "missing.mtx: no such file"),
        (["bench", "--max-memory", "lots"], "'lots' is not a size"),
        (["demo", "--out", "x.csv"], "expected a folder"),
        (["info", "missing.mtx"], "missing.mtx"),
        (["verify", "missing.hbp.safetensors"], "missing.hbp.safetensors"),
        (["bench", "--formts", "all"], "did you mean --formats"),
        (["benhc"], "did you mean 'bench'"),
        ([], "expected a command"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(argv, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HBP_MATRICES", raising=False)
    assert text in refused(argv, capsys)
    assert list(tmp_path.iterdir()) == []


HEADER = "%%MatrixMarket matrix coordinate"
BAD = {
    "no-banner.mtx": ("3 3 1\n1 1 1.0\n", "--no-banner"),
    "truncated.mtx": (f"{HEADER} real general\n3 3 3\n1 1 1.0\n", "3 entries"),
    "index-zero.mtx": (f"{HEADER} real general\n3 3 1\n0 1 1.0\n", "index-zero.mtx:3"),
    "index-beyond.mtx": (f"{HEADER} real general\n3 3 1\n1 4 1.0\n", "index-beyond.mtx:3"),
    "huge.mtx": (f"{HEADER} real general\n100000000000 3 1\n1 1 1.0\n", "GB"),
    "many.mtx": (f"{HEADER} real general\n3 3 100000000000\n1 1 1.0\n", "100000000000 entries"),
    "oblong.mtx": (f"{HEADER} real symmetric\n3 4 1\n1 1 1.0\n", "symmetric"),
    "skew.mtx": (f"{HEADER} real skew-symmetric\n2 2 1\n1 1 1.0\n", "diagonal"),
    "inexact.mtx": (f"{HEADER} integer general\n1 1 1\n1 1 9007199254740993\n", "2**53"),
    "word.mtx": (f"{HEADER} real general\n1 1 1\n1 1 one\n", "word.mtx:3"),
    "empty.mtx": ("", "empty"),
    "what.bin": ("x", "names no format"),
    "list.txt": ("1 2\n3\n", "list.txt:2"),
    "edges.el": ("-1 2\n", "edges.el:1"),
}


@pytest.mark.parametrize("verb", ["info", "select", "bench", "convert"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_in_one_line_and_nothing_is_written(name, verb, tmp_path, capsys):
    text, expected = BAD[name]
    path = tmp_path / name
    path.write_text(text, encoding="ascii")
    argv = [verb, path]
    argv += {"convert": [tmp_path / "x.hbp.safetensors"], "bench": ["--out", tmp_path / "o"]}.get(
        verb, []
    )
    line = refused(argv, capsys)
    assert name in line
    assert expected in line
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_a_cut_gzip_stream_is_named(tmp_path, matrix, capsys):
    path = tmp_path / "cut.mtx.gz"
    path.write_bytes(gzip.compress(matrix.read_bytes())[:-40])
    assert "cut.mtx.gz" in refused(["info", path], capsys)


def test_reading_options_reach_the_reader(tmp_path, capsys):
    path = tmp_path / "twice.mtx"
    path.write_text(f"{HEADER} real general\n2 2 3\n1 1 1.0\n1 1 2.0\n2 1 0.0\n", encoding="ascii")
    assert "--no-sum" in refused(["info", path, "--no-sum"], capsys)
    assert main(["info", str(path), "--drop-zeros", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["nnz"], facts["duplicates"]) == (1, 1)
    path.write_text(f"{HEADER} real general\n2 2 1\n1 1 nan\n", encoding="ascii")
    assert "--finite" in refused(["info", path, "--finite"], capsys)
    assert main(["info", str(path)]) == 0
    assert capsys.readouterr().err.startswith("hbp-spmv: warning: ")
    path.write_text("2 2 1\n1 1 1.0\n", encoding="ascii")
    assert main(["info", str(path), "--no-banner"]) == 0
    capsys.readouterr()
    assert "limit is" in refused(["info", path, "--no-banner", "--max-memory", "1"], capsys)
    edges = tmp_path / "edges.dat"
    edges.write_text("0 1\n1 2\n", encoding="ascii")
    capsys.readouterr()
    assert main(["info", str(edges), "--edgelist", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [3, 3]


def test_other_formats_are_read(tmp_path, capsys):
    save_npz(tmp_path / "p.npz", powerlaw(30))
    assert main(["select", str(tmp_path / "p.npz"), "--threads", "1", "--n-products", "5"]) == 0
    assert "format" in capsys.readouterr().out
