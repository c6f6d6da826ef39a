# SPDX-License-Identifier: Apache-2.0
"""The shipped models load and do what their log says; training them is repeatable."""

import json

import pytest
import torch
from mpq_dm import demo_model
from mpq_dm.data import digits, split
from mpq_dm.demo_model import (
    ASSETS,
    build_scheduler,
    build_unet,
    classifier_outputs,
    demo_sampler,
    load_classifier,
    load_demo,
    train_assets,
    train_classifier,
    train_demo,
)
from mpq_dm.metrics import class_accuracy, frechet_distance
from tenfold_core.errors import ConfigError

LARGEST_ASSETS = 1_000_000


@pytest.fixture(scope="module")
def log():
    return json.loads((ASSETS / "train.json").read_text())


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


@pytest.fixture(scope="module")
def parts():
    return split(digits())


def settings(part):
    """What a part was made with, as JSON holds it; names with _ say where it came from."""
    text = json.dumps({k: v for k, v in part.config.items() if not k.startswith("_")})
    return json.loads(text)


def test_the_shipped_files_are_small():
    sizes = [path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(sizes) <= LARGEST_ASSETS


def test_the_shipped_model_is_the_one_that_is_built(log):
    unet, scheduler = load_demo()
    assert not unet.training
    assert {value.dtype for value in unet.state_dict().values()} == {torch.float32}
    assert sum(value.numel() for value in unet.parameters()) == log["parameters"]
    for found, expected in ((unet, build_unet()), (scheduler, build_scheduler())):
        assert type(found) is type(expected)
        assert settings(found) == settings(expected)


def test_the_shipped_model_draws_the_digit_it_is_asked_for(classifier, parts):
    unet, scheduler = load_demo()
    sampler = demo_sampler(batch_size=200, seed=5, scheduler=scheduler)
    images = sampler.trajectory(unet, 0)
    assert images.shape == (200, 1, 8, 8)
    assert images.abs().max() <= 1
    features, logits = classifier_outputs(classifier, images)
    assert class_accuracy(logits, sampler.arguments(0)["class_labels"]) >= 0.95
    real, _ = classifier_outputs(classifier, parts[0].images)
    noise, _ = classifier_outputs(classifier, sampler.noise(0))
    assert frechet_distance(features, real) < 0.05 * frechet_distance(noise, real)


def test_the_classifier_knows_held_out_digits(classifier, parts, log):
    held_out = parts[1]
    features, logits = classifier_outputs(classifier, held_out.images, batch_size=100)
    assert features.shape == (len(held_out), 32)
    accuracy = class_accuracy(logits, held_out.labels)
    assert accuracy >= 0.96
    assert accuracy == pytest.approx(log["quality"]["held_out_accuracy"], abs=0.004)
    torch.testing.assert_close(classifier(held_out.images), logits)


def test_the_log_tells_of_a_trained_model(log):
    losses = [loss for _, loss in log["loss"]]
    assert log["loss"][-1][0] == log["steps"]
    assert losses[-1] < 0.6 * losses[0]
    assert log["quality"]["class_accuracy"] >= 0.9
    assert log["kurtosis"]["median"] > 2.5  # the initialiser's is 1.8


def test_training_is_repeatable_and_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    seen = []

    def train(seed, progress=None):
        unet = train_demo(seed, 3, batch_size=4, progress=progress)
        assert not unet.training
        return torch.cat([value.detach().flatten() for value in unet.parameters()])

    first = train(1, lambda step, loss: seen.append((step, loss)))
    assert torch.equal(first, train(1))
    assert not torch.equal(first, train(2))
    assert torch.equal(before, torch.get_rng_state())
    assert [step for step, _ in seen] == [1, 2, 3]
    assert all(loss > 0 for _, loss in seen)


def test_a_few_steps_teach_the_classifier_something(parts):
    classifier = train_classifier(3, 200, data=parts[0])
    _, logits = classifier_outputs(classifier, parts[1].images)
    assert class_accuracy(logits, parts[1].labels) > 0.5


def test_assets_are_written_as_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "JUDGED", 20)
    monkeypatch.setattr(demo_model, "CLASSIFIER_STEPS", 5)
    monkeypatch.setattr(demo_model, "ASSETS", tmp_path / "new")
    seen = []
    log = train_assets(tmp_path / "new", seed=1, steps=2, progress=lambda *step: seen.append(step))
    assert json.loads((tmp_path / "new" / "train.json").read_text()) == log
    assert log["loss"] == [[step, round(loss, 5)] for step, loss in seen]
    unet, _ = load_demo()
    assert sum(value.numel() for value in unet.parameters()) == log["parameters"]
    assert load_classifier()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_training_needs_a_step():
    with pytest.raises(ConfigError, match="steps is 0, expected 1 or more"):
        train_demo(0, 0)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        train_demo(0, 1, batch_size=0)
    with pytest.raises(ConfigError, match="steps is -1"):
        train_classifier(0, -1)
