# SPDX-License-Identifier: Apache-2.0
"""Calibration: a plan for every layer, errors that are the layer's own, bounded memory."""

import numpy as np
import pytest
import torch
from mpq_dm.calibration import calibrate, output_errors
from mpq_dm.operators import apply_weight
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant.affine import fake_quant
from tenfold_core.quant.scales import init_scale
from torch import nn


def run(unet, made):
    config, sampler, timesteps = made
    return calibrate(unet, sampler, timesteps, config)


def test_every_layer_gets_a_plan_that_a_file_can_hold(unet, make):
    found = run(unet, make(weight_bits=3, act_bits=6))

    assert not found.left
    for plan in found.plans.values():
        assert plan.act_scale.shape == plan.act_zero.shape == (4,)
        assert torch.equal(plan.scale.half().float(), plan.scale)
        assert torch.equal(plan.smooth.half().float(), plan.smooth)
        assert (plan.scale > 0).all()
        assert (plan.act_scale > 0).all()
        assert (plan.act_zero == plan.act_zero.round()).all()
    roles = {plan.role for plan in found.plans.values()}
    assert roles == {"input", "time", "body", "skip", "output"}
    for plan in found.plans.values():
        body = plan.role == "body"
        assert plan.act_bits == (6 if body else 8)
        assert plan.bits.double().mean() == (3 if body else 8)


def test_edges_have_one_scale_for_all_steps_and_the_body_one_for_each(unet, make):
    found = run(unet, make())

    assert len(found.plans["conv_in"].act_scale.unique()) == 1
    moving = [name for name, plan in found.plans.items() if len(plan.act_scale.unique()) > 1]
    assert "up_blocks.0.resnets.0.conv1" in moving
    pooled = run(unet, make(act_init="pooled"))
    assert all(len(plan.act_scale.unique()) == 1 for plan in pooled.plans.values())


def test_exact_is_at_most_kurtosis_is_at_most_uniform(unet, make):
    from mpq_dm.allocation import table_error

    kurtosis = run(unet, make(weight_bits=2))
    exact = run(unet, make("mpq-dm-exact", weight_bits=2))

    for name, table in kurtosis.errors.items():
        np.testing.assert_array_equal(table, exact.errors[name])
        error = table_error(table, (1, 2, 3))
        best, paper, even = (
            error(bits)
            for bits in (
                exact.plans[name].bits.numpy(), kurtosis.plans[name].bits.numpy(),
                np.full(len(table), 2),
            )
        )  # fmt: skip
        assert best <= paper * (1 + 1e-12) <= even * (1 + 1e-11)


def test_one_budget_for_all_layers_is_kept(unet, make):
    found = run(unet, make(allocation="exact-layers", weight_bits=2))

    body = [(name, plan) for name, plan in found.plans.items() if plan.role == "body"]
    widths = [unet.get_submodule(name).weight[0].numel() for name, _ in body]
    spent = sum(int(plan.bits.sum()) * width for (_, plan), width in zip(body, widths, strict=True))
    weights = sum(len(plan.bits) * width for (_, plan), width in zip(body, widths, strict=True))
    assert 1.95 * weights < spent <= 2 * weights
    means = {float(plan.bits.double().mean()) for _, plan in body}
    assert len(means) > 1


def test_plus_raises_rows_of_uniform_bits(unet, make):
    found = run(unet, make(allocation="uniform", plus=0.25, weight_bits=2))

    bits = found.plans["mid_block.resnets.0.conv1"].bits
    assert sorted(bits.tolist()) == [2] * 12 + [3] * 4


def test_little_memory_means_more_passes_and_the_same_layers(unet, make):
    told = []
    config, sampler, timesteps = make(calib_bytes=200_000)

    found = calibrate(unet, sampler, timesteps, config, lambda *told_: told.append(told_))

    assert found.plans.keys() == run(unet, make()).plans.keys()
    assert sum(what == "calibration trajectories" for what, _, _ in told) > 2
    with pytest.raises(ConfigError, match="calib_bytes is 1000, but 4 inputs of layer"):
        run(unet, make(calib_bytes=1000))


@torch.no_grad()
def test_errors_are_those_of_the_layers_output():
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
    x = torch.randn(4, 3, 7, 7, generator=generator)
    rounded = x + 0.1
    rows = conv.weight.detach()

    found = output_errors(conv, x, rounded, rows, (2, 3))

    for place, bits in enumerate((2, 3)):
        scale, zero = (
            part.half().float() for part in init_scale(rows.flatten(1), bits, method="mse")
        )
        coarse = fake_quant(rows.flatten(1), scale, zero, 2**bits - 1).view_as(rows)
        lost = apply_weight(conv, rounded, coarse) - conv(x)
        expected = [float(lost[:, row].square().mean()) for row in range(5)]
        assert found[:, place] == pytest.approx(expected, rel=1e-4)


def test_skip_and_edge_layers_can_stay_as_they_are(unet, make):
    found = run(unet, make(skip_bits=32, edge_bits=16))

    skips = [name for name, why in found.left.items() if why == "full precision (skip)"]
    assert "down_blocks.0.downsamplers.0.conv" in skips
    assert "conv_in" in found.halves
    assert not set(found.halves) & found.plans.keys()


def test_a_layer_that_is_never_called_is_left_and_named(unet, make):
    unet.unused = nn.Linear(3, 3)

    found = run(unet, make())

    assert found.left == {"unused": "not called by the sampler"}


def test_tied_weights_stay_tied_and_are_named(unet, make):
    attention = unet.mid_block.attentions[0]
    attention.to_k.weight = attention.to_q.weight

    found = run(unet, make())

    assert found.left["mid_block.attentions.0.to_k"] == "tied to mid_block.attentions.0.to_q"
    assert found.left["mid_block.attentions.0.to_q"] == "tied to others"


def test_a_dead_channel_is_reported_and_stays_finite(unet, make):
    with torch.no_grad():
        unet.mid_block.resnets[0].conv2.weight[:, 3] = 0

    found = run(unet, make())

    assert found.dead_channels == {"mid_block.resnets.0.conv2": 1}
    plan = found.plans["mid_block.resnets.0.conv2"]
    assert plan.smooth.isfinite().all()
    assert plan.scale.isfinite().all()


def test_constant_and_zero_rows_are_exact(unet, make):
    weight = unet.mid_block.resnets[0].conv1.weight
    with torch.no_grad():
        weight[0] = 0
    found = run(unet, make(smooth_alpha=0.0))

    plan = found.plans["mid_block.resnets.0.conv1"]
    most = 2 ** plan.bits[:, None] - 1
    again = fake_quant(weight.flatten(1), plan.scale, plan.zero, most)
    assert torch.equal(again[0], torch.zeros_like(again[0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_count(unet, make, value):
    made = make()
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight[0, 0, 0, :2] = value

    with pytest.raises(InputError, match=r"mid_block.resnets.0.conv1.weight: 2 of 2304 values"):
        run(unet, made)


def test_quantized_models_and_lora_are_refused(unet, make):
    made = make()
    unet.is_quantized = True
    with pytest.raises(InputError, match="UNet2DModel: quantized already"):
        run(unet, made)
    unet.is_quantized = False
    unet.mid_block.lora_A = nn.Linear(2, 2)
    with pytest.raises(InputError, match="unload LoRA first"):
        run(unet, made)
