# SPDX-License-Identifier: Apache-2.0
"""Tiny denoisers, made anew: nothing is downloaded and nothing is shared between tests."""

import pytest

STEPS = 4


def tiny_unet(**settings):
    """Return a class-conditional UNet of a few thousand weights, the same every time."""
    import torch
    from diffusers import UNet2DModel

    options = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": 10,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**options | settings).eval()


@pytest.fixture
def make_unet():
    """The function that makes tiny UNets: make_unet(num_class_embeds=None)."""
    return tiny_unet


@pytest.fixture
def unet():
    """A tiny class-conditional UNet."""
    return tiny_unet()


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
