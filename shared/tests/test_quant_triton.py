# SPDX-License-Identifier: Apache-2.0
"""The Triton layers against the CPU's, interpreted or on a device.

A process has one of both: triton decides at its import. Without a CUDA device this module chooses
the interpreter; on a machine with one, TRITON_INTERPRET=1 chooses it.
"""

import os
import subprocess
import sys

import pytest
from tenfold_core.errors import InputError
from tenfold_core.quant.packing import PackedWeight, pack_rows

torch = pytest.importorskip("torch")
with pytest.MonkeyPatch.context() as environment:
    if not torch.cuda.is_available():
        environment.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from tenfold_core.quant import triton_integer

import torch.nn.functional as F  # noqa: E402
from tenfold_core.quant import integer  # noqa: E402
from tenfold_core.quant.integer import (  # noqa: E402
    IntWeight,
    activation_codes,
    int_conv2d,
    int_linear,
)
from tenfold_core.quant.triton_integer import packed_linear  # noqa: E402

INTERPRETED = triton_integer.INTERPRETED
U = 2.0**-24
CONVOLUTIONS = [
    # in, out, height, width, kernel, stride, padding, dilation
    (3, 5, 9, 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    (4, 6, 8, 8, (3, 3), (2, 2), (1, 1), (1, 1)),
    (4, 6, 11, 9, (3, 1), (3, 2), (2, 0), (2, 1)),
    (8, 3, 6, 6, (1, 1), (2, 3), (1, 2), (1, 1)),
    (4, 4, 5, 5, (5, 4), (1, 1), (2, 3), (1, 1)),
    (2, 2, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (70, 130, 9, 9, (3, 3), (1, 1), (1, 1), (1, 1)),  # several tiles along every axis
]


@pytest.fixture(autouse=True)
def same_mode_as_at_import(monkeypatch):
    """The interpreter looks again while it runs; other modules need not know of it."""
    monkeypatch.setenv("TRITON_INTERPRET", str(int(INTERPRETED)))


on_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="no CUDA device, or TRITON_INTERPRET=1"),
]
on_cpu = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled: no TRITON_INTERPRET=1")


@pytest.fixture(params=[pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=on_device)])
def device(request, monkeypatch):
    """A device whose layers run fused: on the CPU they do so here, interpreted."""
    if request.param == "cpu":
        monkeypatch.setattr(integer, "runs_fused", fused_on_cpu)
    return request.param


def fused_on_cpu(codes, groups, *_, **__):
    return groups == 1 and codes.numel() > 0


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def codes_of(*shape, bits=8, seed=0):
    return torch.randint(0, 2**bits, shape, generator=drawn(seed), dtype=torch.uint8)


def floats(*shape, seed=0, low=0.01, high=0.1):
    return torch.empty(shape).uniform_(low, high, generator=drawn(seed))


def weight_of(*shape, zeros="free", bits=4):
    zero = floats(shape[0], seed=5, low=-1.5, high=2**bits + 0.5)
    return IntWeight.from_codes(
        codes_of(*shape, bits=bits, seed=1),
        scale=floats(shape[0], seed=4),
        zero=zero.round() if zeros == "integer" else zero,
    )


def check(found, expected, terms):
    """Compare within the rounding of two products and a result: ``terms`` bounds all of them."""
    assert found.shape == expected.shape
    assert ((found.cpu() - expected).abs() <= 2 * U * (terms + expected.abs())).all()


def conv_terms(codes, weight, settings, where):
    """Return ``|offset inputs factor| + |value factor|``, by convolutions of the shifted codes."""
    out, channels, *kernel = weight.shape
    rows = weight.operand[0, :out, : weight.sums.new_tensor(weight.shape[1:]).prod()]
    shifted = rows.reshape(out, *kernel, channels).permute(0, 3, 1, 2).double()
    x = codes.double() - settings["zero"].double().reshape(-1, 1, 1, 1)
    value = F.conv2d(x, shifted, **where).abs()
    offset = torch.zeros(out) if weight.offset is None else weight.offset
    inputs = F.conv2d(x, torch.ones_like(shifted[:1]), **where).abs()
    factor = settings["scale"].reshape(-1, 1, 1, 1) * weight.scale[:, None, None]
    return (value + offset.abs()[:, None, None] * inputs) * factor


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("zeros", ["integer", "free"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolutions_equal_those_of_the_cpu(case, zeros, samples, device, monkeypatch):
    num_in, num_out, height, width, kernel, stride, padding, dilation = case
    codes = codes_of(2, num_in, height, width)
    weight = weight_of(num_out, num_in, *kernel, zeros=zeros)
    settings = {"scale": floats(samples, seed=2), "zero": codes_of(samples, seed=3)}
    where = {"stride": stride, "padding": padding, "dilation": dilation}
    for bias in (None, floats(num_out, low=-1.0)):
        moved = {name: value.to(device) for name, value in settings.items()}
        added = None if bias is None else bias.to(device)
        found = int_conv2d(codes.to(device), weight.to(device), **moved, bias=added, **where)
        assert found.is_contiguous(memory_format=torch.channels_last)
        with monkeypatch.context() as patch:
            patch.setattr(integer, "runs_fused", lambda *_, **__: False)
            expected = int_conv2d(codes, weight, **settings, bias=bias, **where)
        check(found, expected, conv_terms(codes, weight, settings, where))


def test_images_of_any_strides_give_the_same(device):
    codes, weight = codes_of(2, 6, 6, 5).to(device), weight_of(7, 5, 3, 3).to(device)
    settings = {"scale": torch.tensor(0.1), "zero": torch.tensor(7)}
    settings = {name: value.to(device) for name, value in settings.items()}
    image = codes.permute(0, 3, 1, 2)
    dense = int_conv2d(image.contiguous(), weight, **settings)
    assert torch.equal(int_conv2d(image, weight, **settings), dense)


@pytest.mark.parametrize("form", ["one", "sample", "token"])
@pytest.mark.parametrize("zeros", ["integer", "free"])
@pytest.mark.parametrize("bits", [1, 8])
def test_linear_layers_equal_those_of_the_cpu(bits, zeros, form, device, monkeypatch):
    codes, weight = codes_of(3, 5, 137), weight_of(19, 137, zeros=zeros, bits=bits)
    shape = {"one": (), "sample": (3, 1, 1), "token": (3, 5, 1)}[form]
    scale, zero, bias = floats(*shape, seed=2), codes_of(*shape, seed=3), floats(19, low=-1.0)
    found = int_linear(
        codes.to(device),
        weight.to(device),
        scale=scale.to(device),
        zero=zero.to(device),
        bias=bias.to(device),
    )
    with monkeypatch.context() as patch:
        patch.setattr(integer, "runs_fused", lambda *_, **__: False)
        expected = int_linear(codes, weight, scale=scale, zero=zero, bias=bias)
    x = codes.double() - zero.double()
    value = (x @ weight.operand[0, :19, :137].double().T).abs()
    offset = torch.zeros(19) if weight.offset is None else weight.offset
    terms = (value + offset.abs() * x.sum(-1, keepdim=True).abs()) * scale * weight.scale
    check(found, expected, terms)


@pytest.mark.parametrize("shape", [(0, 9), (9,), (2, 0, 9)])
def test_linear_layers_keep_the_shape_rules_of_linear(shape, device):
    weight = weight_of(3, 9).to(device)
    settings = {"scale": torch.tensor(0.1), "zero": torch.tensor(1)}
    settings = {name: value.to(device) for name, value in settings.items()}
    assert int_linear(codes_of(*shape).to(device), weight, **settings).shape == (*shape[:-1], 3)


def test_the_largest_sums_are_exact(device):
    # 2130706305 and 255 less: nearly 2**31, and odd
    codes = torch.full((1, 65_793), 255, dtype=torch.uint8)
    weights = torch.full((2, 65_793), 255, dtype=torch.uint8)
    weights[0, 0] = 254
    weight = IntWeight.from_codes(weights, scale=torch.ones(2), zero=torch.full((2,), 128.0))
    one = {"scale": torch.ones(1, device=device), "zero": torch.zeros(1, 1, device=device)}
    y = int_linear(codes.to(device), weight.to(device), **one)
    exact = [65_793 * 255 * 127 - 255, 65_793 * 255 * 127]
    assert torch.equal(y.cpu(), torch.tensor([exact], dtype=torch.int64).float())


def test_layers_compile_into_one_graph(device):
    weight = weight_of(7, 5, 3, 3).to(device)
    settings = {"scale": torch.tensor(0.1), "zero": torch.tensor(7)}
    settings = {name: value.to(device) for name, value in settings.items()}
    codes = codes_of(2, 5, 6, 5).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda codes: int_conv2d(codes, weight, **settings, padding=1) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        assert torch.equal(compiled(codes), int_conv2d(codes, weight, **settings, padding=1) + 1)


# --- packed rows ------------------------------------------------------------------------------


def packed_case(bits, rows=37, columns=133):
    codes = codes_of(rows, columns, bits=bits)
    return codes, torch.from_numpy(pack_rows(codes, bits)), floats(rows), floats(rows, high=2**bits)


def packed_terms(x, codes, scale, zero):
    """Return the sum of the sizes of all terms, whose rounding bounds the error."""
    size = codes.double() + zero.double()[:, None] + 2.0 ** codes.max().item().bit_length()
    return x.double().abs() @ (scale.double()[:, None] * size).T


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_rows_multiply_as_their_dequantized_weight(bits, dtype, device):
    if INTERPRETED and dtype == "bfloat16":
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    codes, data, scale, zero = packed_case(bits)
    bias = floats(37, low=-1.0)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 133, generator=drawn(rows)).to(getattr(torch, dtype))
        weight = {"scale": scale.to(device), "zero": zero.to(device), "bias": bias.to(device)}
        y = packed_linear(x.to(device), data.to(device), bits=bits, **weight).cpu()
        w = scale.double()[:, None] * (codes.double() - zero.double()[:, None])
        exact = x.double() @ w.T + bias.double()
        bound = (133 + 4) * U * packed_terms(x, codes, scale, zero)
        result = torch.finfo(x.dtype).eps * exact.abs()  # rounded once more to the type of x
        assert y.dtype == x.dtype
        assert ((y.double() - exact).abs() <= bound + result + U * bias.abs()).all()


def test_one_packed_row_by_hand(device):
    # 2 bits, 3 0 1 2 as in byte 147: 0.5 (3 - 1.5) * 1 + 0.5 (0 - 1.5) * 2 + ... = -0.25
    x = torch.tensor([[1.0, 2.0, 1.0, 1.0]], device=device)
    data = torch.tensor([[147]], dtype=torch.uint8, device=device)
    half, zero = torch.tensor([0.5], device=device), torch.tensor([1.5], device=device)
    assert packed_linear(x, data, bits=2, scale=half, zero=zero).tolist() == [[-0.75]]


def test_groups_of_a_packed_weight_are_one_call_each(device):
    codes = codes_of(6, 21, bits=2)
    weight = PackedWeight.from_codes(
        codes, [2, 3, 2, 3, 2, 2], torch.full((6,), 0.5), torch.ones(6)
    )
    x = torch.randn(2, 3, 21, generator=drawn(1))
    y, byte, row = torch.empty(2, 3, 6), 0, 0
    for bits, count in weight.groups:
        size = (21 * bits + 7) // 8
        data = torch.from_numpy(weight.qweight[byte : byte + count * size]).view(count, size)
        order = torch.from_numpy(weight.row_order[row : row + count]).long()
        row_of = {"scale": torch.full((count,), 0.5), "zero": torch.ones(count)}
        row_of = {name: value.to(device) for name, value in row_of.items()}
        part = packed_linear(x.to(device), data.to(device), bits=bits, **row_of)
        y[..., order] = part.cpu()
        byte, row = byte + count * size, row + count
    expected = x @ torch.from_numpy(weight.dequantize()).T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_no_rows_are_no_launch(device):
    _, data, scale, zero = packed_case(3)
    rows = {"scale": scale.to(device), "zero": zero.to(device)}
    y = packed_linear(torch.zeros(2, 0, 133, device=device), data.to(device), bits=3, **rows)
    assert y.shape == (2, 0, 37)


@pytest.mark.bad_input
def test_bytes_of_other_rows_are_refused():
    _, data, scale, zero = packed_case(3)
    with pytest.raises(InputError, match=r"expected \(rows, 67\) for 133 codes of 4 bits"):
        packed_linear(torch.zeros(1, 133), data, bits=4, scale=scale, zero=zero)


# --- what the interpreter does not see --------------------------------------------------------


def test_the_integer_layers_do_not_import_triton():
    code = (
        "import sys, torch\n"
        "from tenfold_core.quant.integer import *\n"
        "w = IntWeight.from_codes(torch.zeros(3, 4, dtype=torch.uint8), scale=torch.ones(3),"
        " zero=torch.zeros(3))\n"
        "int_linear(torch.zeros(2, 4, dtype=torch.uint8), w, scale=torch.ones(()),"
        " zero=torch.tensor(0))\n"
        "print('triton' in sys.modules, 'tenfold_core.quant.triton_integer' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before = "import sys, torch; print('triton' in sys.modules)"
    torch_alone = subprocess.run(
        [sys.executable, "-c", before], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [torch_alone.stdout.strip(), "False"]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tenfold_core.quant import triton_integer

def build(kernel, types, constants):
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]]
               for n in names if types.get(n, "").startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttgir"]

types = {"codes": "*u8", "zero": "*i32", "operand": "*i8", "row_sums": "*i32"}
types |= dict.fromkeys(["scale", "weight_scale", "offset", "bias", "out"], "*fp32")
place = dict(TAPS_DOWN=3, TAPS_RIGHT=3, STRIDE_DOWN=1, STRIDE_RIGHT=1, PAD_DOWN=1, PAD_RIGHT=1,
             DILATION_DOWN=1, DILATION_RIGHT=1, channel_stride=1)
for offset, tile in ((True, 128),):
    text = build(triton_integer._conv_kernel, types, place | dict(
        OFFSET=offset, BIAS=offset, BLOCK_M=tile, BLOCK_N=tile, BLOCK_K=64))
    print("conv", offset, tile, text.count("dot"))
for bits, kind in ((3, "bf16"), (8, "fp32")):
    types = {"data": "*u8", "x": "*" + kind, "out": "*" + kind}
    types |= dict.fromkeys(["scale", "zero", "bias"], "*fp32")
    text = build(triton_integer._packed_kernel, types, dict(
        BITS=bits, BIAS=True, BLOCK_M=16, BLOCK_N=32, BLOCK_K=128))
    print("packed", bits, kind, text.count("dot"))
"""


@pytest.mark.slow
def test_kernels_compile_for_a_device(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["conv", "packed", "packed"]
    assert all(int(line[-1]) > 0 for line in lines)


# --- the other ways of a device ---------------------------------------------------------------


class TestOnADevice:
    pytestmark = on_device

    def test_products_of_many_rows_are_the_librarys_and_equal(self):
        codes, weight = codes_of(2048, 128), weight_of(64, 128)
        settings = {"scale": torch.tensor(0.1), "zero": torch.tensor(7)}
        expected = int_linear(codes, weight, **settings)
        settings = {name: value.cuda() for name, value in settings.items()}
        assert not integer.runs_fused(codes.cuda(), 1, product=True)
        found = int_linear(codes.cuda(), weight.to("cuda"), **settings).cpu()
        torch.testing.assert_close(found, expected, rtol=4 * U, atol=1e-4)

    def test_groups_and_gradients_take_the_unfused_way(self):
        codes = codes_of(2, 6, 7, 7)
        weight = IntWeight.from_codes(
            codes_of(12, 3, 3, 3), scale=floats(12), zero=floats(12), groups=2
        )
        expected = int_conv2d(codes, weight, scale=torch.tensor(0.1), zero=torch.tensor(7))
        scale = torch.tensor(0.1, device="cuda", requires_grad=True)
        zero = torch.tensor(7, device="cuda")
        found = int_conv2d(codes.cuda(), weight.to("cuda"), scale=scale, zero=zero)
        torch.testing.assert_close(found.detach().cpu(), expected, rtol=4 * U, atol=1e-4)
        found.sum().backward()
        assert scale.grad.isfinite()

    def test_codes_of_activations_equal_those_of_the_cpu(self):
        x = torch.randn(3, 8, 10, 9, generator=drawn(0))
        multiplier, zero = floats(3, 8, low=5.0, high=90.0), codes_of(3)
        expected = activation_codes(x, multiplier, zero, 255, channel_axis=1)
        found = activation_codes(x.cuda(), multiplier.cuda(), zero.cuda(), 255, channel_axis=1)
        assert torch.equal(found.cpu(), expected)

    def test_inductor_compiles_layers_into_one_graph(self):
        weight = weight_of(32, 32, 3, 3).to("cuda")
        settings = {"scale": torch.tensor(0.1).cuda(), "zero": torch.tensor(7).cuda()}
        codes = codes_of(2, 32, 16, 16).cuda()
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda codes: int_conv2d(codes, weight, **settings, padding=1).relu(), fullgraph=True
        )
        with torch.no_grad():
            expected = int_conv2d(codes, weight, **settings, padding=1).relu()
            assert torch.equal(compiled(codes), expected)
