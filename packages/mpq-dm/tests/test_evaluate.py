# SPDX-License-Identifier: Apache-2.0
"""Evaluation: numbers that are known by hand, and models compared with themselves."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from mpq_dm.evaluate import (
    bit_operations,
    distances,
    feature_metrics,
    images_of,
    labels_of,
    layer_costs,
    noise_errors,
    paired_batches,
    paired_evaluation,
    step_errors,
)
from mpq_dm.features import Extractor
from mpq_dm.metrics import paired_error
from mpq_dm.sampler import LatentSampler, PipelineSampler
from tenfold_core.errors import ConfigError, InputError
from torch import nn

pytest.importorskip("diffusers")


@pytest.fixture
def sampler(scheduler):
    return LatentSampler(
        scheduler=scheduler, latent_shape=(1, 8, 8), steps=3, batch_size=4, labels=range(10)
    )


@pytest.fixture
def student(unet, pack):
    return pack(copy.deepcopy(unet), [666.0, 333.0, 0.0])


class Mean(nn.Module):
    """Four features of an image: the means of its quarters."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images[:, :1], 2).flatten(1)


QUARTERS = Extractor(net=Mean(), name="quarters")


def test_a_model_paired_with_itself_has_no_error(unet, sampler):
    found = paired_evaluation(unet, unet, sampler, 6, features=QUARTERS)
    assert found.errors.tolist() == [0.0] * 6
    assert (found.interval.value, found.interval.low, found.interval.high) == (0, 0, 0)
    np.testing.assert_array_equal(found.original.features, found.quantized.features)
    assert found.original.features.shape == (6, 4)
    assert found.labels.shape == (6,)


def test_pairs_are_the_samples_of_both_models_from_one_noise(unet, student, sampler):
    told = []
    found = paired_evaluation(
        unet, student, sampler, 6, progress=lambda what, done, total: told.append((done, total))
    )
    samples = [
        torch.cat([sampler.trajectory(model, number) for number in range(2)])[:6]
        for model in (unet, student)
    ]
    np.testing.assert_array_equal(found.errors, paired_error(*(x.numpy() for x in samples)))
    assert found.interval.low <= found.interval.value <= found.interval.high
    assert found.errors.min() > 0
    assert torch.equal(found.shown.quantized, samples[1][:4])
    assert told == [(1, 2), (2, 2)]
    sizes = [len(batch.labels) for batch in paired_batches(unet, student, sampler, 6)]
    assert sizes == [4, 2]


def test_an_interval_needs_two_noises(unet, sampler):
    with pytest.raises(ConfigError, match="count is 1, expected 2 or more"):
        paired_evaluation(unet, unet, sampler, 1)


def test_step_errors_follow_the_teacher(unet, student, sampler):
    steps = step_errors(unet, student, sampler, 0)
    assert [step.timestep for step in steps] == [666.0, 333.0, 0.0]
    assert all(step.error > 0 for step in steps)
    assert all(step.power > 0 for step in steps)
    assert noise_errors(unet, student, sampler, 0) == [step.error for step in steps]
    assert noise_errors(unet, copy.deepcopy(unet), sampler, 0) == [0.0, 0.0, 0.0]


def test_step_errors_are_those_of_guided_predictions(unet, sampler):
    # guidance 3 of a model that predicts 1 with labels and 0 without: 0 + 3 (1 - 0) = 3
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value))

        def forward(self, sample, timestep, class_labels, return_dict=True):
            label = (class_labels < 9).float().view(-1, 1, 1, 1)
            return ((self.value * label).expand_as(sample),)

    guided = replace(
        sampler, guidance=3.0, labels=[1], negative={"class_labels": torch.tensor([9])}
    )
    first, second = Constant(1.0), Constant(1.5)
    # (4.5 - 3)^2 = 2.25
    assert noise_errors(first, second, guided, 0) == [2.25] * 3
    assert step_errors(first, second, guided, 0)[0].power == 9.0
    assert labels_of(guided, 0).tolist() == [1] * 4


def test_images_of_a_pipeline_that_decodes_run_from_minus_one(sampler):
    halves = torch.tensor([0.0, 0.5, 1.0])
    decoding = PipelineSampler(pipe=None, steps=1, output_type="pt")
    assert images_of(decoding, halves).tolist() == [-1.0, 0.0, 1.0]
    assert images_of(replace(decoding, output_type="latent"), halves).equal(halves)
    assert images_of(sampler, halves).equal(halves)


def test_samples_without_classes_have_no_labels(sampler):
    assert labels_of(replace(sampler, labels=None), 0) is None


def test_distances_see_a_shift_and_are_about_zero_without():
    rng = np.random.default_rng(0)
    real, same, moved = (rng.normal(size=(400, 3)) + shift for shift in (0, 0, 2))
    near, far = distances(real, same), distances(real, moved)
    # means differ by 2 in each of 3 features, covariances are equal
    assert far["frechet_infinity"] == pytest.approx(12, rel=0.1)
    assert abs(near["frechet_infinity"]) < 0.1
    assert near["frechet_infinity"] < near["frechet"]
    assert abs(near["kid"]) < 4 * near["kid_error"] < far["kid"]
    assert near["precision"] > 0.9 > far["precision"]
    assert near["frechet_equal"] > near["frechet"]


def test_fewer_images_are_further_away():
    rng = np.random.default_rng(0)
    real, same = rng.normal(size=(2, 400, 8))
    found = distances(real, same, equal=50)
    assert found["frechet_equal"] > 2 * found["frechet"] > 0
    assert distances(real, same, equal=50) == found


def test_a_set_with_a_fixed_share_of_each_class_is_not_closer_than_a_random_one():
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(10, 4))

    def images(labels):
        return centres[labels] + 0.1 * rng.normal(size=(len(labels), 4))

    real = images(np.arange(4000) % 10)
    shares = np.arange(400) % 10
    fixed = [
        distances(real, images(shares), equal=100, classes=torch.from_numpy(shares), seed=seed)
        for seed in range(4)
    ]
    drawn = [distances(real, images(rng.integers(10, size=400)), equal=100) for _ in range(4)]
    # of all images, shares that are exact hide nine tenths and more of the distance
    mean = {
        (name, kind): np.mean([found[name] for found in sets])
        for name in ("frechet", "frechet_equal", "frechet_infinity")
        for kind, sets in (("fixed", fixed), ("drawn", drawn))
    }
    assert mean["frechet", "fixed"] < 0.1 * mean["frechet", "drawn"]
    assert mean["frechet_equal", "fixed"] == pytest.approx(mean["frechet_equal", "drawn"], rel=0.5)
    assert abs(mean["frechet_infinity", "fixed"]) < 0.5 * mean["frechet_equal", "fixed"]


@pytest.mark.parametrize("equal", [1, 401])
def test_a_size_that_no_subset_has_is_refused(equal):
    real = np.random.default_rng(0).normal(size=(400, 2))
    with pytest.raises(ConfigError, match=f"equal is {equal}, expected 2 to 400"):
        distances(real, real, equal=equal)


def test_too_few_images_are_refused():
    real = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises(InputError, match="other: 7 images, expected 8 or more"):
        distances(real, real[:7])


def test_feature_metrics_of_bright_and_dark_images():
    class Brightness(nn.Module):
        """Two features and two classes, dark and bright."""

        def features(self, images):
            means = images.mean((1, 2, 3))
            return torch.stack((means, images.std((1, 2, 3))), 1)

        def last(self, features):
            return torch.stack((-features[:, 0], features[:, 0]), 1)

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(32) % 2
    images = (labels.float() - 0.5).view(-1, 1, 1, 1)
    images = images + 0.1 * torch.rand(32, 1, 4, 4, generator=generator)
    extractor = Extractor(net=Brightness(), name="brightness")
    found = feature_metrics(images, labels, images.flip(0), labels, extractor)
    assert found["frechet"] == pytest.approx(0, abs=1e-9)
    assert found["real_accuracy"] == 1.0
    assert found["class_accuracy"] == 0.0  # reversed, every image is of the other class
    assert found["precision"] == found["recall"] == 1.0
    assert "class_accuracy" not in feature_metrics(images, labels, images, None, extractor)
    assert "class_accuracy" not in feature_metrics(images, labels, images, labels, QUARTERS)


def test_costs_by_hand():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.up = nn.ConvTranspose2d(2, 1, 2, stride=2)
            self.down = nn.Conv2d(1, 1, 2, stride=2)
            self.linear = nn.Linear(8, 8)

        def forward(self, sample, timestep, return_dict=True):
            return (self.linear(self.down(self.up(self.conv(sample)))),)

    from diffusers import DDIMScheduler

    sampler = LatentSampler(
        scheduler=DDIMScheduler(), latent_shape=(1, 8, 8), steps=2, batch_size=5
    )
    costs = {cost.layer: cost for cost in layer_costs(Tiny(), sampler)}
    # two steps of one image; conv 8x8 places x 2 x 9, up 8x8 places of its input x 2 x 4,
    # down 8x8 places x 4, linear 8 rows x 64
    expected = {"conv": 2 * 64 * 18, "up": 2 * 64 * 8, "down": 2 * 64 * 4, "linear": 2 * 8 * 64}
    assert {name: cost.macs for name, cost in costs.items()} == expected
    assert bit_operations(list(costs.values())) == 1024 * sum(expected.values())


def test_packed_layers_cost_their_own_widths(unet, student, sampler):
    plain = {cost.layer: cost for cost in layer_costs(unet, sampler)}
    packed = {cost.layer: cost for cost in layer_costs(student, sampler)}
    assert {name: cost.macs for name, cost in plain.items()} == {
        name: cost.macs for name, cost in packed.items()
    }
    body = packed["mid_block.resnets.0.conv1"]  # 16 rows of 1, 2, 3, 1, ... bits
    assert (body.weight_bits, body.act_bits) == (31 / 16, 6)
    assert packed["conv_in"].weight_bits == 8
    ratio = bit_operations(list(plain.values())) / bit_operations(list(packed.values()))
    assert 1024 / 48 < ratio < 1024 / 12


def test_what_a_program_of_the_user_raises_is_told():
    images = torch.zeros(8, 3, 4, 4)
    with pytest.raises(InputError, match=r"picky: .*expected a program of images"):
        Extractor(net=nn.Conv2d(1, 1, 1), name="picky").embed(images)
    with pytest.raises(InputError, match=r"flat: output of shape \(\) for 8 images"):
        Extractor(net=torch.sum, name="flat").embed(images)
