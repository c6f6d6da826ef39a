# SPDX-License-Identifier: Apache-2.0
import gzip
import sys
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold_core.errors import InputError, MissingExtraError, TenfoldError, TenfoldWarning
from tenfold_core.sparse import CSR, read_matrix_market, write_matrix_market
from tenfold_core.testing.sparse import csr_matrices

pytest.importorskip("scipy.io")
pytestmark = pytest.mark.filterwarnings("error")
HEAD = "%%MatrixMarket matrix coordinate "


@pytest.fixture
def read(tmp_path):
    def run(text, name="a.mtx", **options):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("latin-1"))
        return read_matrix_market(path, **options)

    return run


def dense(result):
    return result[0].to_dense().tolist()


GENERAL = HEAD + "real general\n% a comment\n2 3 3\n1 1 1.5\n2 3 -2e0\n2 1 4\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GENERAL, [[1.5, 0, 0], [4, 0, -2]]),
        (GENERAL.replace("\n", "\r\n"), [[1.5, 0, 0], [4, 0, -2]]),
        (GENERAL.rstrip(), [[1.5, 0, 0], [4, 0, -2]]),
        (GENERAL.replace("\n2 3 -", "\n\n \t\n  2\t3  -"), [[1.5, 0, 0], [4, 0, -2]]),
        (GENERAL.replace("%%Matrix", "%matrix").replace("real", "REAL"), [[1.5, 0, 0], [4, 0, -2]]),
        (HEAD + "double general\n1 2 1\n1 2 3\n", [[0, 3]]),
        (HEAD + "real symmetric\n2 2 2\n1 1 1\n2 1 5\n", [[1, 5], [5, 0]]),
        (HEAD + "real skew-symmetric\n2 2 1\n2 1 5\n", [[0, -5], [5, 0]]),
        (HEAD + "pattern general\n2 2 2\n1 2\n2 1\n", [[0, 1], [1, 0]]),
        (HEAD + "integer general\n1 2 2\n1 1 -7\n1 2 +9007199254740992\n", [[-7, 2**53]]),
        (HEAD + "unsigned-integer general\n1 1 1\n1 1 7\n", [[7]]),
        (HEAD + "complex general\n1 2 1\n1 2 3 -4\n", [[0, 3 - 4j]]),
        (HEAD + "complex hermitian\n2 2 2\n1 1 1 0\n2 1 1 2\n", [[1, 1 - 2j], [1 + 2j, 0]]),
        (HEAD + "real general\n1 3 3\n1 1 1D3\n1 2 +1.5d-1\n1 3 .5E+1\n", [[1000, 0.15, 5]]),
        ("%%MatrixMarket matrix array real general\n2 2\n1\n0\n3\n4\n", [[1, 3], [0, 4]]),
        ("%%MatrixMarket matrix array integer symmetric\n2 2\n1\n2\n3\n", [[1, 2], [2, 3]]),
        ("%%MatrixMarket matrix array real skew-symmetric\n2 2\n5\n", [[0, -5], [5, 0]]),
        ("%%MatrixMarket matrix array complex general\n1 1\n1 2\n", [[1 + 2j]]),
        (HEAD + "real general\n1 3 1\n1 3 2\n", [[0, 0, 2]]),
        (HEAD + "real general\n3 1 1\n3 1 2\n", [[0], [0], [2]]),
    ],
)
def test_every_kind_of_file_is_read(read, text, expected):
    assert dense(read(text)) == expected
    packed = gzip.compress(text.encode())
    assert dense(read(packed, "a.mtx.gz")) == expected
    assert dense(read(packed, "misnamed.mtx")) == expected


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (3, 3)])
def test_matrices_without_entries_keep_their_shape(read, shape):
    matrix, info = read(HEAD + "real general\n{} {} 0\n\n".format(*shape))
    assert (matrix.shape, matrix.nnz, info.file_entries) == (shape, 0, 0)


def test_the_three_counts_of_entries_are_told_apart(read):
    # (1,1) diagonal, (2,1) mirrored, (2,1) again: 3 in the file, 5 expanded, 3 after summing
    matrix, info = read(HEAD + "real symmetric\n2 2 3\n1 1 0\n2 1 5\n2 1 1\n")
    assert (info.file_entries, info.expanded_entries, info.nnz, info.duplicates) == (3, 5, 3, 2)
    assert (info.explicit_zeros, info.non_finite, info.symmetry) == (1, 0, "symmetric")
    assert matrix.to_dense().tolist() == [[0, 6], [6, 0]]
    assert matrix.is_canonical()


def test_explicit_zeros_stay_unless_they_are_dropped(read):
    text = HEAD + "real general\n1 2 2\n1 1 0\n1 2 3\n"
    assert read(text)[0].nnz == 2
    dropped, info = read(text, drop_zeros=True)
    assert (dropped.nnz, info.explicit_zeros, info.nnz) == (1, 1, 1)


def test_duplicates_are_refused_on_request_with_the_first_position(read):
    text = HEAD + "real general\n3 3 3\n3 3 1\n2 1 1\n2 1 1\n"
    with pytest.raises(InputError, match=r"1 entries repeat .* the first at \(2, 1\)"):
        read(text, sum_duplicates=False)


def test_nan_and_infinity_warn_or_are_refused(read):
    text = HEAD + "real general\n1 3 3\n1 1 nan\n1 2 -Inf\n1 3 1\n"
    with pytest.warns(TenfoldWarning, match="2 of 3 values are NaN or infinite; they are kept"):
        matrix, info = read(text)
    assert info.non_finite == 2
    assert np.isnan(matrix.data[0])
    with pytest.raises(InputError, match="2 of 3 values are NaN or infinite, expected finite"):
        read(text, finite=True)


def test_a_file_without_banner_is_read_on_request(read):
    assert dense(read("2 2 1\n1 2 3\n", banner=False)) == [[0, 3], [0, 0]]
    assert dense(read("% note\n2 2 1\n1 2\n", banner=False)) == [[0, 1], [0, 0]]
    assert dense(read("1 1 1\n1 1 3 4\n", banner=False)) == [[3 + 4j]]
    assert read("2 2 0\n", banner=False)[0].nnz == 0
    assert dense(read(GENERAL, banner=False)) == [[1.5, 0, 0], [4, 0, -2]]


TRUNCATED = HEAD + "real general\n2 2 3\n1 1 1.25\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.mtx: no size line"),
        (HEAD + "real general\n% only a comment", "a.mtx: no size line in the first 2 lines"),
        ("1 1 1\n1 1 3\n", "a.mtx:1: found '1 1 1', expected a .*--no-banner.*--edgelist"),
        (b"\x00\xff\x80" * 99, "a.mtx:1: found .* banner"),
        (HEAD + "real\n1 1 0\n", "a.mtx:1: the banner has 4 words"),
        ("%%MatrixMarket vector coordinate real general\n", "found 'vector' in the banner"),
        (HEAD + "quaternion general\n1 1 0\n", "found 'quaternion' in the banner, expected real"),
        ("%%MatrixMarket matrix array pattern general\n1 1\n", "cannot be 'pattern'"),
        (HEAD + "real hermitian\n1 1 0\n", "'hermitian' needs 'complex', found 'real'"),
        (HEAD + "real general\n2 2\n1 1 1\n", "a.mtx:2: the size line is '2 2'"),
        (HEAD + "real general\n-2 2 1\n1 1 1\n", "a.mtx:2: the size line is '-2 2 1'"),
        (HEAD + "real general\n2.0 2 1\n1 1 1\n", "a.mtx:2: the size line is '2.0 2 1'"),
        (HEAD + "real general\n99999999999999999999 2 1\n", "as counts below 10..18"),
        (HEAD + "real symmetric\n2 3 1\n1 1 1\n", "a.mtx:2: a symmetric matrix of 2 x 3"),
        (HEAD + "real general\n0 3 1\n1 1 1\n", "1 entries in a matrix of 0 x 3"),
        (TRUNCATED, "promises 3 entries, found 1; the file is truncated"),
        (TRUNCATED + "1 2 1.2500000000000\n", "expected 3 entries, found 2; the file is truncated"),
        (
            TRUNCATED + "1 2 1.2500000000000\n2",
            "a.mtx:5: the file ends inside an entry: expected 3",
        ),
        (TRUNCATED + "1 2 1.2500000000000\n2 2 1e", "a.mtx:5: the file ends inside an entry"),
        (TRUNCATED + "1 2 1.2500000000000\n2 2 1e+", "a.mtx:5: .*expected 3 entries, found 2"),
        (HEAD + "real general\n2 2 1\n1 0 1\n", "a.mtx:3: column 0 is outside 1..2"),
        (HEAD + "real general\n2 2 2\n\n1 1 1\n3 1 1\n", "a.mtx:5: row 3 is outside 1..2"),
        (HEAD + "real general\n2 2 1\n1.5 1 1\n", "a.mtx:3: row is '1.5', expected an integer"),
        (HEAD + "real general\n2 2 1\n1 1 abc\n", "a.mtx:3: value is 'abc', expected a number"),
        (HEAD + "real general\n2 2 1\n1 1 0x10\n", "a.mtx:3: value is '0x10'"),
        (HEAD + "real general\n2 2 1\n1 1 1.5.2\n", "a.mtx:3: value is '1.5.2'"),
        (HEAD + "real general\n2 2 1\n1 1 1.5-103\n", "a.mtx:3: value is '1.5-103'"),
        (
            HEAD + "real general\n2 2 1\n1 1 1 9\n",
            "a.mtx:3: found 4 words in '1 1 1 9', expected 3",
        ),
        (HEAD + "complex general\n2 2 1\n1 1 1\n", "promises 1 entries, found 0|expected 4"),
        (HEAD + "pattern general\n2 2 1\n1 1 5\n", "a.mtx:3: found 3 words in '1 1 5', expected 2"),
        (
            HEAD + "integer general\n2 2 1\n1 1 1.5\n",
            "a.mtx:3: value is '1.5', expected an integer",
        ),
        (
            HEAD + "integer general\n1 1 1\n1 1 9007199254740993\n",
            "a.mtx:3: integer .* beyond 2..53",
        ),
        (HEAD + "integer general\n1 1 1\n1 1 " + "9" * 30 + "\n", "a.mtx:3: integer 9+ is beyond"),
        (
            HEAD + "integer general\n1 1 2\n1 1 9007199254740992\n1 1 1\n",
            "a.mtx: integer 9.* beyond",
        ),
        (HEAD + "real general\n2 2 1\n1 1 1\n2 2 2\n", "a.mtx:4: more than the 1 entries"),
        (HEAD + "real general\n2 2 0\n1 1 1\n", "a.mtx: expected 0 entries, found 1"),
        (HEAD + "real general\n2 2 1\n1 1 1\n% end\n", "a.mtx:4: found the comment '% end'"),
        ("%%MatrixMarket matrix array real general\n0 2\n1\n", "expected 0 entries, found 1"),
        (HEAD + "real general\n3 3 4\n1 1 1.5\n2 2 -2\n3 1 .5e3 ", "promises 4|expected 4"),
        (HEAD + "real skew-symmetric\n2 2 1\n2 2 3\n", r"diagonal entry \(2, 2\) of a skew-sym"),
        (HEAD + "complex hermitian\n2 2 2\n1 1 1 1\n2 1 1 2\n", r"diagonal entry \(1, 1\)"),
        ("%%MatrixMarket matrix array real general\n2 2\n1\n0\n3\n", "expected 4|promises 4"),
        (b"\x1f\x8b\x08\x00", "compressed data end early or are damaged"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(read, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read(text)
    assert "a.mtx" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "size",
    ["100000000000 100000000000 1", "100000000000 3 1", "3 100000000000 1", "3 3 100000000000"],
)
@pytest.mark.parametrize("symmetry", ["general", "symmetric"])
def test_a_hostile_size_line_is_refused_at_once(read, size, symmetry):
    read(GENERAL)  # SciPy is imported
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(
        InputError, match=r"promises|needs about .* GB, the limit|expected a square"
    ):
        read(HEAD + f"real {symmetry}\n{size}\n1 1 1\n")
    assert time.perf_counter() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_memory_limit_is_kept(read):
    with pytest.raises(InputError, match=r"2 x 3 with 3 entries needs about .* raise --max-memory"):
        read(GENERAL, max_memory=100)
    with pytest.raises(InputError, match="the limit is"):
        read("%%MatrixMarket matrix array real general\n2 2\n1\n2\n3\n4\n", max_memory=100)
    assert read(GENERAL, max_memory=10_000)[0].nnz == 3


@pytest.mark.parametrize(
    ("head", "filler", "message"),
    [
        (HEAD + "real general\n3 3 1\n1 1 1\n", b" ", "more than .* bytes follow the header"),
        (HEAD + "real general\n3 3 1\n", b"%", "found the comment"),
        (HEAD + "real general\n%", b"x", "no size line in the first 2 lines"),
        (HEAD + "real general\n3 3 9000\n", b"1", "more than .* bytes follow the header"),
    ],
)
def test_a_gzip_bomb_is_not_unpacked(read, head, filler, message):
    bomb = gzip.compress(head.encode() + filler * 60_000_000, 1)
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        read(bomb)
    assert tracemalloc.get_traced_memory()[1] - len(bomb) < 60_000_000
    tracemalloc.stop()


def test_a_truncated_gzip_file_tells_how_far_it_got(read):
    lines = "".join(f"{i % 999 + 1} {i // 999 + 1} {i}.25\n" for i in range(200_000))
    packed = gzip.compress((HEAD + "real general\n999 999 200000\n" + lines).encode())
    with pytest.raises(InputError, match=r"expected 200000 entries, found about (\d+)") as caught:
        read(packed[: len(packed) // 2])
    found = int(str(caught.value).split("found about ")[1].split(";")[0])
    assert 60_000 < found < 140_000


def test_the_line_of_an_error_is_right_far_into_a_file(read):
    lines = [f"{i % 1000 + 1} {i % 999 + 1} 1.5" for i in range(120_000)]
    for wrong, message in (("1001 5 1.0", "row 1001 is outside"), ("1 5 1..0", "value is '1..0'")):
        lines[99_990] = wrong
        text = HEAD + "real general\n% one\n1000 1000 120000\n" + "\n".join(lines)
        with pytest.raises(InputError, match=rf"a\.mtx:{99_990 + 4}: {message}"):
            read(text)


@pytest.mark.parametrize("path", ["missing.mtx", "."])
def test_a_path_that_is_no_file_is_an_input_error(tmp_path, path):
    with pytest.raises(InputError, match=r"No such file|Is a directory|Permission"):
        read_matrix_market(tmp_path / path)


def test_without_scipy_the_extra_is_named(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingExtraError, match=r"tenfold-core\[sparse\]"):
        read(GENERAL)


@given(csr_matrices(max_rows=30, max_columns=30))
def test_writing_and_reading_gives_the_same_bits(tmp_path_factory, matrix):
    folder = tmp_path_factory.mktemp("round")
    for name in ("a.mtx", "a.mtx.gz"):
        write_matrix_market(folder / name, matrix, comment="made by a test")
        again, _ = read_matrix_market(folder / name)
        assert again.shape == matrix.shape
        assert again.indptr.tolist() == matrix.indptr.tolist()
        assert again.indices.tolist() == matrix.indices.tolist()
        assert again.data.tobytes() == matrix.data.tobytes()


def test_scipy_matrices_are_written_too_and_others_are_refused(tmp_path):
    write_matrix_market(tmp_path / "a.mtx", CSR((1, 2), [0, 1], [1], [2.5]).to_scipy().tocoo())
    assert dense(read_matrix_market(tmp_path / "a.mtx")) == [[0, 2.5]]
    with pytest.raises(InputError, match="expected a two-dimensional"):
        write_matrix_market(tmp_path / "b.mtx", np.eye(2))
    assert not (tmp_path / "b.mtx").exists()


@given(st.data())
def test_any_damage_gives_a_matrix_or_one_line(tmp_path_factory, data):
    text = bytearray(GENERAL.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place] = data.draw(st.sampled_from(list(b"0123456789+-.eEdDnaif% \r\n\t\x00\xff")))
    cut = data.draw(st.integers(1, len(text)))
    path = tmp_path_factory.mktemp("fuzz") / "a.mtx"
    path.write_bytes(bytes(text[:cut]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TenfoldWarning)
        try:
            read_matrix_market(path)[0].check()
            complaint = f"{path}: none"
        except TenfoldError as error:
            complaint = str(error)
    assert complaint.startswith(str(path))
    assert "\n" not in complaint
