# SPDX-License-Identifier: Apache-2.0
"""Learned rounding: units by structure, codes by reconstruction, split inputs by divisors."""

import pytest
import torch
from mpq_dm.adaround import learn_rounding, rounding_units, skip_splits, split_smooth
from mpq_dm.calibration import Calibration, calibrate
from mpq_dm.method import make_student, quantize
from mpq_dm.plan import LayerPlan
from mpq_dm.sampler import LatentSampler
from mpq_dm.temb_cache import table_layers
from tenfold_core.errors import DivergedError, InputError
from tenfold_core.quant.affine import fake_quant
from tenfold_core.quant.scales import init_scale
from torch import nn

STEPS = [750.0, 500.0, 250.0, 0.0]


class ToyBlock(nn.Module):
    """Adds up two weighted channels; `extra` is an input without a batch axis."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 1)
        self.conv.weight.data = torch.tensor([0.45, 0.3]).view(1, 2, 1, 1)
        self.conv.bias.data.zero_()

    def forward(self, x, extra):
        return self.conv(x) + extra.mean()


class Toy(nn.Module):
    """A denoiser of one block, whose two channels are the same."""

    def __init__(self, changing=False):
        super().__init__()
        self.block = ToyBlock()
        self.changing = changing

    def forward(self, sample, timestep, return_dict=True):
        extra = torch.full((7,), float(timestep[0]) if self.changing else 0.0)
        return (self.block(torch.cat((sample, sample), dim=1), extra=extra),)


@pytest.fixture
def toy_sampler(scheduler):
    return LatentSampler(scheduler=scheduler, latent_shape=(1, 4, 4), steps=4, batch_size=3)


def toy_calibration():
    plan = LayerPlan(
        role="body", bits=torch.tensor([2]), scale=torch.ones(1, 1), zero=torch.zeros(1, 1),
        smooth=None, act_bits=8, act_scale=torch.full((4,), 0.05),
        act_zero=torch.full((4,), 128.0),
    )  # fmt: skip
    return Calibration(plans={"block.conv": plan})


def error_along(teacher, student, sampler):
    """The mean squared difference of predictions along the teacher's trajectory 9."""
    found = []

    def compare(_, args, kwargs, output):
        found.append((student(*args, **kwargs)[0] - output[0]).square().mean())

    handle = teacher.register_forward_hook(compare, with_kwargs=True)
    sampler.trajectory(teacher, 9)
    handle.remove()
    return float(torch.stack(found).mean())


def test_two_equal_inputs_need_one_weight_up_and_one_down(make, toy_sampler):
    # nearest: 0.45 and 0.3 -> 0, so 0 x for 0.75 x; one up gives 1 x, which is closer
    config, *_ = make("adaround", rounding_steps=1000, weight_bits=2)
    model = Toy().eval()
    student, layers = make_student(model, toy_calibration(), STEPS, config)
    assert layers["block.conv"].finish()[1].flatten().tolist() == [0, 0]

    codes = learn_rounding(model, student, layers, toy_sampler, STEPS, config)

    assert sorted(codes["block.conv"].flatten().tolist()) == [0, 1]
    assert codes["block.conv"].shape == (1, 2, 1, 1)
    assert codes["block.conv"].dtype == torch.uint8


def test_learned_codes_are_used_in_forward_and_in_what_is_packed(make, toy_sampler):
    config, *_ = make("adaround")
    student, layers = make_student(Toy().eval(), toy_calibration(), STEPS, config)
    layer = layers["block.conv"]
    layer.codes = torch.tensor([1, 0], dtype=torch.uint8).view(1, 2, 1, 1)

    assert layer.quantized_rows().flatten().tolist() == [1.0, 0.0]
    assert torch.equal(layer.finish()[1], layer.codes)
    x = torch.full((1, 1, 4, 4), 0.5)
    found = student(x, timestep=torch.tensor([750]))[0]
    torch.testing.assert_close(found, x)


@pytest.mark.bad_input
def test_a_block_that_cannot_be_learned_is_an_error(make, toy_sampler):
    config, *_ = make("adaround", rounding_steps=3)
    model = Toy(changing=True).eval()
    student, layers = make_student(model, toy_calibration(), STEPS, config)
    with pytest.raises(InputError, match=r"block 'block': an input of shape \(7,\) has no batch"):
        learn_rounding(model, student, layers, toy_sampler, STEPS, config)

    model = Toy().eval()
    student, layers = make_student(model, toy_calibration(), STEPS, config)
    layers["block.conv"].module.bias.data.fill_(torch.nan)
    with pytest.raises(DivergedError, match="block 'block': the loss of its rounding is nan at"):
        learn_rounding(model, student, layers, toy_sampler, STEPS, config)


def test_units_are_the_innermost_blocks_attention_and_single_layers(unet):
    names = [name for name, part in unet.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    units = rounding_units(unet, names)

    assert units["down_blocks.0.resnets.0"] == [
        f"down_blocks.0.resnets.0.{leaf}" for leaf in ("conv1", "time_emb_proj", "conv2")
    ]
    assert units["mid_block.attentions.0"] == [
        f"mid_block.attentions.0.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    assert units["up_blocks.0.upsamplers.0.conv"] == ["up_blocks.0.upsamplers.0.conv"]
    assert sorted(name for own in units.values() for name in own) == sorted(names)


def test_a_block_of_many_digits_is_not_taken_for_another():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 1)

    model = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(11))})
    assert rounding_units(model, ["blocks.10.fc"]) == {"blocks.10": ["blocks.10.fc"]}


def test_the_split_is_where_the_skip_begins(make_unet):
    model = make_unet(num_class_embeds=None, layers_per_block=2)
    seen = {}

    def follow(place, block):
        def hook(_, args, kwargs):
            values = [*args, *kwargs.values()]
            skips = kwargs.get("res_hidden_states_tuple") or args[1]
            first = kwargs.get("hidden_states", values[0])
            seen[f"up_blocks.{place}.resnets.0"] = first.shape[1]
            for number, resnet in enumerate(block.resnets):
                skip = skips[-1 - number].shape[1]
                seen[f"up_blocks.{place}.resnets.{number}"] = resnet.in_channels - skip

        return hook

    for place, block in enumerate(model.up_blocks):
        block.register_forward_pre_hook(follow(place, block), with_kwargs=True)
    with torch.no_grad():
        model(torch.zeros(1, 1, 8, 8), timestep=0)

    found = skip_splits(model)
    assert {name.rsplit(".", 1)[0]: split for name, split in found.items()} == seen
    assert {name.rsplit(".", 1)[1] for name in found} == {"conv1", "conv_shortcut"}
    assert skip_splits(nn.Linear(1, 1)) == {}


def test_one_scale_after_the_divisor_is_two_scales_before_it():
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 5, 5, generator=stream)
    x[:, 4:] *= 16
    divisor = split_smooth([x], None, 4, bits=4, method="minmax")

    first, second = divisor[0], divisor[-1]
    assert divisor.tolist() == [float(first)] * 4 + [float(second)] * 2
    assert second == 1
    own = [float(init_scale(part.reshape(-1), 4, method="minmax", zero="int")[0])
           for part in (x[:, :4], x[:, 4:])]  # fmt: skip
    assert float(first) == pytest.approx(own[0] / own[1], rel=1e-3)
    scale, zero = init_scale((x / divisor.view(1, 6, 1, 1)).reshape(-1), 4, zero="int")
    joint = fake_quant(x / divisor.view(1, 6, 1, 1), scale, zero, 15) * divisor.view(1, 6, 1, 1)
    apart = torch.cat(
        [fake_quant(x[:, :4], scale * first, zero, 15), fake_quant(x[:, 4:], scale, zero, 15)], 1
    )
    torch.testing.assert_close(joint, apart)
    # and it pays: the small part keeps its values, which one scale would lose
    whole = fake_quant(x, *init_scale(x.reshape(-1), 4, zero="int"), 15)
    assert (joint - x)[:, :4].square().mean() < 0.1 * (whole - x)[:, :4].square().mean()
    smooth = torch.tensor([2.0, 1.0, 1.0, 1.0, 4.0, 4.0])
    again = split_smooth([x, x], smooth, 4, bits=4)
    assert torch.equal(again, again.half().float())


def test_a_unet_is_reconstructed_better_than_by_rounding_to_nearest(unet, make):
    config, sampler, timesteps = make("adaround", rounding_steps=60, act_bits=8)
    found = calibrate(unet, sampler, timesteps, config)
    student, layers = make_student(unet, found, timesteps, config)
    before = error_along(unet, student, sampler)
    nearest = {name: layer.finish()[1] for name, layer in layers.items()}
    told = []

    codes = learn_rounding(
        unet, student, layers, sampler, timesteps, config, lambda *line: told.append(line)
    )
    assert set(codes) == {name for name, plan in found.plans.items() if plan.role == "body"}
    for name, part in codes.items():
        # nearest and learned are neighbours, both within the width
        assert (part.int() - nearest[name].int()).abs().max() <= 1
        assert part.max() < 2**config.weight_bits
    assert told[-1] == ("blocks", 13, 13)
    assert error_along(unet, student, sampler) == before  # nothing is left behind
    for name, part in codes.items():
        layers[name].codes = part
    assert error_along(unet, student, sampler) < before


def test_little_memory_means_more_passes_and_repeats_exactly(unet, make):
    config, sampler, timesteps = make("adaround", rounding_steps=3)
    small, *_ = make("adaround", rounding_steps=3, calib_bytes=200_000)
    found = calibrate(unet, sampler, timesteps, config)
    student, layers = make_student(unet, found, timesteps, config)

    def learn(settings):
        told = []
        codes = learn_rounding(
            unet, student, layers, sampler, timesteps, settings, lambda *line: told.append(line)
        )
        return codes, sum(line[0] == "rounding trajectories" for line in told)

    (first, passes), (again, _), (_, more) = learn(config), learn(config), learn(small)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert passes == 2 < more


@pytest.mark.parametrize("method", ["adaround", "tfmq", "hawq"])
def test_the_method_runs_from_end_to_end(make_unet, scheduler, make, method):
    model = make_unet(num_class_embeds=None)
    config, *_ = make(method, rounding_steps=3, act_bits=8, weight_bits=4)

    result = quantize(model, config, scheduler=scheduler)

    sampler = LatentSampler(scheduler=scheduler, latent_shape=(1, 8, 8), steps=4, batch_size=2)
    exact = sampler.trajectory(model, 0)
    assert (sampler.trajectory(result.model, 0) - exact).square().mean() < exact.square().mean()
    assert len(list(table_layers(result.model))) == (9 if method == "tfmq" else 0)
