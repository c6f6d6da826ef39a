# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold_core.errors import InputError
from tenfold_core.quant import packing
from tenfold_core.quant.packing import (
    PackedWeight,
    pack_rows,
    packed_layout,
    packed_nbytes,
    row_nbytes,
    unpack_rows,
)

torch = pytest.importorskip("torch")
from tenfold_core.quant import reference  # noqa: E402
from tenfold_core.quant.affine import fake_quant, max_code, quantize, storable  # noqa: E402
from tenfold_core.quant.scales import init_scale  # noqa: E402


def codes_of(rows, columns, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)


@pytest.mark.parametrize(
    ("codes", "bits", "data"),
    [
        ([3, 0, 1, 2], 2, "93"),  # 3 + 0*4 + 1*16 + 2*64 = 147
        ([5, 1, 7, 0, 2, 6, 3, 4], 3, "cd218f"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 3, "88c6fa"),
        ([1, 2, 3, 63], 6, "8130fc"),
        ([1, 2, 3, 15], 4, "21f3"),
        ([1, 0, 0, 0, 0, 0, 0, 1, 1], 1, "8101"),
        ([1, 31], 5, "e103"),
        ([7, 255], 8, "07ff"),
    ],
)
def test_known_bytes(codes, bits, data):
    packed = pack_rows(np.array([codes]), bits)
    assert packed.tobytes().hex() == data
    assert unpack_rows(packed, bits, len(codes)).tolist() == [codes]


@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 40),
    bits=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_packing_round_trips_and_equals_the_reference(rows, columns, bits, seed):
    codes = codes_of(rows, columns, bits, seed)
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, row_nbytes(columns, bits))
    assert np.array_equal(packed, reference.pack_rows(codes, bits))
    assert np.array_equal(unpack_rows(packed, bits, columns), codes)
    assert np.array_equal(reference.unpack_rows(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_blocks_of_rows_change_nothing(monkeypatch, bits):
    codes = codes_of(37, 29, bits)
    whole = pack_rows(codes, bits)
    monkeypatch.setattr(packing, "_BLOCK_WORDS", 10)
    assert np.array_equal(pack_rows(codes, bits), whole)
    assert np.array_equal(unpack_rows(whole, bits, 29), codes)


def test_any_integer_array_or_tensor_is_packed_alike():
    codes = codes_of(4, 9, 3)
    packed = pack_rows(codes, 3)
    for other in (codes.astype(np.int64), np.asfortranarray(codes), torch.from_numpy(codes)):
        assert np.array_equal(pack_rows(other, 3), packed)
    assert np.array_equal(unpack_rows(torch.from_numpy(packed), 3, 9), codes)


@pytest.mark.parametrize("bits", [3, 8])
def test_results_do_not_share_memory_with_their_argument(bits):
    codes = codes_of(2, 8, bits)
    packed = pack_rows(codes, bits)
    assert not np.shares_memory(packed, codes)
    assert not np.shares_memory(unpack_rows(packed, bits, 8), packed)


@pytest.mark.parametrize(
    ("codes", "bits", "text"),
    [
        ([[0, 4]], 2, r"expected 0\.\.3 for 2 bits, found 0\.\.4"),
        ([[0, -1]], 2, r"found -1\.\.0"),
        ([[0, 256]], 8, r"expected 0\.\.255"),
        ([[0.0]], 2, "expected whole numbers"),
        ([0, 1], 2, r"of shape \(2,\)"),
        ([[0, 1]], 0, "bits: expected a whole number from 1 to 8, found 0"),
        ([[0, 1]], 9, "found 9"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes, bits, text):
    with pytest.raises(InputError, match=text):
        pack_rows(np.array(codes), bits)


@pytest.mark.parametrize(
    "data", [np.zeros((1, 2), np.uint8), np.zeros((1, 3), np.int8), np.zeros(3)]
)
def test_packed_rows_of_another_length_are_refused(data):
    with pytest.raises(InputError, match=r"expected uint8 of shape \(rows, 3\) for 8 codes of 3"):
        unpack_rows(data, 3, 8)


def test_accounting_of_a_convolution_at_two_bits():
    # 32 rows of 1 bit, 256 of 2, 32 of 3: 640 row-bits * 2880 / 8 = 230,400 B of codes
    shape, groups = (320, 320, 3, 3), ((1, 32), (2, 256), (3, 32))
    layout = packed_layout(shape, groups, smooth=320)
    sizes = {key: dtype.itemsize * size[0] for key, (dtype, size) in layout.items()}
    assert sizes == {"qweight": 230_400, "scale": 640, "zero": 640, "row_order": 640, "smooth": 640}
    total = packed_nbytes(shape, groups, smooth=320)
    assert total == 232_960
    assert 8 * total / (320 * 320 * 9) == pytest.approx(2.0222, abs=5e-5)
    assert packed_nbytes(shape, ((2, 320),)) == 230_400 + 1_280


def test_long_weights_need_a_wider_order():
    rows = 1 << 15
    for count, width in ((rows, 2), (rows + 1, 4)):
        dtype, _ = packed_layout((count, 8), ((2, 1), (3, count - 1)))["row_order"]
        assert dtype.itemsize == width


def quantized(shape=(10, 4, 3, 3), bits=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    bits = torch.tensor([2, 3, 1, 2, 2, 8, 2, 3, 2, 1]) if bits is None else bits
    qmax = max_code(bits)
    scale, zero = storable(*init_scale(weight.flatten(1), bits, method="mse"))
    codes = quantize(weight.flatten(1), scale, zero, qmax).reshape(shape)
    return weight, bits, scale, zero, codes


def test_mixed_widths_are_stored_by_width_and_come_back_in_order():
    _, bits, scale, zero, codes = quantized()
    packed = PackedWeight.from_codes(codes, bits, scale, zero)
    assert packed.groups == ((1, 2), (2, 5), (3, 2), (8, 1))
    assert packed.row_order.tolist() == [2, 9, 0, 3, 4, 6, 8, 1, 7, 5]
    assert packed.row_order.dtype == np.int16
    assert packed.shape == (10, 4, 3, 3)
    assert packed.qweight[:5].tobytes() == pack_rows(codes[2].reshape(1, -1), 1).tobytes()
    assert np.array_equal(packed.codes(), codes.numpy())
    assert packed.nbytes == packed_nbytes(packed.shape, packed.groups)


@pytest.mark.parametrize("bits", [torch.tensor([2, 3, 1, 2, 2, 8, 2, 3, 2, 1]), 3])
def test_the_stored_weight_is_the_fake_quantized_one_bit_for_bit(bits):
    weight, bits, scale, zero, codes = quantized(bits=bits)
    packed = PackedWeight.from_codes(codes, bits, scale, zero)
    wanted = fake_quant(weight.flatten(1), scale, zero, max_code(bits)).reshape(weight.shape)
    assert packed.dequantize().dtype == np.float32
    assert np.array_equal(packed.dequantize(), wanted.numpy())


def test_one_width_has_no_order():
    codes = codes_of(3, 5, 2)
    packed = PackedWeight.from_codes(codes, [2, 2, 2], np.ones(3), np.zeros(3))
    assert packed.row_order is None
    assert packed.groups == ((2, 3),)
    assert packed.qweight.tobytes() == pack_rows(codes, 2).tobytes()
    assert packed.nbytes == packed_nbytes((3, 5), ((2, 3),)) == 3 * 2 + 3 * 4


@given(
    columns=st.integers(1, 20), bits=st.lists(st.integers(1, 8), min_size=1), seed=st.integers(0, 9)
)
def test_any_mixture_comes_back(columns, bits, seed):
    draws = np.random.default_rng(seed).integers(0, 256, (len(bits), columns))
    codes = draws % (2 ** np.array(bits))[:, None]
    packed = PackedWeight.from_codes(codes, bits, np.ones(len(bits)), np.zeros(len(bits)))
    packed.check()
    assert np.array_equal(packed.codes(), codes)
    assert packed.nbytes == packed_nbytes(codes.shape, packed.groups)


def example():
    codes = np.array([[0, 1, 3], [0, 1, 0], [2, 2, 2]])
    return PackedWeight.from_codes(codes, [2, 1, 2], np.ones(3), np.zeros(3))


NAN, INF = np.float16("nan"), np.float16("inf")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shape": (3,)}, r"conv\.shape: expected two or more positive"),
        ({"shape": (3, 0)}, r"conv\.shape: .* found \(3, 0\)"),
        ({"shape": (3, 4.0)}, r"conv\.shape"),
        ({"shape": (10**12, 10**12)}, r"conv\.groups: expected 1000000000000 rows in all, found 3"),
        ({"groups": ((1, 1), (2, 3))}, r"conv\.groups: expected 3 rows in all, found 4"),
        ({"groups": ((0, 1), (2, 2))}, r"conv\.groups: expected pairs .bits 1 to 8"),
        ({"groups": ((1, 1), (9, 2))}, r"conv\.groups: .* found \[\(1, 1\), \(9, 2\)\]"),
        ({"groups": ((1, -1), (2, 4))}, r"conv\.groups"),
        ({"groups": ((1, 1, 1), (2, 2))}, r"conv\.groups"),
        ({"groups": ((1.0, 1), (2, 2))}, r"conv\.groups"),
        ({"groups": ()}, r"conv\.groups: expected 3 rows in all, found 0"),
        (
            {"qweight": np.zeros(4, np.uint8)},
            r"conv\.qweight: expected uint8 of shape \(3,\), found",
        ),
        ({"qweight": np.zeros(3, np.int8)}, r"found int8 of shape \(3,\)"),
        ({"groups": ((2, 3),)}, r"conv\.row_order: expected none for one group"),
        ({"row_order": None}, r"conv\.row_order: expected int16 of shape \(3,\), found none"),
        ({"row_order": np.array([0, 1, 1], "<i2")}, r"row_order: expected each of 0\.\.2 once"),
        ({"row_order": np.array([0, 1, 3], "<i2")}, r"found 3 different from 0 to 3"),
        ({"row_order": np.array([0, 1, 2], "<i8")}, r"row_order: expected int16"),
        ({"scale": np.ones(3, np.float32)}, r"conv\.scale: expected float16 of shape \(3,\)"),
        ({"scale": np.ones(2, np.float16)}, r"found float16 of shape \(2,\)"),
        ({"scale": np.array([1, 0, 1], np.float16)}, r"conv\.scale: .* > 0, found 0\.0 in row 1"),
        ({"scale": np.array([1, 1, -1], np.float16)}, r"found -1\.0 in row 2"),
        ({"scale": np.array([NAN, 1, 1], np.float16)}, r"found nan in row 0"),
        ({"zero": np.array([0, INF, 0], np.float16)}, r"conv\.zero: .* number, found inf in row 1"),
    ],
)
def test_check_names_the_key_what_was_expected_and_found(change, text):
    example().check("conv")
    with pytest.raises(InputError, match=text):
        replace(example(), **change).check("conv")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([[0, 3]], 1, [1.0], [0.0]), r"expected 0\.\.1 for 1 bits"),
        (([[0, 1]], 1, [0.1], [0.0]), "scale: expected float16 numbers, found .*0.1.* in row 0"),
        (([[0, 1]], 1, [1e6], [0.0]), "scale: expected float16"),
        (([[0, 1]], 1, [1.0], [1 / 3]), "zero: expected float16"),
        (([[0, 1]], 1, [1.0, 1.0], [0.0]), r"scale: expected one number for each of 1 rows"),
        (([[0, 1]], 1, [0.0], [0.0]), "scale: expected a finite number > 0"),
        (([0, 1], 1, [1.0], [0.0]), r"codes\.shape: expected two or more"),
    ],
)
def test_from_codes_refuses_what_the_file_cannot_hold(arguments, text):
    codes, bits, scale, zero = arguments
    with pytest.raises(InputError, match=text):
        PackedWeight.from_codes(np.array(codes), bits, np.array(scale), np.array(zero))


def test_reading_packed_weights_does_not_import_torch():
    program = (
        "import sys; from tenfold_core.quant import packing; import numpy as np;"
        "packing.pack_rows(np.zeros((1, 8), np.uint8), 3); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
