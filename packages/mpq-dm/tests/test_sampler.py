# SPDX-License-Identifier: Apache-2.0
"""Samplers: numbers fix noise and conditions, guidance combines the halves the right way."""

from dataclasses import replace

import pytest
import torch
from mpq_dm.sampler import LatentSampler, PipelineSampler, called_timesteps, following
from tenfold_core.errors import ConfigError, InputError
from torch import nn


class Recorder(nn.Module):
    """A denoiser that predicts no noise and keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.calls.append((sample, timestep, class_labels))
        return (torch.zeros_like(sample),)


@pytest.fixture
def sampler(scheduler):
    return LatentSampler(
        scheduler=scheduler, latent_shape=(1, 4, 4), steps=3, batch_size=2, labels=range(10)
    )


def test_a_number_fixes_noise_and_labels(sampler):
    first, again, other = (sampler.arguments(number) for number in (5, 5, 6))

    assert torch.equal(first["class_labels"], again["class_labels"])
    assert torch.equal(sampler.noise(5), sampler.noise(5))
    assert not torch.equal(sampler.noise(5), sampler.noise(6))
    assert not torch.equal(sampler.noise(5), replace(sampler, seed=1).noise(5))
    drawn = torch.cat([sampler.arguments(number)["class_labels"] for number in range(50)])
    assert set(drawn.tolist()) == set(range(10))
    assert other["class_labels"].shape == (2,)


def test_a_trajectory_calls_the_model_at_every_step_with_the_same_labels(sampler):
    model = Recorder()

    sampler.trajectory(model, 0)

    assert [call[1].tolist() for call in model.calls] == [[666, 666], [333, 333], [0, 0]]
    assert all(torch.equal(call[2], model.calls[0][2]) for call in model.calls)
    assert torch.equal(model.calls[0][0], sampler.noise(0))


def test_the_same_noise_gives_comparable_images(sampler, unet):
    sampler = replace(sampler, latent_shape=(1, 8, 8))

    assert torch.equal(sampler.trajectory(unet, 3), sampler.trajectory(unet, 3))


def test_guidance_doubles_the_batch_and_extrapolates(sampler):
    guided = replace(
        sampler, guidance=3.0, negative={"class_labels": torch.tensor([10])}, labels=[7]
    )
    model = Recorder()
    guided.trajectory(model, 0)

    assert model.calls[0][0].shape[0] == 4
    assert model.calls[0][2].tolist() == [10, 10, 7, 7]
    output = torch.tensor([1.0, 1.0, 2.0, 2.0]).view(4, 1, 1, 1)
    assert guided.guide(output, output).flatten().tolist() == [4.0, 4.0]


def test_guidance_needs_an_unconditional_side(sampler):
    with pytest.raises(ConfigError, match=r"guidance is 3\.0, but no unconditional arguments"):
        replace(sampler, guidance=3.0)


def test_a_predicted_variance_is_dropped(sampler):
    output = torch.stack((torch.ones(2, 4, 4), 9 * torch.ones(2, 4, 4)), dim=1)

    assert torch.equal(sampler.guide(output, torch.zeros(2, 1, 4, 4)), torch.ones(2, 1, 4, 4))


def test_conditions_are_drawn_together(sampler):
    with_text = replace(
        sampler, labels=None, conditions={"a": torch.arange(9), "b": 10 * torch.arange(9)}
    )

    found = with_text.arguments(4)

    assert torch.equal(found["b"], 10 * found["a"])
    with pytest.raises(InputError, match="expected as many of each"):
        replace(with_text, conditions={"a": torch.zeros(2), "b": torch.zeros(3)})


def test_timesteps_are_those_the_model_sees(sampler):
    assert called_timesteps(Recorder(), sampler) == [666, 333, 0]
    scaled = replace(sampler, timestep_scale=0.001)
    assert called_timesteps(Recorder(), scaled) == pytest.approx([0.666, 0.333, 0])


def test_a_model_without_a_timestep_is_named():
    with (
        pytest.raises(ConfigError, match="Identity takes no timestep"),
        following(nn.Identity(), print),
    ):
        pass


def test_eta_is_noise_of_the_number(sampler, unet):
    noisy = replace(sampler, latent_shape=(1, 8, 8), eta=1.0)

    assert torch.equal(noisy.trajectory(unet, 1), noisy.trajectory(unet, 1))
    assert not torch.equal(noisy.trajectory(unet, 1), replace(noisy, eta=0.0).trajectory(unet, 1))


@pytest.fixture
def pipeline(make_unet, scheduler):
    from diffusers import DDIMPipeline

    return DDIMPipeline(unet=make_unet(num_class_embeds=None), scheduler=scheduler)


def test_a_pipeline_samples_with_another_denoiser_and_keeps_its_own(pipeline):
    sampler = PipelineSampler(pipe=pipeline, steps=2, batch_size=3)
    own = pipeline.unet

    images = sampler.trajectory(own, 0)

    assert images.shape == (3, 1, 8, 8)
    assert torch.equal(sampler.trajectory(own, 0), images)
    assert pipeline.unet is own
    assert called_timesteps(own, sampler) == [500, 0]


def test_a_pipelines_batch_is_guided_only_where_it_was_doubled(pipeline):
    sampler = PipelineSampler(pipe=pipeline, steps=2, batch_size=1, guidance=2.0)
    output = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)

    assert sampler.guide(output, output).item() == 7.0
    plain = PipelineSampler(pipe=pipeline, steps=2, batch_size=1)
    assert torch.equal(plain.guide(output[:1], output[:1]), output[:1])
    with pytest.raises(ConfigError, match=r"a batch of 1 for 1 images at guidance 2\.0"):
        sampler.guide(output[:1], output[:1])


def test_pipelines_that_put_the_conditions_first_are_known(pipeline):
    first = type("DiTPipeline", (type(pipeline),), {})(**pipeline.components)
    sampler = PipelineSampler(pipe=first, steps=2, batch_size=1, guidance=2.0)
    output = torch.tensor([4.0, 1.0]).view(2, 1, 1, 1)

    assert sampler.guide(output, output).item() == 7.0


def test_schedulers_that_repeat_a_timestep_are_counted_call_by_call(sampler):
    from diffusers import PNDMScheduler
    from mpq_dm.sampler import every_call

    repeated = replace(sampler, scheduler=PNDMScheduler(skip_prk_steps=True), steps=5)
    model = Recorder()
    repeated.trajectory(model, 0)

    assert len(every_call(model, repeated)) == len(model.calls) == 6
    assert len(called_timesteps(model, repeated)) == 5


def test_a_learned_variance_reaches_the_scheduler(sampler, scheduler):
    from diffusers import DDPMScheduler

    class Learned(Recorder):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            return (torch.zeros_like(sample).repeat(1, 2, 1, 1),)

    learned = replace(sampler, scheduler=DDPMScheduler(variance_type="learned_range"))

    assert learned.trajectory(Learned(), 0).shape == (2, 1, 4, 4)


def test_a_scheduler_that_needs_the_image_size_is_refused(sampler):
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(ConfigError, match="shifts its timesteps by the image size"):
        replace(sampler, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
