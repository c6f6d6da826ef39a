# SPDX-License-Identifier: Apache-2.0
"""Tiny denoisers, made anew: nothing is downloaded and nothing is shared between tests."""

import pytest

STEPS = 4


def tiny_unet(*, flat=False, **settings):
    """Return a class-conditional UNet of a few thousand weights, the same every time.

    A flat one has a single level and no attention: a quarter of the layers, for what needs no more.
    """
    import torch
    from diffusers import UNet2DModel

    options = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": 10,
    }  # fmt: skip
    if flat:
        options |= {
            "block_out_channels": (8,), "down_block_types": ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",), "add_attention": False,
        }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**options | settings).eval()


@pytest.fixture(scope="session")
def make_unet():
    """The function that makes tiny UNets: make_unet(flat=True, num_class_embeds=None)."""
    return tiny_unet


@pytest.fixture
def flat():
    """Whether `unet` has a single level and no attention; modules and tests may say otherwise."""
    return False


@pytest.fixture
def unet(flat):
    """A tiny class-conditional UNet."""
    return tiny_unet(flat=flat)


@pytest.fixture
def scheduler():
    """A DDIM scheduler that leaves samples unclipped."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=1000, clip_sample=False)


@pytest.fixture
def make(unet, scheduler):
    """Make a config, a sampler of the tiny UNet and its timesteps: make("mpq-dm", rank=2)."""
    from mpq_dm.config import method_config
    from mpq_dm.method import make_sampler
    from mpq_dm.sampler import called_timesteps

    def build(method="mpq-dm", **settings):
        options = {
            "steps": STEPS, "trajectories": 0, "batch_size": 2, "calib_samples": 4, "seed": 1,
            "rank": 4, "weight_bits": 3,
        }  # fmt: skip
        config = method_config(method, **options | settings)
        sampler = make_sampler(unet, config, scheduler=scheduler, labels=range(10))
        return config, sampler, called_timesteps(unet, sampler)

    return build


@pytest.fixture(scope="session")
def plan_of():
    """Plan a module by min and max: plan_of(module, steps, bits=2) -> plan, codes."""
    return round_by_range


@pytest.fixture(scope="session")
def pack():
    """Pack all layers of a model by min and max: pack(model, timesteps)."""
    return pack_by_range


def round_by_range(
    module, steps, *, role="body", bits=(1, 2, 3), act_bits=6, act_range=4.0, smooth=True, seed=0
):
    """Return a plan that rounds between the least and largest weight of a row, and the codes."""
    import torch
    from mpq_dm.operators import to_rows
    from mpq_dm.plan import LayerPlan
    from tenfold_core.quant.affine import max_code, quantize, storable
    from tenfold_core.quant.smoothing import smooth_weight

    generator = torch.Generator().manual_seed(seed)
    groups = getattr(module, "groups", 1)
    rows = to_rows(module, module.weight.detach()).float()
    divisor = (0.5 + torch.rand(rows.shape[1] * groups, generator=generator)).half().float()
    scaled = smooth_weight(rows, divisor, groups=groups) if smooth else rows
    widths = torch.as_tensor(bits).reshape(-1)
    widths = widths.repeat(-(-len(rows) // len(widths)))[: len(rows)]
    flat, most = scaled.flatten(1), max_code(widths)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    step = ((high - low) / most).clamp(min=1e-6)
    scale, zero = storable(step, -low / step)
    act_scale = 2 * act_range / 2**act_bits * (0.8 + 0.4 * torch.rand(steps, generator=generator))
    middle = 2 ** (act_bits - 1)
    plan = LayerPlan(
        role=role, bits=widths, scale=scale, zero=zero, smooth=divisor if smooth else None,
        act_bits=act_bits, act_scale=act_scale,
        act_zero=torch.randint(middle - 2, middle + 2, (steps,), generator=generator).float(),
    )  # fmt: skip
    return plan, quantize(flat, scale, zero, most).view_as(rows)


def pack_by_range(model, timesteps, **settings):
    """Pack every layer of a model, in place: 1 to 3 bits in the body, 8 elsewhere."""
    from mpq_dm.plugin import attach_packed
    from mpq_dm.roles import find_layers

    halves = settings.pop("halves", ())
    plans = {}
    for number, layer in enumerate(find_layers(model)[0]):
        if layer.name not in halves and layer.tied_to is None:
            bits = (1, 2, 3) if layer.role == "body" else 8
            plans[layer.name] = round_by_range(
                layer.module, len(timesteps), role=layer.role, bits=bits, seed=number,
                smooth=number % 3 > 0,
            )  # fmt: skip
    attach_packed(
        model, plans, timesteps=timesteps, weight_bits=2, act_bits=6, halves=halves, **settings
    )
    return model
