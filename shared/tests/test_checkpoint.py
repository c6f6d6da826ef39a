# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold_core.errors import CheckpointError, InputError
from tenfold_core.run import load_tensors, read_header, save_tensors
from tenfold_core.run.checkpoint import require_token, resume_token

DTYPES = "bool uint8 int8 uint16 int16 float16 uint32 int32 float32 uint64 int64 float64 complex64"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("mmap", [True, False])
def test_every_dtype_and_shape_comes_back(path, mmap):
    arrays = {name: np.arange(6).reshape(2, 3).astype(name) for name in DTYPES.split()}
    arrays |= {"empty": np.zeros((0, 4), np.int32), "scalar": np.float32(3)}
    save_tensors(path, arrays, {"config": "{}"})
    loaded, metadata = load_tensors(path, mmap=mmap, verify=True)
    assert metadata["config"] == "{}"
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].flags.aligned
        np.testing.assert_array_equal(loaded[name], array)


def test_mapped_arrays_are_views_that_cannot_change_the_file(path):
    save_tensors(path, {"a": np.ones(3)})
    loaded, _ = load_tensors(path)
    with pytest.raises(ValueError, match="read-only"):
        loaded["a"][0] = 2


def test_a_file_without_tensors_is_legal(path):
    save_tensors(path, {})
    assert load_tensors(path, verify=True)[0] == {}


def test_non_contiguous_and_big_endian_arrays_are_written_right(path):
    save_tensors(path, {"t": np.arange(6).reshape(2, 3).T, "b": np.arange(3, dtype=">i4")})
    loaded, _ = load_tensors(path)
    np.testing.assert_array_equal(loaded["t"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(loaded["b"], [0, 1, 2])


def test_the_safetensors_library_reads_what_we_write_and_we_read_what_it_writes(path):
    library = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.arange(5, dtype=np.uint16), "b": np.ones((2, 3)), "c": np.zeros(0, np.int8)}
    save_tensors(path, arrays)
    theirs = library.load_file(path)
    library.save_file(arrays, path, {"k": "v"})
    ours, metadata = load_tensors(path)
    assert metadata == {"k": "v"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours[name], array)


def test_dtypes_the_format_does_not_know_are_refused(path):
    with pytest.raises(InputError, match="tensor 'z' has dtype complex128"):
        save_tensors(path, {"z": np.ones(1, complex)})
    with pytest.raises(InputError, match="metadata must map text to text"):
        save_tensors(path, {}, {"n": 1})
    assert not path.exists()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "header is not valid JSON"),
        (b"\xff\xfe", b"", "header is not valid JSON"),
        (b"[" * 100_000, b"", "header is not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "a name occurs twice"),
        ([], b"", "header is list, expected an object"),
        ({"__metadata__": {"a": 1}}, b"", "field '__metadata__' must map text to text"),
        ({"a": 3}, b"", "tensor 'a': entry is 3"),
        ({"a": entry(dtype="F99")}, b"0" * 8, "tensor 'a': dtype is 'F99'"),
        ({"a": entry(shape=[-2])}, b"0" * 8, "shape is .-2., expected a list"),
        ({"a": entry(shape=[True, 2])}, b"0" * 8, "shape is .True, 2."),
        ({"a": entry(shape=[1] * 65)}, b"0" * 8, "at most 64 counts"),
        ({"a": entry(offsets=[8, 0])}, b"0" * 8, "data_offsets is .8, 0., expected two ascending"),
        ({"a": entry(shape=[3])}, b"0" * 8, "expected 12 bytes for F32"),
        ({"a": entry(shape=[2**62, 4])}, b"0" * 8, "data_offsets"),
        ({"a": entry(), "b": entry()}, b"0" * 8, "tensor 'b': data_offsets start at 0, expected 8"),
        ({"a": entry(offsets=[8, 16])}, b"0" * 16, "start at 8, expected 0"),
        ({"a": entry()}, b"0" * 7, "describes 105 bytes|the file has"),
        ({"a": entry()}, b"0" * 9, "something was appended"),
    ],
)
def test_a_hostile_header_is_refused_with_its_field(path, header, data, message):
    write(path, header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("content", [b"", b"1234567", (2**63).to_bytes(8, "little") + b"{}"])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not fit a file of"):
        read_header(path)


def test_a_missing_file_is_a_checkpoint_error(path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(path)


def test_a_dtype_numpy_does_not_have_names_the_reader_that_has_it(path):
    write(path, {"a": entry(dtype="BF16", offsets=[0, 4])}, b"0000")
    with pytest.raises(CheckpointError, match=r"BF16.*safetensors\.torch"):
        load_tensors(path)


@given(st.data())
def test_truncation_and_any_flipped_data_bit_are_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "a.safetensors"
    save_tensors(path, {"a": np.arange(10.0), "b": np.arange(5, dtype=np.int32)})
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_header(path)
    start = len(whole) - 100
    place = data.draw(st.integers(start, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="sha256"):
        load_tensors(path, verify=True)


def test_a_resume_token_depends_on_every_part_and_on_nothing_else():
    token = resume_token({"a": 1, "b": [2.0]}, "x")
    assert token == resume_token({"b": [2.0], "a": 1}, "x")
    assert token != resume_token({"a": 1, "b": [2.5]}, "x")
    require_token("run", token, token)
    with pytest.raises(CheckpointError, match="other settings or inputs"):
        require_token("run", None, token)
