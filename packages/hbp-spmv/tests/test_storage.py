# SPDX-License-Identifier: Apache-2.0
import json
import tracemalloc

import numpy as np
import pytest
from hbp_spmv import building, from_csr, load
from numpy.testing import assert_array_equal
from scipy.sparse import csr_array
from tenfold_core.errors import CheckpointError, InputError, MissingExtraError
from tenfold_core.run import load_tensors, save_tensors
from tenfold_core.testing.sparse import awkward_matrices, csr_from_lengths

SETTINGS = {
    "compact": {"layout": "compact", "lanes": 4, "keep_perm": True},
    "strips": {"layout": "compact", "lanes": 4, "strips": 1000},
    "paper": {"layout": "paper", "block": (128, 1000), "lanes": 8, "keep_perm": True},
    "csr": {"layout": "csr"},
}


@pytest.fixture(scope="module")
def a():
    """300 x 5000 with empty rows and one row of 4500, which is cut into three segments."""
    lengths = np.arange(300) % 5
    lengths[100] = 4500
    return csr_from_lengths(lengths, 5000, np.random.default_rng(2)).to_scipy()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.hbp.safetensors"


def change(path, arrays=(), header=(), metadata=()):
    """Write the file again with other arrays or header fields and a checksum that fits."""
    old, texts = load_tensors(path, mmap=False)
    fields = json.loads(texts.pop("hbp"))
    texts.pop("sha256")
    fields |= dict(header)
    texts |= {"hbp": json.dumps(fields)} | dict(metadata)
    new = {name: array for name, array in (old | dict(arrays)).items() if array is not None}
    save_tensors(path, new, texts)


def put(array, position, value):
    array = array.copy()
    array[position] = value
    return array


def assert_refused(path, match):
    for verify in (True, False):
        for mmap in (True, False):
            with pytest.raises(CheckpointError, match=match) as caught:
                load(path, verify=verify, mmap=mmap)
            assert str(path) in str(caught.value)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_layout_comes_back_with_the_same_bits(path, a, name, dtype, mmap):
    matrix = from_csr(a, dtype=dtype, **SETTINGS[name])
    x = np.random.default_rng(1).standard_normal(5000).astype(dtype)
    matrix.save(path)
    again = load(path, mmap=mmap)
    assert again.config == matrix.config
    assert repr(again) == repr(matrix)
    assert set(again.arrays()) == set(matrix.arrays())
    for key, array in matrix.arrays().items():
        assert again.arrays()[key].dtype == array.dtype
        assert_array_equal(again.arrays()[key], array)
    assert (again @ x).tobytes() == (matrix @ x).tobytes()
    assert (again.rmatvec(np.ones(300, dtype))).tobytes() == (
        matrix.rmatvec(np.ones(300, dtype))
    ).tobytes()


@pytest.mark.parametrize("name", ["compact", "paper", "csr"])
def test_loaded_matrices_take_new_values(path, a, name):
    from_csr(a, **SETTINGS[name]).save(path)
    other = load(path).update_values(2 * a.data)
    assert_array_equal(other.to_csr().data, 2 * a.data)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_matrices_come_back(path, a, dtype, mmap):
    matrix = from_csr((a * (1 + 2j)).astype(dtype))
    matrix.save(path)
    again = load(path, mmap=mmap)
    assert (again.layout, again.dtype) == ("csr", dtype)
    assert_array_equal(again.to_csr().data, matrix.to_csr().data)
    assert_array_equal(again @ np.ones(5000, dtype), matrix @ np.ones(5000, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_scipy_matrices_come_back_with_and_without_kernels(path, a, dtype, monkeypatch):
    monkeypatch.setattr(building, "_KERNELS", [False])
    matrix = from_csr(a.astype(dtype))
    assert matrix.layout == "scipy"
    matrix.save(path)
    for kernels in (False, True):
        monkeypatch.setattr(building, "_KERNELS", [kernels])
        again = load(path)
        assert (again.layout, again.dtype) == ("scipy", dtype)
        assert_array_equal(again @ np.ones(5000, dtype), matrix @ np.ones(5000, dtype))


@pytest.mark.parametrize("name", SETTINGS)
def test_compiled_layouts_say_that_they_need_numba(path, a, name, monkeypatch):
    from_csr(a, **SETTINGS[name]).save(path)
    monkeypatch.setattr(building, "_KERNELS", [False])
    with pytest.raises(MissingExtraError, match=r"layout '(compact|paper|csr)' needs numba"):
        load(path)


@pytest.mark.parametrize("layout", ["compact", "csr"])
def test_uniform_matrices_stay_uniform(path, a, layout):
    equal = a.copy()
    equal.data[:] = 3
    from_csr(equal, layout=layout).save(path)
    again = load(path)
    assert again.arrays()["val"].tolist() == [3]
    assert_array_equal(again.to_csr().data, equal.data)


@pytest.mark.parametrize("layout", ["compact", "paper", "csr", "auto"])
@pytest.mark.parametrize("name", awkward_matrices())
def test_every_structure_comes_back(path, name, layout):
    a = awkward_matrices()[name].to_scipy()
    x = np.random.default_rng(1).standard_normal(a.shape[1])
    matrix = from_csr(a, layout=layout, keep_perm=True)
    matrix.save(path)
    again = load(path)
    assert again.shape == a.shape
    assert (again @ x).tobytes() == (matrix @ x).tobytes()


def test_mapped_arrays_are_not_copied_and_cannot_be_changed(path, a):
    from_csr(a, layout="compact").save(path)
    val = load(path).arrays()["val"]
    assert not val.flags.writeable
    assert not val.flags.owndata


def test_the_number_of_threads_is_chosen_at_loading(path, a, several_workers):
    from_csr(a, layout="compact", threads=1).save(path)
    assert load(path, threads=3).threads == 3


def test_a_failed_save_leaves_the_old_file(path, a, monkeypatch):
    from_csr(a, layout="csr").save(path)
    before = path.read_bytes()
    matrix = from_csr(a, layout="compact")
    monkeypatch.setattr(np, "asarray", None)
    with pytest.raises(TypeError, match="not callable"):
        matrix.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# Damage


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.02, 0.5, 0.99])
@pytest.mark.parametrize("verify", [True, False])
def test_truncated_files_are_refused(path, a, share, verify):
    from_csr(a, layout="compact").save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="truncated"):
        load(path, verify=verify)


def test_a_flipped_byte_is_found_by_the_checksum(path, a):
    from_csr(a, layout="compact").save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="do not have the recorded sha256"):
        load(path)


def test_missing_files_and_foreign_ones_are_refused(path):
    with pytest.raises(CheckpointError, match="No such file"):
        load(path)
    save_tensors(path, {"weight": np.ones(3)})
    with pytest.raises(CheckpointError, match=r"no 'hbp' metadata.*hbp-spmv convert"):
        load(path)
    path.write_bytes(b"%%MatrixMarket matrix coordinate real general\n1 1 1\n1 1 1\n")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"', "{", "{}", '{"format": 1}'])
def test_headers_of_another_form_are_refused(path, a, text):
    from_csr(a, layout="csr").save(path)
    change(path, metadata={"hbp": text})
    assert_refused(path, "no 'hbp' metadata|format is 1")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"format": "hbp-spmv/2"}, "format is 'hbp-spmv/2', this version reads 'hbp-spmv/1'"),
        ({"layout": "ell"}, "layout is 'ell', expected one of compact"),
        ({"layout": ["compact"]}, "layout is"),
        ({"layout": "paper"}, "field 'height'"),
        ({"layout": "csr"}, "array 'ptr' is missing"),
        ({"shape": [300]}, "field 'shape'"),
        ({"shape": [300, -1]}, "field 'shape'"),
        ({"shape": [300.0, 5000]}, "field 'shape'"),
        ({"shape": "ab"}, "field 'shape'"),
        ({"shape": [299, 5000]}, "array '(targets|segment_target|empty_rows)'"),
        ({"shape": [301, 5000]}, "array 'targets'"),
        ({"shape": [1 << 40, 5000]}, "array 'targets'"),
        ({"shape": [1 << 61, 5000]}, "array 'targets'"),
        ({"shape": [300, 4000]}, r"array 'col' is up to column \d+, expected below 4000"),
        ({"shape": [300, 0]}, "array 'col'"),
        ({"nnz": 1 << 61}, "array '(segment_start|col)'"),
        ({"nnz": True}, "field 'nnz'"),
        ({"nnz": 10}, "array 'segment_start'"),
        ({"lanes": 5}, "array 'lanes' is 5, expected 4, 8, 16 or 32"),
        ({"lanes": 8}, "array 'lengths'"),
        ({"lanes": 0}, "array 'lanes'"),
        ({"dtype": "int8"}, "dtype is 'int8', expected a float or complex type"),
        ({"dtype": "float32"}, "array 'val' is float64, expected float32"),
        ({"dtype": "complex64"}, "complex64"),
        ({"dtype": None}, "dtype is None"),
        ({"dtype": ["float64"]}, "dtype is"),
        ({"config": {"lanes": 5}}, "field 'config' is not valid"),
        ({"config": {"colour": 5}}, "field 'config' is not valid"),
        ({"config": [1]}, "field 'config' is not valid"),
    ],
    ids=str,
)
def test_header_fields_are_checked(path, a, header, match):
    from_csr(a, **SETTINGS["compact"]).save(path)
    change(path, header=header)
    assert_refused(path, match)


COMPACT_DAMAGE = {
    "start falls": ("start", lambda a: put(a, 1, a[2] + 1)),
    "start is negative": ("start", lambda a: put(a, 1, -4)),
    "start does not begin at 0": ("start", lambda a: put(a, 0, 1)),
    "start is beyond the end": ("start|segment_start", lambda a: put(a, -1, 1 << 40)),
    "start is short": ("start", lambda a: a[:-1]),
    "lengths rise": ("lengths", lambda a: put(a, [0, 1], [0, 4])),
    "lengths are negative": ("lengths", lambda a: put(a, 3, -1)),
    "lengths do not fit the starts": ("lengths", lambda a: put(a, [0, 4], [5, 3])),
    "lengths are short": ("lengths", lambda a: a[4:]),
    "targets repeat": ("targets", lambda a: put(a, 0, a[1])),
    "targets are out of range": ("targets", lambda a: put(a, 0, 303)),
    "targets are unused": ("targets", lambda a: put(a, 0, 0xFFFFFFFF)),
    "segment_target repeats": ("targets", lambda a: put(a, 0, a[1])),
    "segment_target is out of range": ("segment_target", lambda a: put(a, 0, 1 << 31)),
    "segment_target is short": ("segment_target", lambda a: a[:-1]),
    "segment_start falls": ("segment_start", lambda a: put(a, 1, 0)),
    "segment_start ends early": ("segment_start", lambda a: put(a, -1, a[-2])),
    "segment_start is short": ("segment_start", lambda a: a[:-1]),
    "segment_base is too large": ("col", lambda a: put(a, 0, 5000)),
    "group_base is too large": ("col", lambda a: put(a, 0, 5000)),
    "group_base is short": ("lengths", lambda a: a[1:]),
    "empty_rows repeats": ("targets", lambda a: put(a, 0, a[1])),
    "empty_rows is out of range": ("empty_rows", lambda a: put(a, 0, 300)),
    "split_rows is out of range": ("split_rows", lambda a: put(a, 0, 300)),
    "split_rows is short": ("split_start", lambda a: a[:-1]),
    "split_start is huge": ("targets", lambda a: put(a, 1, 1 << 60)),
    "split_start falls": ("split_start", lambda a: put(a, 1, -3)),
    "col is out of range": ("col", lambda a: put(a, 7, 5000)),
    "col behind the last element is out of range": ("col", lambda a: put(a, -1, 65535)),
    "col is short": ("col", lambda a: a[:-1]),
    "val is short": ("val", lambda a: a[:-1]),
    "val is empty": ("val", lambda a: a[:0]),
    "perm is out of range": ("perm", lambda a: put(a, 0, len(a))),
    "perm is negative": ("perm", lambda a: put(a, 0, -1)),
    "perm repeats": ("perm", lambda a: put(a, 0, a[1])),
    "perm is short": ("perm", lambda a: a[:-1]),
}


@pytest.mark.parametrize("damage", COMPACT_DAMAGE)
def test_compact_arrays_are_checked(path, a, damage):
    matrix = from_csr(a, **SETTINGS["compact"])
    matrix.save(path)
    blamed, alter = COMPACT_DAMAGE[damage]
    name = damage.split()[0]
    # the padding of 4 belongs to no group but to the reach of the last one
    arrays = matrix.arrays() | {"perm": matrix._stored.perm}
    change(path, {name: alter(arrays[name])})
    if damage == "col behind the last element is out of range":
        load(path)  # segments follow the groups: nothing reads there
    else:
        assert_refused(path, f"array '({blamed})'")


@pytest.mark.parametrize(
    "name", ["start", "lengths", "targets", "col", "val", "perm", "split_rows"]
)
def test_types_dimensions_and_absence_are_named(path, a, name):
    matrix = from_csr(a, **SETTINGS["compact"])
    array = (matrix.arrays() | {"perm": matrix._stored.perm})[name]
    for bad in (array.astype(np.int8), array[None]):
        matrix.save(path)
        change(path, {name: bad})
        assert_refused(path, f"array '{name}' is (int8|of shape)")
    if name != "perm":
        matrix.save(path)
        change(path, {name: None})
        assert_refused(path, f"array '{name}' is missing")


def test_columns_read_past_a_group_are_checked(path):
    # one group of one row: a register load of 4 lanes reaches the padding
    matrix = from_csr(
        csr_from_lengths([3], 10, np.random.default_rng(0)).to_scipy(), layout="compact", lanes=4
    )
    matrix.save(path)
    change(path, {"col": put(matrix.arrays()["col"], -1, 10)})
    assert_refused(path, "array 'col' is up to column 10, expected below 10")


def test_sums_are_never_written_beyond_y(path, a):
    # every target is still written once, but y would be written where partial sums belong
    matrix = from_csr(a, **SETTINGS["compact"])
    arrays = matrix.arrays()
    assert arrays["segment_target"].tolist() == [300, 301, 302]
    for name, position in (("targets", 0), ("empty_rows", 0), ("split_rows", 0)):
        matrix.save(path)
        row = arrays[name][position]
        swapped = {name: put(arrays[name], position, 301)}
        change(path, swapped | {"segment_target": put(arrays["segment_target"], 1, row)})
        assert_refused(path, f"array '{name}' is up to 301, expected within 0..299")


def test_a_split_row_without_sums_is_refused(path, a):
    # the second split row would start reading behind the partial sums
    matrix = from_csr(a, **SETTINGS["compact"])
    matrix.save(path)
    arrays = matrix.arrays()
    empty = arrays["empty_rows"]
    change(
        path,
        {
            "empty_rows": empty[1:],
            "split_rows": np.append(arrays["split_rows"], empty[0]),
            "split_start": np.array([0, 3, 3]),
        },
    )
    assert_refused(path, "array 'split_start' is without sums for a row")


def test_sizes_that_lie_allocate_nothing(path, a):
    from_csr(a, **SETTINGS["compact"]).save(path)
    change(path, {"split_start": np.array([0, 1 << 34])}, {"shape": [1 << 34, 5000]})
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="array '"):
        load(path, verify=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


PAPER_DAMAGE = {
    "col is out of range": ("col", lambda a: put(a, 7, 5000)),
    "col is negative": ("col", lambda a: put(a, 7, -1)),
    "col is short": ("col", lambda a: a[:-1]),
    "data is short": ("data", lambda a: a[:-1]),
    "add_sign leaves its group": ("add_sign", lambda a: put(a, -1, 3)),
    "add_sign stands still": ("add_sign", lambda a: put(a, 0, 0)),
    "zero_row claims an element": ("zero_row|add_sign", lambda a: put(a, 0, 0)),
    "zero_row is short": ("zero_row", lambda a: a[:-1]),
    "begin_ptr falls": ("begin_ptr", lambda a: put(a, 1, -1)),
    "begin_ptr is short": ("begin_ptr|zero_row|add_sign", lambda a: np.delete(a, 1)),
    "begin_ptr is long": ("begin_ptr|zero_row|add_sign", lambda a: np.insert(a, 1, 0)),
    "output_hash repeats": ("output_hash", lambda a: put(a, 0, a[1])),
    "output_hash is out of range": ("output_hash", lambda a: put(a, 0, 128)),
    "perm is out of range": ("perm", lambda a: put(a, 0, len(a))),
}


@pytest.mark.parametrize("damage", PAPER_DAMAGE)
def test_published_arrays_are_checked(path, a, damage):
    matrix = from_csr(a, **SETTINGS["paper"])
    matrix.save(path)
    blamed, alter = PAPER_DAMAGE[damage]
    name = damage.split()[0]
    change(path, {name: alter((matrix.arrays() | {"perm": matrix._stored.perm})[name])})
    assert_refused(path, f"array '({blamed})'")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"height": 0}, "array 'height' is 0"),
        ({"height": 1 << 40}, "array 'height'"),
        ({"width": 0}, "array 'width' is 0"),
        ({"lanes": 0}, "array 'lanes' is 0"),
        ({"lanes": 1 << 40}, "array 'lanes'"),
        ({"width": 1}, "array '(zero_row|output_hash)'"),
        ({"shape": [1 << 61, 5000]}, "below 2"),
        ({"shape": [1 << 61, 0]}, "array '"),
    ],
    ids=str,
)
def test_published_block_sizes_are_checked(path, a, header, match):
    from_csr(a, **SETTINGS["paper"]).save(path)
    change(path, header=header)
    assert_refused(path, match)


def test_rows_without_columns_are_checked_at_once(path):
    from_csr(csr_array((2, 0)), layout="paper").save(path)
    change(path, header={"shape": [1 << 61, 0], "height": 1})
    assert load(path).shape == (1 << 61, 0)


CSR_DAMAGE = {
    "ptr falls": ("ptr", lambda a: put(a, 5, a[4] - 1)),
    "ptr ends early": ("ptr", lambda a: put(a, -1, a[-1] - 1)),
    "ptr does not begin at 0": ("ptr", lambda a: put(a, 0, -8)),
    "ptr is short": ("ptr", lambda a: a[:-1]),
    "col is out of range": ("col", lambda a: put(a, 0, 5000)),
    "col is short": ("col", lambda a: a[:-1]),
    "val is short": ("val", lambda a: a[:-1]),
    "val is of another type": ("val", lambda a: np.ones(a.size, np.int64)),
}


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "complex64"])
@pytest.mark.parametrize("damage", CSR_DAMAGE)
def test_csr_arrays_are_checked(path, a, damage, dtype, kernels, monkeypatch):
    monkeypatch.setattr(building, "_KERNELS", [kernels])
    matrix = from_csr(a.astype(dtype), layout="csr" if kernels else "auto")
    assert matrix.layout == ("csr" if kernels else "scipy")
    matrix.save(path)
    _, alter = CSR_DAMAGE[damage]
    name = damage.split()[0]
    change(path, {name: alter(matrix.arrays()[name])})
    assert_refused(path, "array '(ptr|col|val)'")


def test_complex_pairs_are_checked(path, a):
    matrix = from_csr(a.astype(complex))
    matrix.save(path)
    for bad in (np.ones((a.nnz, 3)), np.ones(2 * a.nnz), np.ones((a.nnz, 2), np.float32)):
        change(path, {"val": bad})
        assert_refused(path, "array 'val' is float")
    change(path, {"val": np.ones((a.nnz - 1, 2))})
    assert_refused(path, "array 'val'")


def test_types_that_the_format_lacks_are_refused(path, a):
    matrix = from_csr(a, layout="csr")
    object.__setattr__(matrix._stored, "val", matrix._stored.val.astype(np.longdouble))
    with pytest.raises(InputError, match="tensor 'val' has dtype"):
        matrix.save(path)
    assert not path.exists()
