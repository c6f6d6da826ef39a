# SPDX-License-Identifier: Apache-2.0
"""PTQD: what is planted in a noise prediction is found, and taken out again."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from mpq_dm.config import MPQDMConfig
from mpq_dm.ptqd import CorrectedSampler, NoiseCorrection, fit_correction
from mpq_dm.sampler import LatentSampler, PipelineSampler
from tenfold_core.errors import ConfigError, InputError
from torch import nn

TIMESTEPS = (750, 500, 250, 0)
SLOPE = torch.tensor([0.25, -0.125, 0.5, 0.0])
BIAS = torch.tensor([[0.1, -0.2], [0.0, 0.3], [-0.1, 0.1], [0.2, 0.2]])


class Exact(nn.Module):
    """Predicts noise by a formula; the second half of four channels is a variance."""

    def __init__(self, kind=tuple):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.kind = kind

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        noise = self.weight * sample + 0.1 * torch.sin(3 * sample)
        if class_labels is not None:
            noise = noise * (1 + class_labels.view(-1, 1, 1, 1) / 10)
        found = self.disturbed(noise, timestep)
        if self.kind is torch.Tensor:
            return found
        return UNet2DOutput(sample=found) if self.kind is UNet2DOutput else (found, "rest")

    def disturbed(self, noise, timestep):
        return noise


class Disturbed(Exact):
    """The same with a slope, a bias and noise at each of the four steps."""

    def __init__(self, noise=0.0, **settings):
        super().__init__(**settings)
        self.noise = noise
        self.stream = torch.Generator().manual_seed(0)

    def disturbed(self, noise, timestep):
        place = [TIMESTEPS.index(int(step)) for step in timestep.reshape(-1)]
        factor = 1 + SLOPE[place].view(-1, 1, 1, 1)
        shift = BIAS[place][:, : noise.shape[1], None, None]
        random = torch.randn(noise.shape, generator=self.stream)
        return noise * factor + shift + self.noise * random


@pytest.fixture
def scheduler():
    return DDIMScheduler(num_train_timesteps=1000, clip_sample=False)


@pytest.fixture
def sampler(scheduler):
    return LatentSampler(scheduler=scheduler, latent_shape=(2, 8, 8), steps=4, batch_size=8, seed=1)


CONFIG = MPQDMConfig(calib_samples=32)


def test_a_planted_slope_and_bias_are_found_exactly(sampler):
    found = fit_correction(Exact(), Disturbed(), sampler, TIMESTEPS, CONFIG)

    assert found.timesteps == TIMESTEPS
    torch.testing.assert_close(found.slope, SLOPE, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.bias, BIAS, atol=1e-5, rtol=1e-5)
    assert found.variance.max() < 1e-9
    assert found.explained.min() > 0.99999


def test_the_variance_of_planted_noise_is_found(sampler):
    found = fit_correction(Exact(), Disturbed(0.3), sampler, TIMESTEPS, CONFIG)

    # 32 samples of 128 values: the variance of so many is known to 2 / sqrt(2 * 4096) = 2 %
    torch.testing.assert_close(found.variance, (0.3 / (1 + SLOPE)) ** 2, rtol=0.08, atol=0)
    torch.testing.assert_close(found.slope, SLOPE, rtol=0, atol=0.05)
    assert 0.2 < found.explained.min() < found.explained.max() < 0.97


@pytest.mark.parametrize("kind", [tuple, torch.Tensor, UNet2DOutput])
def test_a_student_that_is_scaled_and_shifted_is_undone(sampler, kind):
    teacher, student = Exact(kind=kind), Disturbed(kind=kind)
    correction = fit_correction(teacher, student, sampler, TIMESTEPS, CONFIG)
    corrected = CorrectedSampler(sampler=sampler, correction=correction)

    exact = sampler.trajectory(teacher, 40)
    assert (sampler.trajectory(student, 40) - exact).abs().max() > 0.1
    torch.testing.assert_close(corrected.trajectory(student, 40), exact, rtol=1e-4, atol=1e-4)
    assert corrected.batch_size == 8
    assert not student._forward_hooks
    assert not student._forward_pre_hooks


def test_under_guidance_both_halves_are_corrected(sampler):
    guided = replace(
        sampler, labels=range(1, 5), negative={"class_labels": torch.tensor([0])}, guidance=3.0
    )
    correction = fit_correction(Exact(), Disturbed(), guided, TIMESTEPS, CONFIG)
    corrected = CorrectedSampler(sampler=guided, correction=correction)

    torch.testing.assert_close(correction.slope, SLOPE, atol=1e-4, rtol=1e-4)
    exact = guided.trajectory(Exact(), 40)
    torch.testing.assert_close(corrected.trajectory(Disturbed(), 40), exact, rtol=1e-3, atol=1e-3)


def test_a_predicted_variance_is_left_alone(sampler):
    class Learned(Disturbed):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            noise = super().forward(sample, timestep)[0]
            return (torch.cat((noise, torch.full_like(noise, 7.0)), dim=1),)

    seen = []
    student = Learned()
    correction = fit_correction(Exact(), student, sampler, TIMESTEPS, CONFIG)
    corrected = CorrectedSampler(sampler=sampler, correction=correction)
    guide = LatentSampler.guide

    class Spy(LatentSampler):
        def guide(self, output, sample):
            seen.append(output)
            return guide(self, output, sample)

    spy = Spy(scheduler=sampler.scheduler, latent_shape=(2, 8, 8), steps=4, batch_size=8, seed=1)
    replace(corrected, sampler=spy).trajectory(student, 40)
    assert all(torch.equal(part[:, 2:], torch.full((8, 2, 8, 8), 7.0)) for part in seen)


def test_the_residual_takes_the_place_of_the_samplers_noise(sampler, scheduler):
    """States vary as those of the exact sampler do; without the correction they vary more.

    Looked at before the third of four steps: the last ones add too little to make room in.
    """

    class Gaussian(Exact):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            if timestep[0] == 250:
                self.state = sample
            # the best prediction for images of independent normal pixels of variance 1 / 20
            kept = scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
            noise = (1 - kept).sqrt() * sample / (kept / 20 + 1 - kept)
            return (self.disturbed(noise, timestep),)

    class Rounded(Gaussian, Disturbed):
        pass

    wide = replace(sampler, latent_shape=(2, 16, 16), batch_size=64, eta=1.0)
    teacher, student = Gaussian(), Rounded(0.2)
    correction = fit_correction(teacher, student, wide, TIMESTEPS, MPQDMConfig(calib_samples=64))
    corrected = CorrectedSampler(sampler=wide, correction=correction)
    linear = replace(correction, variance=torch.zeros(4))

    def variance(source, model):
        source.trajectory(model, 40)
        return float(model.state.var())

    wanted = variance(wide, teacher)
    assert variance(corrected, student) == pytest.approx(wanted, rel=0.03)
    assert variance(CorrectedSampler(sampler=wide, correction=linear), student) > 1.1 * wanted


@pytest.mark.parametrize(("kind", "variance"), [("epsilon", 0.02), ("v_prediction", 0.2)])
def test_the_new_sigma_is_that_of_the_formula(kind, variance):
    """One step from 750 to 500: sigma and c as DDIM's equation 12 has them."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, clip_sample=True, prediction_type=kind, set_alpha_to_one=False
    )
    scheduler.set_timesteps(4)
    now, then = (float(scheduler.alphas_cumprod[step]) for step in (750, 500))
    sigma = math.sqrt((1 - then) / (1 - now) * (1 - now / then))
    direction = math.sqrt(1 - then - sigma**2)
    if kind == "epsilon":
        slope = direction - math.sqrt(then) * math.sqrt(1 - now) / math.sqrt(now)
    else:
        slope = direction * math.sqrt(now) - math.sqrt(then) * math.sqrt(1 - now)
    wanted = math.sqrt(sigma**2 - slope**2 * variance)

    class FromZero(LatentSampler):
        def noise(self, number):
            return torch.zeros(16, 1, 64, 64)

    one = FromZero(scheduler=scheduler, latent_shape=(1, 64, 64), steps=4, batch_size=16, eta=1.0)
    correction = NoiseCorrection(
        timesteps=TIMESTEPS, slope=torch.zeros(4), bias=torch.zeros(4, 1),
        variance=torch.full((4,), variance), explained=torch.zeros(4),
    )  # fmt: skip
    states = []

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            states.append(sample.clone())
            return (torch.zeros_like(sample),)

    CorrectedSampler(sampler=one, correction=correction).trajectory(Zero(), 0)
    assert float(states[1].std()) == pytest.approx(wanted, rel=0.02)
    assert wanted < 0.995 * sigma


def test_without_noise_in_the_sampler_only_the_linear_part_is_corrected(sampler):
    correction = fit_correction(Exact(), Disturbed(), sampler, TIMESTEPS, CONFIG)
    noisy = replace(correction, variance=torch.full((4,), 0.5))
    other = replace(sampler, scheduler=DDPMScheduler(clip_sample=False))

    deterministic = CorrectedSampler(sampler=sampler, correction=noisy)
    torch.testing.assert_close(
        deterministic.trajectory(Disturbed(), 3),
        CorrectedSampler(sampler=sampler, correction=correction).trajectory(Disturbed(), 3),
    )
    ancestral = CorrectedSampler(sampler=other, correction=noisy)
    exact = other.trajectory(Exact(), 3)
    torch.testing.assert_close(ancestral.trajectory(Disturbed(), 3), exact, rtol=1e-4, atol=1e-4)


def test_a_pipeline_is_corrected_too_and_keeps_its_scheduler(make_unet, scheduler):
    unet = make_unet(num_class_embeds=None)
    pipe = DDIMPipeline(unet, scheduler)
    sampler = PipelineSampler(pipe=pipe, steps=4, batch_size=2, eta=1.0, output_type="np")
    correction = NoiseCorrection(
        timesteps=TIMESTEPS, slope=torch.zeros(4), bias=torch.zeros(4, 1),
        variance=torch.zeros(4), explained=torch.zeros(4),
    )  # fmt: skip
    plain = sampler.trajectory(unet, 0)

    same = CorrectedSampler(sampler=sampler, correction=correction)
    assert torch.equal(same.trajectory(unet, 0), plain)
    less = replace(correction, variance=torch.full((4,), 0.05))
    assert not torch.equal(replace(same, correction=less).trajectory(unet, 0), plain)
    assert type(pipe.scheduler) is DDIMScheduler
    assert same.guide(torch.ones(2, 1, 8, 8), torch.ones(2, 1, 8, 8)).sum() == 128


@pytest.mark.bad_input
def test_predictions_that_cannot_be_compared_are_refused(sampler):
    class Still(Exact):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            return (torch.zeros_like(sample),)

    class Opposite(Exact):
        def disturbed(self, noise, timestep):
            return -2 * noise

    class Broken(Exact):
        def disturbed(self, noise, timestep):
            return noise / 0

    with pytest.raises(InputError, match="timestep 750: the prediction does not vary"):
        fit_correction(Still(), Exact(), sampler, TIMESTEPS, CONFIG)
    with pytest.raises(InputError, match=r"timestep 750: k is -3, expected more than -1"):
        fit_correction(Exact(), Opposite(), sampler, TIMESTEPS, CONFIG)
    with pytest.raises(InputError, match="timestep 750: not a finite prediction"):
        fit_correction(Exact(), Broken(), sampler, TIMESTEPS, CONFIG)
    with pytest.raises(InputError, match="timestep 1: no prediction"):
        fit_correction(Exact(), Exact(), sampler, (750, 500, 250, 1, 0), CONFIG)


@pytest.mark.bad_input
def test_an_output_of_no_known_kind_is_refused(sampler):
    class Listed(Exact):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            return [sample]

    correction = fit_correction(Exact(), Disturbed(), sampler, TIMESTEPS, CONFIG)
    corrected = CorrectedSampler(sampler=sampler, correction=correction)
    with pytest.raises(ConfigError, match="list: expected a tensor, a tuple or an output class"):
        corrected.trajectory(Listed(), 0)
