# SPDX-License-Identifier: Apache-2.0
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tenfold_core.errors import InputError  # noqa: E402
from tenfold_core.quant import integer_onednn, integer_sums  # noqa: E402
from tenfold_core.quant.affine import dequantize  # noqa: E402
from tenfold_core.quant.integer import (  # noqa: E402
    IntWeight,
    activation_codes,
    int8_product,
    int_conv1d,
    int_conv2d,
    int_linear,
)
from tenfold_core.quant.integer_reference import (  # noqa: E402
    int_conv2d_reference,
    int_linear_reference,
)

EPS = torch.finfo(torch.float32).eps
CONVOLUTIONS = [
    # in, out, height, width, kernel, stride, padding, dilation, groups
    (3, 5, 9, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (4, 6, 8, 8, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (4, 6, 11, 9, (3, 1), (3, 2), (2, 0), (2, 1), 1),
    (8, 8, 6, 6, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (8, 3, 6, 6, (1, 1), (2, 3), (1, 2), (1, 1), 1),
    (6, 6, 7, 7, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    (6, 12, 7, 7, (3, 3), (1, 2), (1, 1), (2, 1), 2),
    (4, 4, 5, 5, (5, 4), (1, 1), (2, 3), (1, 1), 1),
    (2, 2, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1),
]


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def codes_of(*shape, bits=8, seed=0):
    return torch.randint(0, 2**bits, shape, generator=drawn(seed), dtype=torch.uint8)


def floats(*shape, seed=0, low=0.01, high=0.1):
    return torch.empty(shape).uniform_(low, high, generator=drawn(seed))


def weight_zeros(kind, rows, bits):
    free = floats(rows, seed=5, low=-1.5, high=2**bits + 0.5)
    return free.round() if kind == "integer" else free


# --- the integer matrix product ---------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**20))
def test_every_path_of_the_int8_product_is_exact(rows, columns, inner, seed):
    a = (codes_of(rows, inner, seed=seed).int() - 128).to(torch.int8)
    b = (codes_of(columns, inner, seed=seed + 1).int() - 128).to(torch.int8)
    expected = torch.einsum("ri,ci->rc", a.long(), b.long())
    assert torch.equal(int8_product(a, b).long(), expected)
    assert torch.equal(integer_sums._float_product(a[None], b[None])[0].long(), expected)
    if inner:
        assert torch.equal(integer_sums._padded_product(a, b).long(), expected)


@pytest.mark.parametrize("path", ["int_mm", "padded", "float"])
def test_the_largest_sums_are_exact(path):
    # 3001 terms of 127 * 127 = 16129: 48403129 is odd and above 2**24, no float32 holds it
    a = torch.full((17, 3001), 127, dtype=torch.int8)
    product = {
        "int_mm": int8_product,
        "padded": integer_sums._padded_product,
        "float": lambda a, b: integer_sums._float_product(a[None], b[None])[0],
    }[path]
    assert torch.equal(product(a, a), torch.full((17, 17), 48_403_129, dtype=torch.int32))


def test_products_fall_back_where_int_mm_is_not_exact(monkeypatch):
    a = torch.full((17, 40), -128, dtype=torch.int8)
    monkeypatch.setattr(integer_sums, "_int_mm_exact", None)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.zeros(32, 32, dtype=torch.int32))
    assert not integer_sums.int_mm_is_exact()
    assert int8_product(a, a)[0, 0] == 40 * 16384
    monkeypatch.setattr(integer_sums, "_int_mm_exact", None)
    monkeypatch.delattr(torch, "_int_mm")
    assert not integer_sums.int_mm_is_exact()


def test_bfloat16_autocast_does_not_touch_the_sums():
    codes, weights = codes_of(2, 6, 5, 5), codes_of(6, 1, 3, 3, seed=1)
    weight = IntWeight.from_codes(weights, scale=floats(6), zero=torch.full((6,), 3.3), groups=6)
    settings = {"scale": torch.tensor(0.02), "zero": torch.tensor(9)}
    plain = int_conv2d(codes, weight, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int_conv2d(codes, weight, **settings), plain)


# --- linear -----------------------------------------------------------------------------------


def test_linear_by_hand():
    # token [-1, 0, 2] at 6 bits: d = 3/63, z = 21, codes 0, 21, 63. Rows [-1, -0.4, 0.6] with
    # d = 1.6/7, z = 4, codes 0, 2, 7 and [0.5, 0.25, -0.25] with d = 0.75/7, z = 2, codes 7, 4, 0.
    # Integer dots: 0*0 + 21*2 + 63*7 = 483 and 21*4 = 84. Corrected: 483 - 21*9 - 4*(84 - 63) = 210
    # and 84 - 21*11 - 2*(84 - 63) = -189; times the scales 2.285714 and -0.964286.
    weight = IntWeight.from_codes(
        torch.tensor([[0, 2, 7], [7, 4, 0]], dtype=torch.uint8),
        scale=torch.tensor([1.6 / 7, 0.75 / 7]),
        zero=torch.tensor([4.0, 2.0]),
    )
    codes = torch.tensor([[0, 21, 63]], dtype=torch.uint8)
    y = int_linear(codes, weight, scale=torch.tensor(3 / 63), zero=torch.tensor(21))
    torch.testing.assert_close(y, torch.tensor([[16 / 7, -6.75 / 7]]), rtol=4 * EPS, atol=0)


def linear_case(bits, weight_bits, zeros, form):
    codes = codes_of(3, 5, 37, bits=bits)
    weights = codes_of(11, 37, bits=weight_bits, seed=1)
    shape = {"one": (), "sample": (3, 1, 1), "token": (3, 5, 1)}[form]
    activation = {"scale": floats(*shape, seed=2), "zero": codes_of(*shape, bits=bits, seed=3)}
    zero = weight_zeros(zeros, 11, weight_bits)
    return codes, weights, activation, floats(11, seed=4), zero, floats(11, seed=6, low=-1)


@pytest.mark.parametrize("form", ["one", "sample", "token"])
@pytest.mark.parametrize("zeros", ["integer", "free"])
@pytest.mark.parametrize(("bits", "weight_bits"), [(8, 8), (8, 2), (6, 3), (4, 1)])
def test_linear_equals_its_reference_and_the_fake_quantized_layer(bits, weight_bits, zeros, form):
    codes, weights, activation, scale, zero, bias = linear_case(bits, weight_bits, zeros, form)
    weight = IntWeight.from_codes(weights, scale=scale, zero=zero)
    y = int_linear(codes, weight, **activation, bias=bias)
    rows = {"weight_scale": scale, "weight_zero": zero}
    exact = int_linear_reference(codes, weights, **activation, **rows, bias=bias)
    x_hat = dequantize(codes, activation["scale"], activation["zero"].float())
    w_hat = dequantize(weights, scale[:, None], zero[:, None])
    # terms of the sum: d_a d_c |qa - z_a| (|qw - shift| + |z_c - shift|), at most these
    size = F.linear(x_hat.abs().double(), w_hat.abs().double() + scale[:, None]) + bias.abs()
    assert ((y - exact).abs() <= 4 * EPS * size).all()
    assert ((y - F.linear(x_hat, w_hat, bias)).abs() <= (4 + 37) * EPS * size).all()


def test_linear_sums_equal_the_reference_exactly_when_every_factor_is_one():
    codes, weights = codes_of(7, 300), codes_of(9, 300, seed=1)
    zero = codes_of(9, seed=2).float()
    weight = IntWeight.from_codes(weights, scale=torch.ones(9), zero=zero)
    activation = {"scale": torch.ones(()), "zero": torch.tensor(131)}
    exact = int_linear_reference(
        codes, weights, **activation, weight_scale=torch.ones(9), weight_zero=zero
    )
    assert exact.abs().max() < 2**24
    assert torch.equal(int_linear(codes, weight, **activation).double(), exact)


def test_a_constant_row_far_from_zero_is_kept():
    # c = 5 as d = 5e-8, z = -1e8, q = 0
    weight = IntWeight.from_codes(
        torch.zeros(1, 4, dtype=torch.uint8), scale=torch.tensor([5e-8]), zero=torch.tensor([-1e8])
    )
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    y = int_linear(codes, weight, scale=torch.tensor(1.0), zero=torch.tensor(0))
    torch.testing.assert_close(y, torch.tensor([[50.0]]))


@pytest.mark.parametrize("shape", [(0, 5), (5,), (1, 5), (2, 3, 0, 5)])
def test_linear_keeps_the_shape_rules_of_linear(shape):
    weight = IntWeight.from_codes(codes_of(3, 5), scale=floats(3), zero=torch.full((3,), 0.5))
    y = int_linear(codes_of(*shape), weight, scale=torch.tensor(0.1), zero=torch.tensor(1))
    assert y.shape == (*shape[:-1], 3)


def test_linear_reads_codes_that_are_not_contiguous():
    codes = codes_of(5, 6).t()
    weight = IntWeight.from_codes(codes_of(3, 5), scale=floats(3), zero=torch.full((3,), 0.5))
    activation = {"scale": torch.tensor(0.1), "zero": torch.tensor(1)}
    dense = int_linear(codes.contiguous(), weight, **activation)
    assert torch.equal(int_linear(codes, weight, **activation), dense)


# --- convolution ------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("zeros", ["integer", "free"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv_equals_its_reference_and_the_fake_quantized_layer(case, zeros, per_sample):
    num_in, num_out, height, width, kernel, stride, padding, dilation, groups = case
    codes = codes_of(2, num_in, height, width)
    weights = codes_of(num_out, num_in // groups, *kernel, bits=3, seed=1)
    shape = (2, 1, 1, 1) if per_sample else ()
    activation = {"scale": floats(*shape, seed=2), "zero": codes_of(*shape, seed=3)}
    scale, zero = floats(num_out, seed=4), weight_zeros(zeros, num_out, 3)
    bias = floats(num_out, seed=6, low=-1)
    where = {"stride": stride, "padding": padding, "dilation": dilation}
    weight = IntWeight.from_codes(weights, scale=scale, zero=zero, groups=groups)
    y = int_conv2d(codes, weight, **activation, bias=bias, **where)
    rows = {"weight_scale": scale, "weight_zero": zero, "bias": bias, "groups": groups}
    exact = int_conv2d_reference(codes, weights, **activation, **rows, **where)
    column = (slice(None), None, None, None)
    x_hat = dequantize(codes, activation["scale"], activation["zero"].float())
    w_hat = dequantize(weights, scale[column], zero[column])
    fake = F.conv2d(x_hat, w_hat, bias, groups=groups, **where)
    large = w_hat.abs() + scale[column]
    size = F.conv2d(x_hat.abs(), large, bias.abs(), groups=groups, **where)
    assert y.shape == fake.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert ((y - exact).abs() <= 4 * EPS * size).all()
    assert ((y - fake).abs() <= (4 + weights[0].numel()) * EPS * size).all()


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv_sums_equal_the_reference_exactly_when_every_factor_is_one(case):
    num_in, num_out, height, width, kernel, stride, padding, dilation, groups = case
    codes = codes_of(2, num_in, height, width)
    weights = codes_of(num_out, num_in // groups, *kernel, seed=1)
    zero, ones = codes_of(num_out, seed=2).float(), torch.ones(num_out)
    where = {"stride": stride, "padding": padding, "dilation": dilation}
    activation = {"scale": torch.ones(2), "zero": torch.tensor([255, 7])}
    weight = IntWeight.from_codes(weights, scale=ones, zero=zero, groups=groups)
    rows = {"weight_scale": ones, "weight_zero": zero, "groups": groups}
    exact = int_conv2d_reference(codes, weights, **activation, **rows, **where)
    assert torch.equal(int_conv2d(codes, weight, **activation, **where).double(), exact)


def test_a_batch_at_different_timesteps_equals_its_samples_one_by_one():
    codes = codes_of(3, 4, 6, 6)
    weight = IntWeight.from_codes(
        codes_of(5, 4, 3, 3, bits=2, seed=1), scale=floats(5), zero=floats(5, high=3.0)
    )
    scale, zero = floats(3, seed=2), torch.tensor([0, 100, 255])
    together = int_conv2d(codes, weight, scale=scale, zero=zero, padding=1)
    for sample in range(3):
        one = slice(sample, sample + 1)
        alone = int_conv2d(codes[one], weight, scale=scale[one], zero=zero[one], padding=1)
        assert torch.equal(together[one], alone)


def test_unfolding_in_blocks_changes_nothing(monkeypatch):
    codes = codes_of(2, 4, 9, 6)
    weight = IntWeight.from_codes(codes_of(5, 4, 3, 3), scale=floats(5), zero=floats(5))
    activation = {"scale": torch.tensor(0.1), "zero": torch.tensor(3), "padding": 1}
    whole = int_conv2d(codes, weight, **activation)
    monkeypatch.setattr(integer_sums, "_COLUMN_BYTES", 2 * 2 * 6 * 36)  # two output rows
    assert torch.equal(int_conv2d(codes, weight, **activation), whole)


def test_conv1d_equals_the_fake_quantized_layer():
    codes, weights = codes_of(2, 6, 17), codes_of(4, 3, 3, seed=1)
    scale, zero = floats(4), floats(4, high=200.0)
    weight = IntWeight.from_codes(weights, scale=scale, zero=zero, groups=2)
    activation = {"scale": torch.tensor(0.1), "zero": torch.tensor(77)}
    y = int_conv1d(codes, weight, **activation, stride=2, padding=3, dilation=2)
    x_hat = dequantize(codes, torch.tensor(0.1), torch.tensor(77.0))
    w_hat = dequantize(weights, scale[:, None, None], zero[:, None, None])
    fake = F.conv1d(x_hat.double(), w_hat.double(), stride=2, padding=3, dilation=2, groups=2)
    torch.testing.assert_close(y.double(), fake, rtol=1e-5, atol=1e-4)


def test_integer_zero_points_need_no_extra_row():
    codes = codes_of(8, 8, bits=7)
    whole = IntWeight.from_codes(codes, scale=floats(8), zero=torch.full((8,), 20.0))
    free = IntWeight.from_codes(codes, scale=floats(8), zero=torch.full((8,), 20.4))
    assert whole.offset is None
    assert whole.operand.shape == (1, 8, 8)
    assert free.operand.shape == (1, 16, 8)
    assert whole.nbytes == 64 + 8 * 4 + 8 * 4
    assert free.to("cpu").nbytes == 128 + 8 * 4 + 8 * 4 + 8 * 4


# --- the two ways of the CPU ------------------------------------------------------------------


def test_this_cpu_or_its_torch_says_which_way_is_exact():
    assert isinstance(integer_onednn.onednn_is_exact(), bool)


def both_ways(monkeypatch, compute):
    if not integer_onednn.onednn_is_exact():
        pytest.skip("oneDNN is not exact on this CPU")
    fast = compute()
    monkeypatch.setattr(integer_onednn, "_onednn_exact", False)
    return fast, compute()


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("zeros", ["integer", "free"])
@pytest.mark.parametrize("case", [case for case in CONVOLUTIONS if case[-1] == 1], ids=str)
def test_convolutions_have_the_same_bits_both_ways(case, zeros, samples, monkeypatch):
    num_in, num_out, height, width, kernel, stride, padding, dilation, _ = case
    codes = codes_of(2, num_in, height, width)
    weights = codes_of(num_out, num_in, *kernel, bits=4, seed=1)
    weight = IntWeight.from_codes(
        weights, scale=floats(num_out, seed=4), zero=weight_zeros(zeros, num_out, 4)
    )
    settings = {"scale": floats(samples, seed=2), "zero": codes_of(samples, seed=3)}
    settings |= {"bias": floats(num_out), "stride": stride, "padding": padding}
    fast, slow = both_ways(
        monkeypatch, lambda: int_conv2d(codes, weight, **settings, dilation=dilation)
    )
    assert weight.narrow
    assert torch.equal(fast, slow)
    assert fast.is_contiguous(memory_format=torch.channels_last)
    assert slow.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("zeros", ["integer", "free"])
@pytest.mark.parametrize("size", [1, 3])
def test_sums_beyond_float32_have_the_same_bits_both_ways(size, zeros, samples, monkeypatch):
    # 1030 codes of 127 or -128 by 255: 33 million, of which float32 holds every second number
    codes = codes_of(2, 1030, 5, 4)
    codes[0], codes[1, ::2] = 255, 0
    weights = codes_of(6, 1030, size, size, bits=1, seed=1) * 255
    weights[0], weights[1], weights[:, 0], weights[:, 1] = 255, 0, 0, 255
    zero = torch.full((6,), 128.0 if zeros == "integer" else 127.7)
    weight = IntWeight.from_codes(weights, scale=torch.ones(6), zero=zero)
    settings = {"scale": torch.ones(samples), "zero": torch.tensor([3, 251])[:samples]}
    fast, slow = both_ways(monkeypatch, lambda: int_conv2d(codes, weight, **settings, padding=1))
    assert not weight.narrow
    assert torch.equal(fast, slow)
    rows = {"weight_scale": torch.ones(6), "weight_zero": zero}
    exact = int_conv2d_reference(codes, weights, **settings, **rows, padding=(1, 1))
    assert exact.abs().max() > 1 << 24
    if zeros == "integer":
        assert torch.equal(fast, exact.float())


@pytest.mark.parametrize("form", ["one", "sample", "token"])
@pytest.mark.parametrize("zeros", ["integer", "free"])
@pytest.mark.parametrize("weight_bits", [2, 8])
def test_linear_layers_have_the_same_bits_both_ways(weight_bits, zeros, form, monkeypatch):
    codes, weights, activation, scale, zero, bias = linear_case(8, weight_bits, zeros, form)
    weight = IntWeight.from_codes(weights, scale=scale, zero=zero)
    fast, slow = both_ways(monkeypatch, lambda: int_linear(codes, weight, **activation, bias=bias))
    assert torch.equal(fast, slow)


def test_convolutions_take_images_of_any_strides_and_size():
    weight = IntWeight.from_codes(codes_of(5, 4, 3, 3), scale=floats(5), zero=floats(5))
    settings = {"scale": torch.tensor(0.1), "zero": torch.tensor(3), "padding": 1}
    for size in (6, 9, 6):
        codes = codes_of(2, size, size, 4).permute(0, 3, 1, 2)
        y = int_conv2d(codes, weight, **settings)
        assert torch.equal(y, int_conv2d(codes.contiguous(), weight, **settings))


def test_a_weight_changed_in_place_is_noticed():
    codes = codes_of(1, 4, 6, 6)
    weights = codes_of(5, 4, 3, 3, bits=4)
    weight = IntWeight.from_codes(weights, scale=floats(5), zero=torch.ones(5))
    settings = {"scale": torch.tensor(0.1), "zero": torch.tensor(0)}
    assert int_conv2d(codes, weight, **settings).any()
    weight.operand.zero_()
    assert not int_conv2d(codes, weight, **settings).any()


def test_without_the_private_operators_the_sums_are_the_same(monkeypatch):
    codes = codes_of(2, 4, 6, 6)
    weight = IntWeight.from_codes(codes_of(5, 4, 3, 3), scale=floats(5), zero=floats(5))
    settings = {"scale": torch.tensor(0.1), "zero": torch.tensor(3), "padding": 1}
    expected = int_conv2d(codes, weight, **settings)
    monkeypatch.setattr(integer_onednn, "_onednn_exact", None)
    monkeypatch.setattr(torch.ops, "onednn", object())
    assert not integer_onednn.onednn_is_exact()
    assert torch.equal(int_conv2d(codes, weight, **settings), expected)


# --- compilation ------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    def __init__(self, size=3, zero=0.4, groups=1):
        super().__init__()
        self.conv = IntWeight.from_codes(
            codes_of(8, 6 // groups, size, size, bits=4),
            scale=floats(8), zero=torch.full((8,), zero), groups=groups,
        )  # fmt: skip
        self.linear = IntWeight.from_codes(
            codes_of(5, 8, bits=3), scale=floats(5), zero=torch.full((5,), zero)
        )

    def forward(self, x, multiplier, zero):
        codes = activation_codes(x, multiplier, zero, 255, channel_axis=1)
        y = int_conv2d(codes, self.conv, scale=multiplier[:, :1], zero=zero, padding=1, stride=2)
        codes = activation_codes(y.flatten(2).mT, multiplier[:1, :1], zero[:1], 63, channel_axis=-1)
        return int_linear(codes, self.linear, scale=multiplier[:1, 0], zero=zero[:1])


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("zero", [0.0, 0.4])
def test_layers_compile_into_one_graph(zero, groups, samples):
    layers = Layers(zero=zero, groups=groups)
    inputs = (
        torch.randn(2, 6, 9, 7, generator=drawn()),
        floats(samples, 6, low=5.0, high=40.0),
        codes_of(samples, bits=7),
    )
    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, found = layers(*inputs), compiled(*inputs)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("inputs", [False, True])
def test_the_operators_are_what_they_tell_the_compiler(inputs):
    weight = IntWeight.from_codes(
        codes_of(8, 6, 3, 3, bits=4), scale=floats(8), zero=torch.full((8,), 0.4)
    )
    zero = torch.tensor([7, 8], dtype=torch.int32)
    place = ([8, 6, 3, 3], [1, 2], [1, 0], [2, 1])
    ops = torch.ops.tenfold_core
    checks = ("test_schema", "test_faketensor")
    arguments = (codes_of(2, 6, 9, 7), zero, weight.operand, weight.sums, *place, True, inputs)
    torch.library.opcheck(ops.conv_sums.default, arguments, test_utils=checks)
    weight = IntWeight.from_codes(codes_of(8, 6), scale=floats(8), zero=torch.full((8,), 0.4))
    arguments = (codes_of(2, 6), zero[:, None], weight.operand, weight.sums, True, inputs)
    torch.library.opcheck(ops.linear_sums.default, arguments, test_utils=checks)


# --- codes of activations ---------------------------------------------------------------------


def plain_codes(x, multiplier, zero, qmax):
    return (x.float() * multiplier + zero).round().clamp(0, qmax).to(torch.uint8)


def test_activation_codes_by_hand():
    # -0.3 * 10 + 4 = 1; 0.5 * 5 + 4 = 6.5, to the even 6; 9 * 10 + 4 = 94, above 15
    x, multiplier = torch.tensor([[-0.3, 0.5, 9.0]]), torch.tensor([[10.0, 5.0, 10.0]])
    codes = activation_codes(x, multiplier, torch.tensor(4), 15, channel_axis=1)
    assert codes.tolist() == [[1, 6, 15]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("qmax", [1, 15, 63, 255])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_codes_of_images_are_the_plain_expression_bit_for_bit(layout, qmax, dtype):
    x = torch.randn(3, 8, 10, 9, generator=drawn()).to(dtype).contiguous(memory_format=layout)
    zero = codes_of(3, bits=qmax.bit_length(), seed=1)
    columns = (slice(None), slice(None), None, None)
    for samples in (1, 3):
        multiplier = floats(samples, 8, low=0.1, high=qmax / 2, seed=2)
        at = zero[:samples]
        codes = activation_codes(x, multiplier, at, qmax, channel_axis=1)
        expected = plain_codes(x, multiplier[columns], at[:, None, None, None], qmax)
        assert torch.equal(codes, expected)
        assert codes.stride() == x.stride()


@given(st.integers(0, 2**20))
def test_halves_round_to_even_and_far_values_saturate(seed):
    x = torch.randint(-600, 600, (64,), generator=drawn(seed)) / 2
    x = torch.cat((x, torch.tensor([3e38, -3e38, float("inf"), -float("inf"), 0.0, -0.0])))
    codes = activation_codes(x, torch.tensor(1.0), torch.tensor(100), 255, channel_axis=-1)
    assert torch.equal(codes, plain_codes(x, 1.0, 100, 255))


def test_codes_of_tokens_take_multipliers_of_every_token_or_channel():
    x = torch.randn(2, 5, 6, generator=drawn())
    by_token, by_channel = floats(2, 5, 1, low=5.0, high=90.0), floats(6, low=5.0, high=90.0)
    zero = codes_of(2, 5, 1)
    for multiplier in (by_token, by_channel, by_token * by_channel):
        codes = activation_codes(x, multiplier, zero, 255, channel_axis=-1)
        assert torch.equal(codes, plain_codes(x, multiplier, zero, 255))


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scale": torch.ones(2)}, "3 rows in 1 groups, with 2 scales"),
        ({"groups": 2}, "3 rows in 2 groups"),
        ({"codes": torch.zeros(3, 65_794, dtype=torch.uint8)}, "expected 1 to 65793"),
        ({"codes": torch.zeros(3, 0, dtype=torch.uint8)}, "rows of 0 codes"),
        ({"zero": torch.full((3,), float("nan"))}, "not finite"),
    ],
)
def test_weights_that_contradict_themselves_are_refused(change, match):
    given_ = {"codes": codes_of(3, 4), "scale": torch.ones(3), "zero": torch.zeros(3)} | change
    with pytest.raises(InputError, match=match):
        IntWeight.from_codes(given_.pop("codes"), **given_)


@pytest.mark.bad_input
def test_codes_that_do_not_fit_are_refused():
    one = {"scale": torch.tensor(1.0), "zero": torch.tensor(0)}
    linear = IntWeight.from_codes(codes_of(3, 4), scale=torch.ones(3), zero=torch.zeros(3))
    conv = IntWeight.from_codes(codes_of(3, 4, 3, 3), scale=torch.ones(3), zero=torch.zeros(3))
    with pytest.raises(InputError, match=r"codes \(2, 5\) do not fit"):
        int_linear(codes_of(2, 5), linear, **one)
    with pytest.raises(InputError, match="last axis must be 1"):
        int_linear(codes_of(2, 4), linear, scale=torch.ones(4), zero=torch.tensor(0))
    with pytest.raises(InputError, match="expected a weight of 4 axes"):
        int_conv2d(codes_of(1, 4, 5, 5), linear, **one)
    with pytest.raises(InputError, match="expected a weight of 3 axes"):
        int_conv1d(codes_of(1, 4, 5), conv, **one)
    with pytest.raises(InputError, match="do not fit a weight"):
        int_conv2d(codes_of(1, 3, 5, 5), conv, **one)
    with pytest.raises(InputError, match="reaching over 3 does not fit into the padded size 2"):
        int_conv2d(codes_of(1, 4, 5, 2), conv, **one)
    with pytest.raises(InputError, match="2 scales and 1 zero points for a batch of 3"):
        int_conv2d(codes_of(3, 4, 5, 5), conv, scale=torch.ones(2), zero=torch.tensor(0))


@pytest.mark.bad_input
def test_multipliers_that_do_not_fit_are_refused():
    x, one = torch.zeros(2, 3, 4, 5), torch.tensor(1.0)
    for shape in ((4,), (3, 3), (2, 1, 3)):
        with pytest.raises(InputError, match="does not fit activations"):
            activation_codes(x, torch.ones(shape), one, 15, channel_axis=1)
    with pytest.raises(InputError, match=r"of shape \(3,\) does not fit"):
        activation_codes(x, one, torch.ones(3), 15, channel_axis=1)
