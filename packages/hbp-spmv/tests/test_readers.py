# SPDX-License-Identifier: Apache-2.0
import gzip
import hashlib
import io
import os
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hbp_spmv.errors import ReadError
from hbp_spmv.readers import ReadInfo, read, read_with_info
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy.io import savemat
from tenfold_core.errors import ConfigError, InputError, TenfoldError, TenfoldWarning
from tenfold_core.sparse import CSR

BANNER = "%%MatrixMarket matrix coordinate"
IGNORE_BETA = pytest.mark.filterwarnings("ignore::UserWarning")  # what torch says of its layouts


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


@pytest.fixture
def example():
    """Three by four, with an explicit zero at (1, 3) and an empty last row."""
    return sp.csr_array(([5.0, 6.0, 0.0], ([0, 1, 1], [2, 0, 3])), shape=(3, 4))


def same(matrix, expected):
    expected = sp.csr_array(expected)
    expected.sort_indices()
    assert isinstance(matrix, sp.csr_array)
    assert matrix.has_canonical_format
    assert matrix.shape == expected.shape
    assert_array_equal(matrix.indptr, expected.indptr)
    assert_array_equal(matrix.indices, expected.indices)
    assert_array_equal(matrix.data, expected.data)


def test_matrix_market_reads_with_its_counts(write):
    text = f"{BANNER} real symmetric\n% a comment\n3 3 4\n1 1 2\n2 1 3\n3 2 0\n2 1 4\n"
    matrix, info = read_with_info(path := write("a.mtx", text), sha256=True)
    assert_array_equal(matrix.toarray(), [[2, 7, 0], [7, 0, 0], [0, 0, 0]])
    assert matrix.indices.dtype == matrix.indptr.dtype == np.int32
    assert info == ReadInfo(
        format="matrix-market",
        header=f"{BANNER} real symmetric\n% a comment",
        shape=(3, 3),
        stored_entries=4,
        expanded_entries=7,
        nnz=5,
        duplicates=2,
        explicit_zeros=2,
        non_finite=0,
        symmetry="symmetric",
        source=str(path),
        index_base=1,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


@pytest.mark.parametrize(
    ("kind", "entries", "expected"),
    [
        ("pattern general", "2 1", [[0, 0], [1, 0]]),
        ("integer general", "2 1 -7", [[0, 0], [-7, 0]]),
        ("real skew-symmetric", "2 1 3", [[0, -3], [3, 0]]),
        ("complex hermitian", "2 1 3 4", [[0, 3 - 4j], [3 + 4j, 0]]),
        ("complex general", "2 1 3 4", [[0, 0], [3 + 4j, 0]]),
    ],
)
def test_matrix_market_fields_and_symmetries_are_expanded(write, kind, entries, expected):
    matrix = read(write("a.mtx", f"{BANNER} {kind}\n2 2 1\n{entries}\n"))
    assert_array_equal(matrix.toarray(), expected)
    assert matrix.dtype == (np.complex128 if kind.startswith("complex") else np.float64)


def test_matrix_market_array_files_become_sparse(write):
    text = "%%MatrixMarket matrix array real general\n2 2\n1\n0\n0\n4\n"
    assert_array_equal(read(write("a.mtx", text)).toarray(), [[1, 0], [0, 4]])


@pytest.mark.parametrize("name", ["a.mtx", "a.mtx.gz", "a.txt", "a"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_banner_and_compression_count_more_than_the_name(write, name, packed):
    text = f"{BANNER} real general\n1 2 1\n1 2 3\n".encode()
    matrix = read(write(name, gzip.compress(text) if packed else text))
    assert_array_equal(matrix.toarray(), [[0, 3]])


def test_no_banner_reads_a_file_that_starts_with_its_size_line(write):
    assert_array_equal(
        read(write("a.mtx", "2 2 1\n2 1 5\n"), banner=False).toarray(), [[0, 0], [5, 0]]
    )


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (2, 3), (1, 4), (4, 1)])
def test_empty_matrices_keep_their_shape_in_every_format(write, tmp_path, shape):
    empty = sp.csr_array(shape)
    text = f"{BANNER} real general\n{shape[0]} {shape[1]} 0\n"
    sources = [write("a.mtx", text), empty, empty.tocoo(), empty.tocsc()]
    sp.save_npz(tmp_path / "a.npz", empty)
    sources.append(tmp_path / "a.npz")
    for source in sources:
        matrix = read(source)
        assert matrix.shape == shape
        assert matrix.nnz == 0
        assert_array_equal(matrix @ np.ones(shape[1]), np.zeros(shape[0]))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1 1\n1 1 1\n", r"a\.mtx:1: .*expected a '%%MatrixMarket' banner.*--no-banner"),
        (f"{BANNER} real general\n2 2 2\n1 1 1\n", "expected|promises 2 entries, found 1"),
        (f"{BANNER} real general\n2 2 1\n0 1 1\n", r"a\.mtx:3: row 0 is outside 1\.\.2"),
        (f"{BANNER} real general\n2 2 1\n1 3 1\n", r"a\.mtx:3: column 3 is outside 1\.\.2"),
        (f"{BANNER} real symmetric\n2 3 1\n1 1 1\n", r"a\.mtx:2: .*expected a square one"),
        (f"{BANNER} integer general\n1 1 1\n1 1 9007199254740993\n", r"beyond 2\*\*53"),
        (f"{BANNER} real general\n1 1 1\n1 1 x\n", r"a\.mtx:3: "),
    ],
)
def test_matrix_market_faults_name_file_and_line(write, text, message):
    with pytest.raises(ReadError, match=message):
        read(write("a.mtx", text))


@pytest.mark.bad_input
def test_a_truncated_gzip_stream_is_refused_with_counts(write):
    entries = "".join(f"{i % 1000 + 1} {i * 7 % 1000 + 1} {i}.5\n" for i in range(1000))
    packed = gzip.compress(f"{BANNER} real general\n1000 1000 1000\n{entries}".encode())
    with pytest.raises(ReadError, match=r"compressed data end early.*expected 1000 entries, found"):
        read(write("a.mtx.gz", packed[:-2000]))


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("% comment\n3 2\n2\n1 3\n2\n", (1, 1)),
        ("3 2 0\n2\n% between\n1 3\n2\n\n\n", (1, 1)),
        ("3 2 1\n2 5\n1 5 3 7\n2 7\n", (5, 7)),
        ("3 2 001\n2 .5\n1 .5 3 -7e0\n2 -7\n", (0.5, -7)),
        ("3 2 10\n9 2\n9 1 3\n9 2\n", (1, 1)),
        ("3 2 011 2\n8 9 2 5\n8 9 1 5 3 7\n8 9 2 7\n", (5, 7)),
        ("3 2 111\n4 9 2 5\n4 9 1 5 3 7\n4 9 2 7", (5, 7)),
        ("3 2 100\r\n4 2\r\n4 1 3\r\n4 2\r\n", (1, 1)),
    ],
)
def test_metis_formats_describe_the_same_path(write, text, weights):
    matrix, info = read_with_info(write("a.graph", text))
    a, b = weights
    assert_array_equal(matrix.toarray(), [[0, a, 0], [a, 0, b], [0, b, 0]])
    assert (info.format, info.symmetry, info.index_base) == ("metis", "symmetric", 1)
    assert (info.stored_entries, info.nnz) == (4, 4)
    assert info.header.startswith("3 2")


def test_metis_blank_lines_are_vertices_without_neighbours(write):
    assert_array_equal(
        read(write("a.graph", "4 1\n\n3\n2\n\n")).toarray(),
        [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
    )
    assert read(write("b.graph", "0 0\n")).shape == (0, 0)
    assert read(write("c.graph.gz", gzip.compress(b"2 0\n\n\n"))).shape == (2, 2)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("% only\n", "found no header, expected 'vertices edges"),
        ("3\n", r"a\.graph:1: the header is '3'"),
        ("three two\n", r"a\.graph:1: the header is 'three two'"),
        ("-3 2\n", r"a\.graph:1: the header is '-3 2'"),
        ("3 2 5\n", "fmt of three digits 0 or 1"),
        ("3 2 1 2\n", "ncon only if its second digit is 1"),
        ("3 2\n2\n1 4\n2\n", r"a\.graph:3: neighbour 4 is outside 1\.\.3"),
        ("3 2\n2\n% note\n1 0\n2\n", r"a\.graph:4: neighbour 0 is outside 1\.\.3"),
        ("3 2\n2\n1 2.5\n2\n", r"a\.graph:3: neighbour 2\.5 is outside"),
        ("3 2\n2\n1 x\n2\n", r"a\.graph:3: found 'x', expected a number"),
        ("3 3\n2\n1 3\n2\n", "found 4 neighbours, expected 6 for the 3 edges of line 1"),
        ("3 1\n2\n1 3\n2\n", "found 4 or more neighbours, expected 2"),
        ("4 2\n2\n1 3\n2\n", "found 3 vertex lines, expected 4; the file is truncated"),
        ("3 2\n2\n1 3\n2\n4\n", r"a\.graph:5: a line for vertex 4, expected 3"),
        ("3 2 1\n2 5\n1 5 3\n2 7\n", r"a\.graph:3: found 3 words, .*pairs of neighbour and edge"),
        ("2 1 10 3\n1 2\n1 1 1 1\n", r"a\.graph:2: found 2 words, expected at least 3"),
        ("3 1\n2 3\n\n\n", "vertex 1 lists 2 as its neighbour, but 2 lists 1 not at all"),
        ("2 1 1\n2 3\n1 4\n", "2 lists 1 with another weight"),
    ],
)
def test_metis_faults_name_file_and_line(write, text, message):
    with pytest.raises(ReadError, match=message):
        read(write("a.graph", text))


@pytest.mark.parametrize(
    ("name", "text", "base"),
    [
        ("a.el", "0 1\n2 1\n", 0),
        ("a.el", "1 2\n3 2\n", 1),
        ("a.txt", "# comment\n% another\n\n1\t2\n3\t2", 1),
        ("a.tsv", "0\t1\r\n2\t1\r\n", 0),
        ("a.csv", "source,target\n0, 1\n2, 1\n", 0),
        ("a.edges", "  1 2 1.0\n  3 2 1\n", 1),
        ("a.csv", "from,to,weight\n1,2,1e0\n3,2,1.0\n", 1),
    ],
)
def test_edge_lists_in_their_dialects_describe_the_same_graph(write, name, text, base):
    matrix, info = read_with_info(write(name, text))
    assert_array_equal(matrix.toarray(), [[0, 1, 0], [0, 0, 0], [0, 1, 0]])
    assert (info.format, info.index_base, info.symmetry) == ("edgelist", base, "general")


def test_edge_lists_sum_repeated_edges_and_keep_their_comments(write):
    text = "# Nodes: 2\nu v\n0 1 2.5\n0 1 0.5\n1 0 0\n"
    matrix, info = read_with_info(write("a.data", text), edgelist=True)
    assert_array_equal(matrix.toarray(), [[0, 3], [0, 0]])
    assert (info.stored_entries, info.nnz, info.duplicates, info.explicit_zeros) == (3, 2, 1, 1)
    assert info.header == "# Nodes: 2\nu v"


def test_text_longer_than_a_block_reads_like_one_block(write, monkeypatch):
    edges = np.random.default_rng(0).integers(0, 500, size=(3000, 2))
    graph = write("a.el.gz", gzip.compress("".join(f"{u} {v}\n" for u, v in edges).encode()))
    ring = "".join(f"{(i - 1) % 999 + 1} {(i + 1) % 999 + 1}\n%\n" for i in range(999))
    metis = write("a.graph", "%\n" * 90 + "999 999\n" + ring)
    whole = read(graph), read(metis)
    monkeypatch.setattr("hbp_spmv.readers.text._BLOCK_BYTES", 64)
    monkeypatch.setattr("hbp_spmv.readers.text._READ_BYTES", 64)
    same(read(graph), whole[0])
    same(read(metis), whole[1])
    with pytest.raises(ReadError, match=r"b\.el:2001: found 'x'"):
        read(write("b.el", "0 1\n" * 2000 + "1 x\n"))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2\n3 x\n", r"a\.el:2: found 'x', expected a number"),
        ("1 2\n3\n", r"a\.el:2: found 1 words, expected 2 as in the lines before"),
        ("1 2\n\n3 4 5\n", r"a\.el:3: found 3 words, expected 2"),
        ("1 2 3 4\n", r"a\.el:1: found 4 words, expected 2 or 3"),
        ("# note\n0 1\n-1 2\n", r"a\.el:3: found '-1 2', expected two vertex numbers"),
        ("0 1\n1.5 2\n", r"a\.el:2: found '1\.5 2', expected two vertex numbers"),
        ("0 1\nnan 2\n", r"a\.el:2: found 'nan 2', expected two vertex numbers"),
        ("0 1 9007199254740993\n", r"a\.el:1: integer '9007199254740993' is beyond 2\*\*53"),
        ("0 1 0.5\n0 1 9007199254740993\n", r"a\.el:2: integer '9007199254740993' is beyond"),
        ("0 99999999999999999999\n", r"a\.el:1: integer '9{20}' is beyond"),
        ("# only a comment\n", "found no edge, expected lines 'from to"),
        ("0 1\n2\x003 4\n", r"a\.el:2: found '2\\x003'"),
    ],
)
def test_edge_list_faults_name_file_and_line(write, text, message):
    with pytest.raises(ReadError, match=message):
        read(write("a.el", text))


@pytest.mark.bad_input
def test_a_truncated_edge_list_is_refused(write):
    packed = gzip.compress("".join(f"{i} {i * i % 1009}\n" for i in range(1000)).encode())
    with pytest.raises(ReadError, match="compressed data end early or are damaged in line"):
        read(write("a.el.gz", packed[:-100]))


@pytest.mark.bad_input
def test_a_banner_is_not_read_as_a_comment_of_an_edge_list(write):
    with pytest.raises(ReadError, match=r"a\.mtx:1: found a Matrix Market banner.*--edgelist"):
        read(write("a.mtx", f"{BANNER} real general\n1 1 1\n1 1 1\n"), edgelist=True)


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia"])
def test_npz_archives_of_every_kind_round_trip(tmp_path, kind):
    expected = sp.csr_array([[1.0, 2, 0, 0], [0, 3, 4, 0]])
    sp.save_npz(tmp_path / "a.npz", expected.asformat(kind))
    matrix, info = read_with_info(tmp_path / "a.npz")
    matrix.eliminate_zeros()  # bsr fills its blocks
    same(matrix, expected)
    assert info.format == "npz"
    assert info.header == f"scipy.sparse {kind} 2 x 4"


def test_npz_keeps_explicit_zeros_unless_told_otherwise(tmp_path, example):
    sp.save_npz(tmp_path / "a.npz", example, compressed=False)
    matrix, info = read_with_info(tmp_path / "a.npz")
    same(matrix, example)
    assert info.explicit_zeros == 1
    assert read(tmp_path / "a.npz", drop_zeros=True).nnz == 2


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": None}, "expected 'format', 'shape' and 'data'; write the file with"),
        ({"indices": None}, "array 'indices' is missing"),
        ({"format": b"elf"}, "format is 'elf', expected csr"),
        ({"format": 3.5}, "format is '\\?', expected csr"),
        ({"shape": [2, 3, 1]}, r"shape is \[2, 3, 1\], expected two counts"),
        ({"shape": [-2, 3]}, r"shape is \[-2, 3\], expected two counts"),
        ({"shape": [2.0, 3.0]}, "expected two counts"),
        ({"indptr": [0, 1]}, r"indptr has 2 entries, expected rows \+ 1 = 3"),
        ({"indptr": [1, 1, 3]}, "indptr starts with 1, expected 0"),
        ({"indptr": [0, 4, 3]}, "indptr falls from 4 to 3 at row 1"),
        ({"indptr": [0, 1, 9]}, "indptr ends with 9, but indices has 3 entries"),
        ({"indptr": [0.0, 1.0, 3.0]}, "indptr is 1-D of dtype float64"),
        ({"indices": [0, 3, 1]}, r"indices\[1\] = 3 in row 1, expected 0 <= column < 3"),
        ({"indices": [0, -1, 1]}, r"indices\[1\] = -1 in row 1"),
        ({"data": np.array([1, 2, None])}, "holds pickled Python objects, expected numbers"),
        ({"data": np.array(["a", "b", "c"])}, "values are of dtype <U1, expected numbers"),
        ({"data": [1, 2, 2**53 + 1]}, r"integer 9007199254740993 is beyond 2\*\*53"),
        ({"data": np.ones(3, np.longdouble)}, "values are of dtype float128|longdouble"),
        ({"format": b"csc", "indptr": [0, 1, 3]}, "the arrays do not fit together"),
        ({"format": b"csc", "indptr": [0, 1, 1, 3], "indices": [0, 1, 7]}, "do not fit together"),
        ({"format": b"coo", "row": [0, 1], "col": [0, 1, 2]}, "2 row indices for 3 values"),
        ({"format": b"coo", "row": [0, 1, 2], "col": [0, 1, 2]}, r"row 2 of entry 2 is outside 0"),
        (
            {"format": b"coo", "row": [0, 1, 1.0], "col": [0, 1, 2]},
            "row indices are 1-D of dtype float64",
        ),
        ({"format": b"csc", "indptr": [0, 9, 9, 0]}, "indptr falls from 9 to 0 at row 2"),
        ({"format": b"bsr"}, "data is 1-D, expected 3-D for bsr"),
        ({"format": b"bsr", "data": np.ones((3, 2, 2))}, "blocks of 2 x 2 in a matrix of 2 x 3"),
        ({"format": b"dia", "offsets": [0, 0], "data": np.ones((2, 3))}, "do not fit together"),
    ],
)
def test_npz_faults_are_found_before_the_arrays_are_used(tmp_path, changed, message):
    arrays = {
        "format": b"csr",
        "shape": [2, 3],
        "indptr": [0, 1, 3],
        "indices": [0, 1, 2],
        "data": [1.0, 2.0, 3.0],
    } | changed
    path = npz(tmp_path / "a.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(ReadError, match=message):
        read(path)


@pytest.mark.bad_input
def test_damaged_archives_are_refused(tmp_path, write, example):
    sp.save_npz(tmp_path / "a.npz", example)
    whole = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(ReadError, match=r"b\.npz: the archive is damaged"):
        read(write("b.npz", whole[: len(whole) // 2]))
    with pytest.raises(ReadError, match=r"c\.npz: the archive is damaged"):
        read(write("c.npz", "not a zip file"))
    start = whole.index(b"data.npy") + 60
    flipped = (
        whole[:start] + bytes(255 - byte for byte in whole[start : start + 4]) + whole[start + 4 :]
    )
    with pytest.raises(ReadError, match=r"d\.npz: "):
        read(write("d.npz", flipped))


@pytest.mark.bad_input
def test_an_npz_array_shorter_than_its_header_says_is_refused(tmp_path):
    stream = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**11,)}
    np.lib.format.write_array_header_1_0(stream, header)
    npz(tmp_path / "a.npz", format=b"csr", shape=[1, 1], indptr=[0, 1], indices=[0])
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("data.npy", stream.getvalue() + bytes(8))
    with pytest.raises(ReadError, match="array 'data' has 8 bytes, expected 800000000000"):
        read(tmp_path / "a.npz")


def test_mat_reads_the_first_sparse_variable_or_the_named_one(tmp_path, example):
    path = tmp_path / "a.mat"
    content = {
        "n": np.eye(2),
        "A": example,
        "B": sp.csc_array([[0, 7.0]]),
        "C": sp.csc_array([[1j]]),
    }
    savemat(path, content, do_compression=True)
    matrix, info = read_with_info(path)
    same(matrix, example)
    assert info.header == "A: sparse 3 x 4 of 4 variables"
    assert_array_equal(read(f"{path}:B").toarray(), [[0, 7]])
    assert_array_equal(read(f"{path}:C").toarray(), [[1j]])


def test_mat_version_4_files_are_read(tmp_path, example):
    savemat(tmp_path / "a.mat", {"A": example}, format="4")
    assert_array_equal(read(tmp_path / "a.mat").toarray(), example.toarray())


@pytest.mark.bad_input
def test_mat_errors_list_the_variables(tmp_path):
    path = tmp_path / "a.mat"
    savemat(path, {"n": np.eye(2), "s": "text"})
    with pytest.raises(
        ReadError, match=r"found n \(double 2 x 2\), s \(char 1 x 4\), expected a sparse"
    ):
        read(path)
    with pytest.raises(ReadError, match=r"expected a sparse variable 'n'; choose one as"):
        read(f"{path}:n")


@pytest.mark.bad_input
def test_mat_files_of_version_7_3_are_refused_with_the_way_out(write):
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"\x89HDF\r\n\x1a\n"
    with pytest.raises(ReadError, match=r"MATLAB 7\.3 \(HDF5\) file, .*'-v7'"):
        read(write("a.mat", head))
    with pytest.raises(ReadError, match="HDF5"):
        read(write("b.mat", b"\x89HDF\r\n\x1a\n" + bytes(600)))


@pytest.mark.bad_input
def test_damaged_mat_files_are_refused(tmp_path, write, example):
    for packed in (False, True):
        savemat(tmp_path / "a.mat", {"A": example}, do_compression=packed)
        whole = (tmp_path / "a.mat").read_bytes()
        with pytest.raises(ReadError, match=r"b\.mat: \d+ bytes, expected \d+ or more"):
            read(write("b.mat", whole[:-20]))
    flipped = whole[:150] + bytes(255 - byte for byte in whole[150:160]) + whole[160:]
    with pytest.raises(ReadError, match=r"c\.mat: the compressed variable at byte 128 is damaged"):
        read(write("c.mat", flipped))
    with pytest.raises(ReadError, match=r"d\.mat: cannot be read as a MATLAB file"):
        read(write("d.mat", "hello"))


def mat5(order, **changed):
    """Write [[0, 3 + 4j], [5, 0]] as a MATLAB 5 file, element by element."""
    elements = {
        "flags": (6, np.array([0x0805, 2], order + "u4")),
        "dims": (5, np.array([2, 2], order + "i4")),
        "name": (1, np.frombuffer(b"A", "i1")),
        "rows": (5, np.array([1, 0], order + "i4")),
        "starts": (5, np.array([0, 1, 2], order + "i4")),
        "real": (9, np.array([5, 3], order + "f8")),
        "imaginary": (2, np.array([0, 4], order + "u1")),
    } | changed
    body = b""
    for kind, content in elements.values():
        data = content.tobytes()
        tag = np.array([kind, len(data)], order + "u4").tobytes()
        body += tag + data + bytes(-len(data) % 8)
    mark = b"\x00\x01IM" if order == "<" else b"\x01\x00MI"
    tag = np.array([14, len(body)], order + "u4").tobytes()
    return b"MATLAB 5.0 MAT-file".ljust(124) + mark + tag + body


@pytest.mark.parametrize("order", ["<", ">"])
def test_mat_files_of_both_byte_orders_are_read(write, order):
    matrix = read(write("a.mat", mat5(order)))
    assert_array_equal(matrix.toarray(), [[0, 3 + 4j], [5, 0]])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"flags": (6, np.array([5], "<u4"))}, "a variable without dimensions"),
        ({"dims": (5, np.array([-2, 2], "<i4"))}, r"dimensions \[-2, 2\]; the file is damaged"),
        ({"dims": (5, np.array([1, 2], "<i4"))}, r"a\.mat:A: indices\[0\] = 1 in row 0"),
        ({"rows": (9, np.array([1.0, 0], "<f8"))}, "indices are floating point"),
        ({"rows": (16, np.array([1, 0], "<i4"))}, "an element of type 16 with 8 bytes, expected"),
        ({"rows": (9, np.array([1], "<i4"))}, "an element of type 9 with 4 bytes, expected"),
        ({"starts": (5, np.array([0, 1, 3], "<i4"))}, "2 row indices and 2 values, expected 3"),
        ({"imaginary": (2, np.array([4], "<u1"))}, "2 real and 1 imaginary parts"),
        ({"real": (1 | 7 << 16, np.array([5, 3]))}, "an element of 7 bytes at"),
    ],
)
def test_mat_elements_that_contradict_each_other_are_refused(write, changed, message):
    with pytest.raises(ReadError, match=message):
        read(write("a.mat", mat5("<", **changed)))


@pytest.mark.bad_input
def test_mat_variables_that_end_early_are_refused(write):
    elements = mat5("<")
    length = np.array([len(elements) - 136 - 16], "<u4").tobytes()
    with pytest.raises(ReadError, match=r"a\.mat:A: ends after \d+ bytes, expected a further"):
        read(write("a.mat", elements[:132] + length + elements[136:-16]))


@pytest.mark.bad_input
def test_mat_pointers_of_a_matrix_without_entries_are_checked(tmp_path):
    # SciPy's own conversion crashed the interpreter on these: columns (0, 9, 0), no entries
    savemat(tmp_path / "a.mat", {"A": sp.csc_array((3, 2))})
    content = bytearray((tmp_path / "a.mat").read_bytes())
    pointers = content.rindex(bytes.fromhex("050000000c000000") + bytes(12))
    content[pointers + 12] = 9
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(ReadError, match=r"a\.mat:A: indptr falls from 9 to 0 at row 1"):
        read(tmp_path / "a.mat")


def test_mat_reads_logical_and_complex_values(tmp_path):
    for kind in (bool, complex, float):
        expected = sp.csc_array(np.array([[1, 0, 1], [0, 1, 0]])).astype(kind)
        savemat(tmp_path / "a.mat", {"A": expected})
        assert_array_equal(read(tmp_path / "a.mat").toarray(), expected.toarray())


@pytest.mark.bad_input
def test_a_mat_variable_that_unpacks_beyond_the_limit_is_refused(tmp_path):
    zeros = sp.csc_array((np.zeros(300_000), np.zeros(300_000, int), [0, 300_000]), shape=(1, 1))
    savemat(tmp_path / "a.mat", {"A": zeros}, do_compression=True)
    with pytest.raises(ReadError, match="when unpacked, which is the limit; raise --max-memory"):
        read(tmp_path / "a.mat", max_memory=1 << 20)
    assert read(tmp_path / "a.mat", max_memory=1 << 28).nnz == 1


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
@pytest.mark.parametrize("family", ["array", "matrix"])
def test_scipy_objects_of_every_format_are_taken(kind, family):
    dense = [[1.0, 2, 0, 0], [0, 3, 4, 0]]
    source = getattr(sp, f"{kind}_{family}")(dense)
    matrix, info = read_with_info(source)
    matrix.eliminate_zeros()
    same(matrix, dense)
    assert info.format == "scipy"
    assert info.source is None


def test_unsorted_read_only_and_strided_arrays_are_read_and_left_alone():
    data = np.array([1.0, 9, 2, 9, 3, 9, 4])[::2]
    indices = np.array([2, 0, 0, 1], dtype=np.int64)
    indptr = np.array([0, 3, 4], dtype=np.int64)
    source = sp.csr_array((2, 3))
    source.data, source.indices, source.indptr = data, indices, indptr
    before = data.copy(), indices.copy(), indptr.copy()
    for array in (data, indices, indptr):
        array.flags.writeable = False
    matrix, info = read_with_info(source)
    assert_array_equal(matrix.toarray(), [[5, 0, 1], [0, 4, 0]])
    assert info.duplicates == 1
    assert not np.shares_memory(matrix.data, data)
    matrix.data[:] = 0
    for array, kept in zip((source.data, source.indices, source.indptr), before, strict=True):
        assert_array_equal(array, kept)


def test_a_canonical_scipy_matrix_is_copied(example):
    matrix = read(example)
    same(matrix, example)
    assert not np.shares_memory(matrix.indices, example.indices)
    assert not np.shares_memory(matrix.indptr, example.indptr)
    assert not np.shares_memory(matrix.data, example.data)


@pytest.mark.parametrize(
    ("given_type", "kept_type"),
    [
        ("?", "f8"),
        ("i1", "f8"),
        ("u8", "f8"),
        ("f2", "f4"),
        ("f4", "f4"),
        (">f8", "f8"),
        ("c8", "c8"),
    ],
)
def test_value_types_become_floating_types_that_hold_them(given_type, kept_type):
    matrix = read(CSR((2, 2), [0, 1, 2], [0, 1], np.ones(2, given_type)))
    assert matrix.dtype == np.dtype(kept_type)
    assert matrix.dtype.isnative


def test_the_validated_container_of_the_core_is_taken():
    same(read(CSR((1, 2), [0, 2], [1, 0], [3.0, 4.0])), [[4.0, 3.0]])


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", ["csr", "csc", "bsr", "coo"])
def test_scipy_objects_with_indices_outside_are_refused(kind):
    source = sp.coo_array(np.eye(4)).asformat(kind)
    wrong = source.coords[1] if kind == "coo" else source.indices
    wrong[-1] = 10_000_000
    with pytest.raises(ReadError, match=r"scipy .*: "):
        read(source)


@pytest.mark.bad_input
def test_objects_of_other_kinds_are_refused():
    with pytest.raises(ReadError, match=r"ndarray: expected a path.*scipy\.sparse\.csr_array"):
        read(np.eye(2))
    with pytest.raises(ReadError, match="NoneType: expected a path"):
        read(None)
    with pytest.raises(ReadError, match="1 dimensions, expected 2"):
        read(sp.coo_array([1.0, 2.0]))


@IGNORE_BETA
def test_torch_layouts_give_the_same_matrix():
    torch = pytest.importorskip("torch")
    dense = torch.tensor([[0.0, 2, 0, 0], [3, 0, 0, 4]], dtype=torch.float32)
    sources = [
        dense.to_sparse_csr(),
        dense.to_sparse_coo(),
        dense.to_sparse_csc(),
        dense.to_sparse_bsr((1, 2)),
        dense.to_sparse_csr().requires_grad_(),
    ]
    for source in sources:
        matrix, info = read_with_info(source)
        matrix.eliminate_zeros()
        same(matrix, dense.numpy())
        assert matrix.dtype == np.float32
        assert info.format == "torch"


@IGNORE_BETA
def test_torch_values_keep_their_meaning():
    torch = pytest.importorskip("torch")
    place = torch.tensor([[0, 0], [1, 1]])
    summed, info = read_with_info(torch.sparse_coo_tensor(place, torch.tensor([1.0, 2.0]), (1, 2)))
    assert_array_equal(summed.toarray(), [[0, 3]])
    assert info.duplicates == 1
    half = torch.sparse_coo_tensor(place, torch.tensor([1.5, 2.0], dtype=torch.bfloat16), (1, 2))
    assert read(half).dtype == np.float32
    conjugate = torch.sparse_coo_tensor(place[:, :1], torch.tensor([1 + 2j]), (1, 2)).conj()
    assert_array_equal(read(conjugate).toarray(), [[0, 1 - 2j]])


@IGNORE_BETA
@pytest.mark.bad_input
def test_torch_tensors_that_are_no_sparse_matrix_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(ReadError, match=r"strided tensor: expected one of .*\.to_sparse_csr"):
        read(torch.eye(2))
    with pytest.raises(ReadError, match="with 0 dense dimensions, expected a matrix"):
        read(torch.ones(2, 2, 2).to_sparse_coo())
    with pytest.raises(ReadError, match="sparse_bsc tensor: expected one of"):
        read(torch.ones(2, 2).to_sparse_bsc((1, 2)))
    with pytest.raises(ReadError, match="with 1 dense dimensions, expected a matrix"):
        read(torch.ones(2, 2).to_sparse(1))


def test_networkx_graphs_are_read_in_node_order():
    networkx = pytest.importorskip("networkx")
    graph = networkx.path_graph(3)
    graph.edges[1, 2]["weight"] = 7
    matrix, info = read_with_info(graph)
    assert_array_equal(matrix.toarray(), [[0, 1, 0], [1, 0, 7], [0, 7, 0]])
    assert info.header == "networkx Graph of 3 nodes and 2 edges"
    assert (info.symmetry, info.stored_entries, info.nnz) == ("symmetric", 2, 4)
    assert_array_equal(read(networkx.DiGraph([("a", "b")])).toarray(), [[0, 1], [0, 0]])
    assert read(networkx.Graph()).shape == (0, 0)


@pytest.mark.bad_input
def test_networkx_weights_that_are_no_numbers_are_refused():
    networkx = pytest.importorskip("networkx")
    graph = networkx.Graph()
    graph.add_edge(0, 1, weight="heavy")
    with pytest.raises(ReadError, match="networkx Graph: "):
        read(graph)


def test_cupy_matrices_are_fetched_from_the_device(example):
    device_class = type(
        "csr_matrix", (), {"__module__": "cupyx.scipy.sparse", "get": lambda _: example}
    )
    matrix, info = read_with_info(device_class())
    same(matrix, example)
    assert info.format == "cupyx"


def every_source(write, tmp_path, entries):
    """Write the same one-row matrix in every format; entries are (column, value)."""
    columns, values = zip(*entries, strict=True)
    lines = "".join(f"1 {c + 1} {v}\n" for c, v in entries)
    coo = sp.coo_array((values, (np.zeros(len(values), int), columns)), shape=(1, 3))
    sp.save_npz(tmp_path / "a.npz", coo)
    return {
        "mtx": write("a.mtx", f"{BANNER} real general\n1 3 {len(values)}\n{lines}"),
        "npz": tmp_path / "a.npz",
        "el": write("a.el", "".join(f"0 {c} {v}\n" for c, v in entries)),
        "object": coo,
    }


@pytest.mark.parametrize("form", ["mtx", "npz", "el", "object"])
def test_non_finite_values_are_kept_with_a_warning_or_refused(write, tmp_path, form):
    source = every_source(write, tmp_path, [(0, 1.0), (1, np.nan), (2, np.inf)])[form]
    with pytest.warns(TenfoldWarning, match="2 of 3 values are NaN or infinite"):
        matrix, info = read_with_info(source)
    assert_array_equal(matrix.toarray()[0], [1, np.nan, np.inf])
    assert info.non_finite == 2
    with pytest.raises(ReadError, match=r"2 of 3 values are NaN or infinite.*leave out --finite"):
        read(source, finite=True)


@pytest.mark.parametrize("form", ["mtx", "npz", "el", "object"])
def test_duplicates_are_summed_and_counted_or_refused(write, tmp_path, form):
    source = every_source(write, tmp_path, [(2, 1.0), (0, 5.0), (2, 2.0), (2, 4.0)])[form]
    matrix, info = read_with_info(source)
    assert_array_equal(matrix.toarray()[0], [5, 0, 7])
    assert (info.expanded_entries, info.nnz, info.duplicates) == (4, 2, 2)
    with pytest.raises(ReadError, match=r"2 entries repeat an earlier position, the first at \("):
        read(source, sum_duplicates=False)


@pytest.mark.parametrize("form", ["mtx", "npz", "el", "object"])
def test_zeros_are_dropped_and_types_changed_only_on_request(write, tmp_path, form):
    source = every_source(write, tmp_path, [(0, 0.0), (1, 0.1), (2, -0.0)])[form]
    assert read(source).nnz == 3
    matrix, info = read_with_info(source, drop_zeros=True, dtype="float32")
    assert matrix.data.tolist() == [np.float32(0.1)]
    assert (info.explicit_zeros, info.nnz) == (2, 1)
    assert read(source, dtype=np.complex128).dtype == np.complex128


@pytest.mark.bad_input
@pytest.mark.parametrize("form", ["mtx", "npz", "el", "object"])
def test_a_type_that_cannot_hold_the_values_is_refused(write, tmp_path, form):
    source = every_source(write, tmp_path, [(0, 1e300)])[form]
    with pytest.raises(ReadError, match=r"value 1e\+300 is beyond the range of float32"):
        read(source, dtype="float32")
    with pytest.raises(ConfigError, match="dtype is int32, expected one of float32 "):
        read(source, dtype="int32")


@pytest.mark.bad_input
def test_complex_values_are_never_cut_to_their_real_part(example):
    with pytest.raises(ReadError, match="values are complex, expected real ones for float64"):
        read(example * 1j, dtype=np.float64)


HUGE = 10**11
HOSTILE = {
    "billion.mtx": f"{BANNER} real general\n1000000000 1 1\n1 1 1\n",
    "billion.el": "0 1\n1 1000000000\n",
    "rows.mtx": f"{BANNER} real general\n{HUGE} 1 1\n1 1 1\n",
    "columns.mtx": f"{BANNER} real general\n1 {HUGE} 1\n1 1 1\n",
    "entries.mtx": f"{BANNER} pattern general\n9 9 {HUGE}\n1 1\n",
    "vertices.graph": f"{HUGE} 1\n2\n1\n",
    "edges.graph": f"2 {HUGE}\n2\n1\n",
    "packed.graph.gz": gzip.compress(f"{HUGE} 1\n2\n1\n".encode()),
    "ncon.graph": f"2 1 010 {HUGE}\n2\n1\n",
    "index.el": f"0 1\n1 {HUGE}\n",
    "blank.el.gz": gzip.compress(b"0 1\n" + b" " * (1 << 25)),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "blank.el.gz"])
def test_declared_sizes_are_refused_before_anything_is_allocated(write, name):
    path = write(name, HOSTILE[name])
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ReadError, match=name):
        read(path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 200e6


@pytest.mark.bad_input
def test_declared_sizes_of_binary_files_and_objects_are_refused(tmp_path):
    wide = sp.coo_array(([1.0], ([0], [0])), shape=(HUGE, 2))
    sp.save_npz(tmp_path / "a.npz", wide)
    savemat(tmp_path / "a.mat", {"A": sp.csc_array((2_000_000_000, 1))})
    for source in (tmp_path / "a.npz", wide):
        with pytest.raises(ReadError, match=r"100000000000 x 2 with 1 entries needs about .* GB"):
            read(source)
    with pytest.raises(ReadError, match=r"a\.mat:A: 2000000000 x 1 with 0 entries needs about"):
        read(tmp_path / "a.mat", max_memory=1 << 30)


@pytest.mark.bad_input
def test_the_memory_limit_counts_for_every_source(write, tmp_path):
    for source in every_source(write, tmp_path, [(0, 1.0)]).values():
        with pytest.raises(ReadError, match=r"the limit (is|of) .* GB; .*--max-memory"):
            read(source, max_memory=20)
    path = write("a.graph", "2 1\n2\n1\n")
    with pytest.raises(ReadError, match=r"a\.graph:1: 2 x 2 with 2 entries needs about"):
        read(path, max_memory=20)
    with pytest.raises(ReadError, match="GB when unpacked, the limit is"):
        read(tmp_path / "a.npz", max_memory=1)


@pytest.mark.bad_input
def test_one_endless_line_stops_at_the_memory_limit(write):
    path = write("a.el.gz", HOSTILE["blank.el.gz"])
    with pytest.raises(ReadError, match=r"a\.el\.gz:2: a line longer than .* expected numbers"):
        read(path, max_memory=1 << 23)


@pytest.mark.bad_input
def test_many_edges_stop_at_the_memory_limit(write, monkeypatch):
    monkeypatch.setattr("hbp_spmv.readers.text._BLOCK_BYTES", 64)
    path = write("a.el", "0 1\n" * 1000)
    with pytest.raises(ReadError, match=r"a\.el:\d+: more than \d+ edges, too many for the limit"):
        read(path, max_memory=10_000)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mtx", b"", "the file is empty, expected a matrix"),
        ("a.xyz", b"1 2\n", r"the suffix '\.xyz' names no format, expected \.mtx.*--edgelist"),
        ("noname", b"1 2\n", "the suffix '' names no format"),
        ("a.tar.gz", b"x", r"an archive; unpack it and read the \.mtx"),
        ("a.hbp.safetensors", b"x", r"a saved HBP matrix; open it with hbp_spmv\.load"),
        ("a.rua", b"x", "a Harwell-Boeing file; fetch the matrix as Matrix Market"),
        ("a.el.gz", b"\x1f\x8b\x08", "the compressed data end early or are damaged"),
    ],
)
def test_unknown_files_are_refused_with_what_to_do(write, name, content, message):
    with pytest.raises(ReadError, match=message):
        read(write(name, content))


@pytest.mark.bad_input
def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(ReadError, match=r"none\.mtx: No such file or directory"):
        read(tmp_path / "none.mtx")
    with pytest.raises(ReadError, match="Is a directory"):
        read(tmp_path)
    with pytest.raises(ReadError, match=r"none\.mat:A: No such file"):
        read(f"{tmp_path}/none.mat:A")


def test_read_errors_are_value_errors_of_one_line_with_exit_code_2(write):
    with pytest.raises(ReadError) as caught:
        read(write("a.el", "1 x\n"))
    assert isinstance(caught.value, InputError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def outcome(path):
    """Read a file that may be damaged: a valid matrix, or the text of the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            matrix = read(path, max_memory=1 << 24)
        except TenfoldError as error:
            return str(error)
    matrix.check_format(full_check=True)
    return ""


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a.mtx", "a.graph", "a.el", "a.npz", "a.mat"]),
    start=st.sampled_from(
        [b"", b"%%MatrixMarket matrix coordinate real general\n2 2 1\n", b"2 1 11\n"]
    ),
    content=st.binary(max_size=60) | st.text("0123456789 \n%.-ex,", max_size=60).map(str.encode),
)
def test_arbitrary_bytes_give_a_matrix_or_a_one_line_error(tmp_path, name, start, content):
    path = tmp_path / name
    path.write_bytes(start + content)
    assert "\n" not in outcome(path)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    position=st.integers(0, 10_000), byte=st.integers(0, 255), form=st.sampled_from(["npz", "mat"])
)
def test_one_changed_byte_of_a_binary_file_never_escapes(tmp_path, position, byte, form):
    matrix = sp.csc_array(np.eye(6) + np.eye(6, k=2))
    path = tmp_path / f"a.{form}"
    if form == "npz":
        sp.save_npz(path, matrix, compressed=False)
    else:
        savemat(path, {"A": matrix})
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content)
    assert "\n" not in outcome(path)


@pytest.mark.skipif("HBP_MATRICES" not in os.environ, reason="HBP_MATRICES names no folder")
def test_real_files_agree_with_scipy():
    from scipy.io import mmread

    files = sorted(Path(os.environ["HBP_MATRICES"]).glob("*.mtx.gz"))
    assert files
    for file in files:
        expected = mmread(file, spmatrix=False).tocsr()
        expected.sum_duplicates()
        same(read(file), expected)
