# SPDX-License-Identifier: Apache-2.0
"""The trainable layer: what it computes, what moves, and what is left of it."""

import pytest
import torch
from mpq_dm.layers import QuantLayer
from mpq_dm.operators import apply_weight, from_rows, to_rows
from mpq_dm.plan import LayerPlan
from tenfold_core.quant.activations import TimestepContext
from tenfold_core.quant.affine import dequantize
from tenfold_core.quant.scales import init_scale
from tenfold_core.quant.smoothing import smooth_weight
from torch import nn

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 9, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 9, 9)),
    "reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), (3, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (3, 4, 5, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (3, 4, 5, 5)),
}


def layer_of(kind, *, bits=8, rank=0, smooth=True):
    """Return a layer with random weights, its quantized form and an input."""
    make, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(0)
    module = make()
    with torch.no_grad():
        for part in module.parameters():
            part.copy_(torch.randn(part.shape, generator=generator))
    x = torch.randn(shape, generator=generator)
    rows = to_rows(module, module.weight.detach())
    channels = rows.shape[1] * getattr(module, "groups", 1)
    divisor = (torch.rand(channels, generator=generator) + 0.5).half().float() if smooth else None
    smoothed = rows if divisor is None else smooth_weight(rows, divisor, groups=channels // rows.shape[1])  # fmt: skip  # noqa: E501
    scale, zero = init_scale(smoothed.flatten(1), bits)
    context = TimestepContext([9, 4])
    context.set_(4)
    plan = LayerPlan(
        role="body", bits=torch.full((len(rows),), bits), scale=scale, zero=zero, smooth=divisor,
        act_bits=8, act_scale=torch.tensor([1.0, 16 / 255]), act_zero=torch.tensor([3.0, 128.0]),
    )  # fmt: skip
    return module, QuantLayer(module, plan, context, rank=rank, generator=generator), x


@pytest.mark.parametrize("kind", LAYERS)
def test_eight_bits_stay_close_to_the_layer(kind):
    module, layer, x = layer_of(kind)

    exact, found = module(x), layer(x)

    assert found.shape == exact.shape
    assert (found - exact).abs().mean() < 0.02 * exact.abs().mean()


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_hold_the_output_channels_and_come_back(kind):
    module, _, x = layer_of(kind)
    rows = to_rows(module, module.weight.detach())

    assert torch.equal(from_rows(module, rows), module.weight)
    torch.testing.assert_close(apply_weight(module, x, rows, module.bias), module(x))
    louder = rows.clone()
    louder[1] *= 2  # doubles output channel 1 and nothing else
    change = apply_weight(module, x, louder) - apply_weight(module, x, rows)
    axis = -1 if kind == "linear" else 1
    moved = change.abs().movedim(axis, 0).flatten(1).sum(1) > 0
    assert moved.tolist() == [index == 1 for index in range(len(rows))]


def test_smoothing_alone_changes_nothing():
    module, layer, x = layer_of("conv2d")

    found = apply_weight(module, layer.scaled_input(x), layer.smoothed_rows(), module.bias)

    torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)


def test_lora_starts_as_no_change_and_its_product_is_what_is_rounded():
    _, plain, x = layer_of("conv2d", bits=3)
    _, layer, _ = layer_of("conv2d", bits=3, rank=2)
    assert torch.equal(layer(x), plain(x))

    with torch.no_grad():
        layer.lora.b.fill_(0.3)

    changed = layer.rows + layer.lora.delta()
    divisor = layer.smooth.view(1, -1, 1, 1)
    assert torch.equal(layer.smoothed_rows(), changed * divisor)


def test_every_parameter_receives_a_gradient():
    _, layer, x = layer_of("conv2d", bits=3, rank=2)

    layer(x).square().sum().backward()
    with torch.no_grad():
        layer.lora.b.add_(0.1)  # B is zero at first, and A has no gradient then
        layer.weight_quant.rho.add_(-0.3)  # zero points matter where values are clipped
        layer.act_quant.rho.add_(-1)
    layer(x).square().sum().backward()

    assert {name for name, part in layer.named_parameters() if part.requires_grad} == {
        "lora.a", "lora.b", "weight_quant.rho", "weight_quant.offset", "act_quant.rho",
        "act_quant.offset",
    }  # fmt: skip
    for name, part in layer.named_parameters():
        if part.requires_grad:
            assert part.grad.abs().sum() > 0, name
    assert layer.act_quant.rho.grad[0] == 0  # the other sampling step


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_finished_is_what_was_computed(kind):
    _, layer, _ = layer_of(kind, bits=3, rank=2)
    with torch.no_grad():
        layer.weight_quant.rho.add_(0.01)

    plan, codes = layer.finish()

    assert codes.shape == layer.rows.shape
    assert int(codes.max()) <= 7
    assert torch.equal(plan.scale.half().float(), plan.scale)
    found = dequantize(codes.flatten(1), plan.scale, plan.zero).view_as(layer.rows)
    exact = layer.quantized_rows()
    # scale and zero point became float16 numbers; a code may have crossed a boundary
    assert (found - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_a_fixed_weight_gives_the_same_output():
    _, layer, x = layer_of("linear", bits=3)
    before = layer(x)

    layer.fix_()

    assert torch.equal(layer(x), before)


def test_starting_from_the_residual_brings_the_rounded_weight_nearer():
    _, layer, _ = layer_of("linear", bits=2, rank=2)
    target = layer.smoothed_rows().detach()
    lost = (layer.quantized_rows() - target).square().sum()

    layer.start_from_residual_()

    nearer = (layer.quantized_rows() - target).square().sum()
    assert nearer != lost
    delta = layer.lora.delta() * layer.smooth
    assert (delta - (target - layer.weight_quant(target))).square().sum() < lost


def test_the_layer_answers_for_the_one_it_replaced():
    module, layer, _ = layer_of("linear")

    assert layer.in_features == 6
    assert layer.weight is module.weight
    with pytest.raises(AttributeError, match="no attribute 'kernel'"):
        layer.kernel  # noqa: B018
