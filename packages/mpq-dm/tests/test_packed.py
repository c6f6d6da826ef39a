# SPDX-License-Identifier: Apache-2.0
"""Packed layers: their arithmetic by hand, against floats, in every mode, and what they store."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpq_dm.codes import unpack_bits
from mpq_dm.entry import LayerEntry
from mpq_dm.operators import apply_weight, channel_axis
from mpq_dm.packed import MODES, PackedLayer, set_mode
from mpq_dm.plan import LayerPlan
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant.activations import TimestepContext
from tenfold_core.quant.packing import pack_rows
from tenfold_core.quant.state import bits_of
from torch import nn

STEPS = [999.0, 500.0, 1.0]
MODULES = {
    "linear": lambda: nn.Linear(6, 12),
    "linear without bias": lambda: nn.Linear(5, 3, bias=False),
    "conv1d": lambda: nn.Conv1d(6, 12, 3, padding=1, dilation=2),
    "conv2d": lambda: nn.Conv2d(6, 12, (3, 1), stride=2, padding=(1, 0)),
    "grouped": lambda: nn.Conv2d(6, 12, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False),
    "same": lambda: nn.Conv2d(6, 12, 3, padding="same"),
    "reflected": lambda: nn.Conv2d(6, 12, 3, padding=1, padding_mode="reflect"),
    "conv3d": lambda: nn.Conv3d(6, 4, 2),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, groups=2),
    "transposed1d": lambda: nn.ConvTranspose1d(6, 10, 3, padding=1),
}
FLOAT_ONLY = ("same", "reflected", "conv3d", "transposed", "transposed1d")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def input_of(module, batch=2):
    spatial = {2: (4,), 3: (9,), 4: (8, 7), 5: (4, 5, 3)}[module.weight.dim()]
    channels = getattr(module, "in_channels", None) or module.in_features
    shape = (batch, *spatial, channels) if module.weight.dim() == 2 else (batch, channels, *spatial)
    return drawn(*shape, seed=7)


def module_of(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODULES[kind]().eval()


@pytest.fixture
def context():
    context = TimestepContext(STEPS)
    context.set_(500)
    return context


@pytest.fixture
def packed(context, plan_of):
    """Pack a module: packed(kind or module, bits=2), at the steps of `context`."""

    def build(module, context=context, **settings):
        module = module_of(module) if isinstance(module, str) else module
        return PackedLayer.from_plan(module, *plan_of(module, len(STEPS), **settings), context)

    return build


def expected(layer, x):
    """The layer in double precision: d (q - z) of input codes, s_c (q - z_c) of weight codes."""
    codes, scale, zero = layer.codes(x)
    weight = layer.packed_weight()
    rows = torch.from_numpy(weight.codes()).flatten(1).double()
    rows = (rows - torch.from_numpy(weight.zero).double()[:, None]) * torch.from_numpy(
        weight.scale
    ).double()[:, None]
    bias = None if layer.bias is None else layer.bias.double()
    inputs = scale.double() * (codes.double() - zero.double())
    return apply_weight(layer.operator, inputs, rows.view(weight.shape), bias)


@torch.no_grad()
def test_a_layer_by_hand():
    module = nn.Linear(2, 1)
    module.bias.fill_(0.25)
    context = TimestepContext([10.0])
    context.set_(10)
    plan = LayerPlan(
        role="body", bits=torch.tensor([2]), scale=torch.tensor([[0.5]]),
        zero=torch.tensor([[1.5]]), smooth=torch.tensor([2.0, 0.5]), act_bits=3,
        act_scale=torch.tensor([0.5]), act_zero=torch.tensor([1.0]),
    )  # fmt: skip
    codes = torch.tensor([[0, 3]], dtype=torch.uint8)
    layer = PackedLayer.from_plan(module, plan, codes, context)
    assert layer.qweight.tolist() == [0b1100]
    # rows 0.5 (q - 1.5) = -0.75, 0.75, over the divisors 2 and 0.5
    assert layer.quantized_rows().tolist() == [[-0.75, 0.75]]
    assert layer.weight.tolist() == [[-0.375, 1.5]]
    x = torch.tensor([[2.0, -0.25], [9.0, 0.0]])
    # x / (s d) = 2, -1 and 9, 0; plus 1, clamped to 0..7: codes 3, 0 and 7, 1
    assert layer.codes(x)[0].tolist() == [[3, 0], [7, 1]]
    # 0.5 (2 * -0.75 - 1 * 0.75) + 0.25, and 0.5 (6 * -0.75 + 0) + 0.25
    for mode in MODES:
        layer.set_mode_(mode)
        assert layer(x).tolist() == [[-0.875], [-2.0]]


@torch.no_grad()
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_all_modes_compute_what_the_codes_stand_for(kind, smooth, packed):
    module = module_of(kind)
    layer = packed(module, smooth=smooth)
    x = input_of(module)
    found = {}
    for mode in MODES:
        layer.set_mode_(mode)
        found[mode] = layer(x)
        assert found[mode].shape == module(x).shape
    assert layer.integer == (kind not in FLOAT_ONLY)
    assert torch.equal(found["packed"], found["int8"])
    for value in found.values():  # sums of at most 54 products
        torch.testing.assert_close(value.double(), expected(layer, x), rtol=2e-5, atol=2e-5)
    if not layer.integer:
        assert torch.equal(found["dequant"], found["int8"])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped", "transposed"])
def test_eight_bits_come_close_to_the_module(kind, packed):
    module = module_of(kind)
    layer = packed(module, bits=8, act_bits=8, act_range=8.0)
    assert layer.weight.shape == module.weight.shape
    assert layer.weight.dtype == torch.float32
    torch.testing.assert_close(layer.weight, module.weight, rtol=0, atol=5e-3)
    x = input_of(module).clamp(-4, 4)
    error = (layer(x) - module(x)).abs().max() / module(x).abs().max()
    assert error < 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv3d"])
def test_half_precision_inputs_give_outputs_of_their_type(kind, dtype, packed):
    layer = packed(kind)
    x = input_of(module_of(kind)).to(dtype)
    for mode in MODES:
        layer.set_mode_(mode)
        assert torch.equal(layer(x), layer(x.float()).to(dtype))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.to(dtype))
        assert layer(x).dtype == layer.dtype == layer.weight.dtype == dtype


@torch.no_grad()
def test_autocast_changes_nothing(packed):
    layer, x = packed("conv2d"), input_of(module_of("conv2d"))
    for mode in MODES:
        layer.set_mode_(mode)
        with torch.autocast("cpu", torch.bfloat16):
            inside = layer(x)
        assert torch.equal(inside, layer(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:timestep outside the 3 calibrated ones")
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "transposed"])
def test_every_sample_has_its_own_step(kind, context, packed):
    module = module_of(kind)
    layer, x = packed(module), input_of(module, batch=4)
    times = [1.0, 999.0, 700.0, 500.0]
    for mode in MODES:
        layer.set_mode_(mode)
        alone = []
        for sample, time in zip(x, times, strict=True):
            context.set_(time)
            alone.append(layer(sample[None]))
        context.set_(torch.tensor(times))
        torch.testing.assert_close(layer(x), torch.cat(alone), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_scales_between_two_steps_are_interpolated_in_logarithms(context, packed):
    layer = packed("linear")
    layer.act_scale = bits_of(torch.tensor([0.04, 0.01, 0.01]))
    layer.act_zero = torch.tensor([8, 3, 3], dtype=torch.int16)
    layer.set_mode_("int8")
    with pytest.warns(UserWarning, match="outside the 3 calibrated ones"):
        context.set_(749.5)  # halfway from 999 to 500
    _, scale, zero = layer.codes(input_of(module_of("linear")))
    assert scale.item() == pytest.approx(0.02)
    assert zero.item() == 6  # 5.5, to even


@torch.no_grad()
def test_inputs_may_hold_several_items_of_a_sample(context, packed):
    layer = packed("linear")
    x = drawn(6, 6)
    context.set_(torch.tensor([999.0, 1.0]))
    found = layer(x)
    context.set_(torch.tensor([999.0] * 3 + [1.0] * 3))
    assert torch.equal(found, layer(x))
    context.set_(torch.tensor([999.0, 999.0, 1.0, 1.0]))
    with pytest.raises(InputError, match=r"first axis of \(6, 6\) is no multiple of the 4"):
        layer(x)


@torch.no_grad()
def test_vectors_and_single_samples(packed):
    linear = packed("linear")
    assert torch.equal(linear(drawn(6)), linear(drawn(6)[None])[0])
    for kind in ("conv1d", "conv2d", "conv3d"):
        layer, x = packed(kind), input_of(module_of(kind))
        assert torch.equal(layer(x[0]), layer(x[:1])[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed"])
def test_sixteen_bits_are_the_module_with_halved_weights(kind, context):
    module = module_of(kind)
    layer = PackedLayer.from_half(module, "skip")
    assert layer.entry.to_dict() == {
        "role": "skip", "act_bits": 16, "groups": [[16, len(layer.qweight)]], "smooth": False,
    }  # fmt: skip
    assert set(layer.state_dict()) == {"qweight", "bias"}
    assert layer.qweight.dtype == torch.int16
    module.weight.copy_(module.weight.half())
    x = input_of(module)
    for mode in MODES:
        layer.set_mode_(mode)
        assert torch.equal(layer(x), module(x))
    assert torch.equal(layer.weight, module.weight)
    with pytest.raises(InputError, match="found 16 bits, expected codes"):
        layer.packed_weight()
    module.weight.flatten()[1] = 1e6
    with pytest.raises(InputError, match="1 values are not finite in float16"):
        PackedLayer.from_half(module, "skip")


@torch.no_grad()
@pytest.mark.parametrize("kind", MODULES)
def test_an_empty_layer_takes_the_state_of_a_packed_one(kind, context, packed):
    module = module_of(kind)
    layer = packed(module)
    other = PackedLayer.empty(module_of(kind), layer.entry.to_dict(), len(STEPS))
    assert {part.device.type for part in other.buffers()} == {"meta"}
    assert {key: (part.dtype, part.shape) for key, part in other.state_dict().items()} == {
        key: (part.dtype, part.shape) for key, part in layer.state_dict().items()
    }
    other.load_state_dict(layer.state_dict(), assign=True)
    other.bind_(context)
    assert torch.equal(other(input_of(module)), layer(input_of(module)))
    assert other.entry == layer.entry


def test_the_state_is_the_file_format(packed):
    layer = packed("conv2d", bits=torch.tensor([1, 2, 3] * 4))
    found = {name: (part.dtype, tuple(part.shape)) for name, part in layer.named_buffers()}
    # rows of 18 codes: 4 rows of 3 bytes, 4 of 5, 4 of 7
    assert found == {
        "qweight": (torch.uint8, (4 * 3 + 4 * 5 + 4 * 7,)),
        "row_order": (torch.int16, (12,)),
        "scale": (torch.int16, (12,)),
        "zero": (torch.int16, (12,)),
        "smooth": (torch.int16, (6,)),
        "act_scale": (torch.int32, (3,)),
        "act_zero": (torch.int16, (3,)),
    }
    assert layer.row_order.tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    plain = packed("conv2d", bits=2, smooth=False)
    assert "row_order" not in plain.state_dict()
    assert "smooth" not in plain.state_dict()


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 3), st.integers(0, 2**20))
def test_tensors_unpack_as_arrays_do(bits, columns, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    stored = torch.from_numpy(pack_rows(codes, bits))
    assert torch.equal(unpack_bits(stored, bits, columns), codes)


def test_both_ways_to_unpack_a_layer_agree(context, monkeypatch, packed):
    for bits in (3, torch.tensor([1, 3, 8] * 4)):
        layer = packed("conv2d", bits=bits)
        by_array = layer.quantized_rows()
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert torch.equal(layer.quantized_rows(), by_array)


@torch.no_grad()
def test_a_row_has_no_more_values_than_its_bits_allow(packed):
    layer = packed("linear", bits=torch.tensor([1, 2, 3] * 4), smooth=False)
    values = [len(row.unique()) for row in layer.weight]
    assert all(count <= 2**bits for count, bits in zip(values, [1, 2, 3] * 4, strict=True))


@torch.no_grad()
def test_copies_are_independent_and_loading_replaces_what_was_prepared(context, packed):
    layer, x = packed("linear"), input_of(module_of("linear"))
    for mode in MODES:
        layer.set_mode_(mode)
        before, other = layer(x), copy.deepcopy(layer)
        assert other.context is not context
        other.context.set_(1)
        assert torch.equal(layer(x), before)
        other.context.set_(500)
        assert torch.equal(other(x), before)
        state = other.state_dict()
        state["scale"] = bits_of(torch.full((12,), 0.25).half())
        other.load_state_dict(state)
        assert not torch.equal(other(x), before)
        assert torch.equal(layer(x), before)


@torch.no_grad()
def test_moving_a_layer_makes_anew_what_it_needs(packed):
    layer = packed("linear")
    layer.prepare_()
    moved = copy.deepcopy(layer).to("meta")
    assert moved._ready_on is None
    assert moved._int_weight is None
    assert layer.to(torch.float16).qweight.dtype == torch.uint8
    assert layer.weight.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped", "transposed"])
@torch.no_grad()
def test_a_gpu_gives_what_the_cpu_does(kind, context, packed):
    layer, x = packed(kind), input_of(module_of(kind))
    on_cpu, codes = layer(x), layer.codes(x)[0]
    context.cuda()
    context.set_(500)
    layer.cuda()
    for mode in MODES:
        layer.set_mode_(mode)
        torch.testing.assert_close(layer(x.cuda()).cpu(), on_cpu, rtol=1e-3, atol=1e-3)
        assert torch.equal(layer.codes(x.cuda())[0].cpu(), codes)


class Two(nn.Module):
    def __init__(self, conv, linear, context):
        super().__init__()
        self.conv, self.linear = conv, linear
        self.context = context
        context.attach(self)

    def forward(self, x, timestep):
        return self.linear(self.conv(x))


@pytest.mark.skipif(
    hasattr(PackedLayer.forward, "__wrapped__"), reason="torch.compile cannot trace the type checks"
)
@pytest.mark.parametrize("mode", MODES)
def test_it_compiles_as_one_graph_for_every_step(mode, context, packed):
    model = Two(packed("grouped"), packed(nn.Linear(7, 5)), context)
    set_mode(model, mode)
    x = input_of(module_of("grouped"))
    with torch.no_grad():
        try:
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            first = compiled(x, torch.tensor([999, 1]))
        except (ImportError, RuntimeError) as error:
            if isinstance(error, torch._dynamo.exc.Unsupported):
                raise
            pytest.skip(f"torch.compile does not run here: {str(error).splitlines()[0]}")
        with torch.compiler.set_stance("fail_on_recompile"):
            second = compiled(x, torch.tensor([500, 500]))
        assert torch.equal(first, model(x, torch.tensor([999, 1])))
        assert torch.equal(second, model(x, torch.tensor([500, 500])))


def test_what_a_layer_prints_and_answers(packed):
    layer = packed("conv2d", bits=torch.tensor([1, 2, 3] * 4))
    assert "bits=4x1+4x2+4x3, act_bits=6, role=body, mode=int8" in repr(layer)
    assert (layer.in_channels, layer.kernel_size, layer.groups) == (6, (3, 1), 1)
    assert channel_axis(layer.operator) == 1
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(1)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"smooth": torch.full((6,), 0.1)}, "smooth: found numbers that float16 has not"),
        ({"smooth": torch.ones(5)}, r"smooth: found torch.int16 \(5,\), expected .* \(6,\)"),
        ({"smooth": torch.zeros(6)}, r"plan.smooth: expected a finite number > 0, found 0.0 at 0"),
        ({"act_zero": torch.tensor([0.5, 1, 2])}, "act_zero: found fractions, expected codes"),
        ({"act_zero": torch.tensor([0, 1, 64])}, "plan.act_zero: expected a code of 6 bits, 0 to "
                                                  "63, found 64 at 2"),
        ({"act_scale": torch.tensor([1.0, -1, 2])}, "plan.act_scale: expected .* found -1.0 at 1"),
        ({"act_scale": torch.ones(2)}, r"act_scale: found .* \(2,\), expected torch.int32 \(3,\)"),
        ({"act_bits": 9}, "act_bits: found 9, expected 1 to 8"),
        ({"scale": torch.full((12, 1), 0.1)}, "scale"),
        ({"zero": torch.full((12, 1), float("nan"))}, "zero"),
        ({"bits": torch.full((12,), 1)}, r"codes: expected 0\.\.1 for 1 bits, found 0\.\."),
        ({"bits": torch.full((12,), 9)}, "9"),
    ],
)  # fmt: skip
def test_plans_that_no_file_holds_are_refused(change, match, context, plan_of):
    module = module_of("linear")
    plan, codes = plan_of(module, len(STEPS), bits=2)
    values = {name: getattr(plan, name) for name in LayerPlan.__slots__} | change
    with pytest.raises((InputError, ConfigError), match=match):
        PackedLayer.from_plan(module, LayerPlan(**values), codes, context)


@pytest.mark.bad_input
def test_codes_of_another_shape_are_refused(context, plan_of):
    plan, codes = plan_of(module_of("linear"), len(STEPS))
    with pytest.raises(InputError, match=r"codes: found shape \(12, 5\), expected \(12, 6\)"):
        PackedLayer.from_plan(module_of("linear"), plan, codes[:, 1:], context)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"groups": [[2, 11]]}, "12"),
        ({"groups": [[2, 6], [9, 6]]}, "groups: found .* expected pairs of bits"),
        ({"groups": [[0, 12]]}, "groups: found"),
        ({"groups": []}, "groups: found"),
        ({"groups": [[2, 12, 1]]}, "groups: found"),
        ({"groups": 3}, "groups: found 3, expected a list of pairs"),
        ({"groups": [[2.0, 12]]}, "groups: found"),
        ({"groups": [[2, -12], [2, 24]]}, "groups: found"),
        ({"groups": [[16, 12]]}, "a weight of 16 bits has one group, act_bits 16 and no smooth"),
        ({"groups": [[16, 11]], "act_bits": 16, "smooth": False}, r"groups: found .* 12 rows"),
        ({"act_bits": 16}, "a weight of 16 bits"),
        ({"act_bits": True}, "act_bits: found True"),
        ({"smooth": 1}, "expected text and true or false"),
        ({"role": None}, "expected text and true or false"),
        ({"colour": 1}, "found role, act_bits, groups, smooth, colour, expected role"),
    ],
)
def test_entries_that_contradict_themselves_are_refused(change, match):
    entry = {"role": "body", "act_bits": 6, "groups": [[2, 12]], "smooth": True} | change
    with pytest.raises(InputError, match=match):
        PackedLayer.empty(nn.Linear(6, 12), entry, 3)


def test_an_entry_survives_its_file():
    entry = LayerEntry(role="body", act_bits=6, groups=((1, 2), (2, 10)), smooth=False)
    assert LayerEntry.from_dict(entry.to_dict()) == entry


@torch.no_grad()
def test_a_layer_alone_and_modes_and_modules_that_are_not(context, packed):
    module = module_of("linear")
    layer = packed(module)
    layer.__dict__["context"] = None
    with pytest.raises(InputError, match="follows no sampling steps; attach it to a model"):
        layer(input_of(module))
    with pytest.raises(ConfigError, match="mode is 'int4', expected int8, packed, dequant"):
        layer.set_mode_("int4")
    with pytest.raises(ConfigError, match="Linear has no packed layers"):
        set_mode(module, "int8")
    with pytest.raises(InputError, match="Bilinear: expected a linear layer or a convolution"):
        PackedLayer.from_half(nn.Bilinear(2, 2, 2), "body")


def test_damaged_values_are_named(packed):
    layer = packed("linear", bits=torch.tensor([1, 2, 3] * 4))
    layer.row_order[0] = layer.row_order[1]
    with pytest.raises(InputError, match=r"a\.b\.row_order: expected each of 0\.\.11 once, found"):
        layer.check("a.b")
    half = PackedLayer.from_half(module_of("linear"), "skip")
    half.qweight[0, 0] = bits_of(torch.tensor(float("inf")).half())
    with pytest.raises(InputError, match=r"a\.b\.qweight: expected a finite number, found inf"):
        half.check("a.b")
