# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: it helps, TRD has a gradient, and an interrupted run goes on as if it never was."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mpq_dm.calibration import calibrate
from mpq_dm.checkpoint import Checkpoints
from mpq_dm.finetune import FineTuner, parameter_groups
from mpq_dm.method import make_student
from mpq_dm.trd import FeatureTap, RelationWindow
from tenfold_core.errors import CheckpointError, DivergedError

FAST = {"lora_lr": 1 / 40, "weight_lr": 1e-4, "act_lr": 2e-3}


@pytest.fixture
def flat():
    """One level without attention is enough here."""
    return True


@pytest.fixture
def tuner(unet, make):
    """Make a tuner of the tiny UNet at W3A6, calibrated once for all tuners of a test."""
    known = {}

    def build(method="mpq-dm", **settings):
        config, sampler, timesteps = make(method, **{"trajectories": 2} | FAST | settings)
        key = (config.allocation, config.skip_bits)
        if key not in known:
            known[key] = calibrate(unet, sampler, timesteps, config)
        student, layers = make_student(unet, known[key], timesteps, config)
        body = {name: layer for name, layer in layers.items() if layer.plan.role == "body"}
        return FineTuner(unet, student, body, sampler, config, len(timesteps))

    return build


def values(tuner):
    return {name: part.detach().clone() for name, part in tuner._names.items()}


def test_fine_tuning_brings_the_student_nearer_on_a_new_trajectory(unet, tuner):
    trained = tuner(trajectories=10, weight_bits=2)
    exact = trained.sampler.trajectory(unet, 99)
    before = (trained.sampler.trajectory(trained.student, 99) - exact).square().mean()

    trained.run()

    after = (trained.sampler.trajectory(trained.student, 99) - exact).square().mean()
    assert after < 0.75 * before


def test_only_the_body_is_trained(tuner):
    trained = tuner()

    names = {name.rsplit(".", 2)[0] for name in trained._names}

    assert names == set(trained.layers)
    assert "conv_in" not in names
    others = [
        name for name, part in trained.student.named_parameters()
        if part.requires_grad and not any(name.startswith(known) for known in names)
    ]  # fmt: skip
    assert not others


def test_trd_alone_moves_the_lora_of_the_last_up_block(unet, tuner):
    """The published program detaches the student's feature: there, nothing would move."""
    trained = tuner()
    taps = [FeatureTap(trained.student), FeatureTap(unet)]
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    for model in (trained.student, unet):
        model(x, 500, class_labels=labels)
    student, teacher = (tap.take() for tap in taps)
    layer = trained.layers["up_blocks.0.resnets.1.conv2"]

    RelationWindow(1).add(student, teacher).backward()

    assert layer.lora.b.grad.abs().sum() > 0
    assert layer.act_quant.rho.grad.abs().sum() > 0
    assert not RelationWindow(1, grad="none").add(student.detach(), teacher).requires_grad


def test_trd_changes_the_training_and_reports_its_gradient(tuner):
    with_trd, without = tuner("efficientdm-omq", trd_weight=100.0), tuner("efficientdm-omq")
    losses = []

    with_trd.run(on_trajectory=losses.append)
    without.run()

    assert losses[0].grad_ratio > 0
    assert losses[0].relation > 0
    name = "up_blocks.0.resnets.1.conv2.lora.b"
    assert not torch.equal(values(with_trd)[name], values(without)[name])


def test_without_trd_it_is_efficientdm_with_omq_bit_for_bit(tuner):
    ours, base = tuner("mpq-dm", trd_weight=0.0), tuner("efficientdm", allocation="kurtosis")

    ours.run()
    base.run()

    for name, value in values(ours).items():
        assert torch.equal(value, values(base)[name]), name


def test_a_constant_trd_leaves_the_training_as_it_is(tuner):
    losses = []
    constant, without = tuner(trd_grad="none"), tuner(trd_weight=0.0)

    constant.run(on_trajectory=losses.append)
    without.run()

    assert losses[0].grad_ratio == 0
    for name, value in values(constant).items():
        assert torch.equal(value, values(without)[name]), name


def test_the_same_seed_gives_the_same_bits(tuner):
    first, second = tuner(), tuner()
    first.run()
    second.run()

    for name, value in values(first).items():
        assert torch.equal(value, values(second)[name]), name


class Stop(Exception):
    """An interruption that is not the user's."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stop])
def test_an_interrupted_run_goes_on_as_if_it_never_was(tuner, unet, make, tmp_path, kind):
    whole, broken, resumed = (tuner(trajectories=3, save_every=100) for _ in range(3))
    losses, saved = [], []
    config, _, timesteps = make(**{"trajectories": 3, "save_every": 100} | FAST)
    kept = Checkpoints(tmp_path, config, unet, timesteps)
    whole.run(on_trajectory=losses.append)

    def interrupt(loss):
        saved.append(loss)
        if loss.trajectory == 1:
            raise kind

    with pytest.raises(kind):
        broken.run(on_trajectory=interrupt, save=lambda state: kept.save_training(state, saved))
    found = kept.load_training_(resumed)
    resumed.run(on_trajectory=found.append)

    assert resumed.done == 3
    assert found == losses
    for name, value in values(resumed).items():
        assert torch.equal(value, values(whole)[name]), name


def test_interrupted_within_a_trajectory_the_finished_ones_are_kept(tuner, unet):
    trained = tuner(trajectories=3)
    calls, saved = [], []

    def count(*_):
        calls.append(1)
        if len(calls) == 6:  # 4 calls a trajectory
            raise KeyboardInterrupt

    unet.register_forward_pre_hook(count)
    with pytest.raises(KeyboardInterrupt):
        trained.run(save=saved.append)

    assert saved[-1]["done"].tolist() == [1, 4]


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_the_layer(tuner):
    trained = tuner()
    saved = []
    layer = trained.layers["mid_block.resnets.0.conv1"]
    with torch.no_grad():
        layer.weight_quant.rho[3] = float("nan")

    with pytest.raises(DivergedError, match=r"loss is nan in trajectory 0, step 0, the scale of "
                       r"the weight of layer 'mid_block\.resnets\.0\.conv1'"):  # fmt: skip
        trained.run(save=saved.append)
    assert saved[-1]["done"].tolist() == [0, 0]


def test_learning_rates_follow_the_layers_scales_and_fall_to_zero(tuner):
    trained = tuner(lora_lr=0.5)
    name, layer = next(iter(trained.layers.items()))
    groups = parameter_groups({name: layer}, trained.config)

    mean = float(layer.weight_quant.initial.mean())
    assert groups[0]["lr"] == pytest.approx(0.5 * mean)
    assert groups[0]["weight_decay"] == 0.01
    assert all(group["weight_decay"] == 0 for group in groups[1:])
    trained.run()
    last = 1 / trained.total_steps
    assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(trained._rates[0] * last)


def test_a_gradient_that_is_not_finite_stops_before_anything_is_spoiled(tuner):
    trained = tuner()
    saved = []
    layer = trained.layers["mid_block.resnets.0.conv1"]
    layer.lora.b.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(DivergedError, match=r"that of mid_block\.resnets\.0\.conv1\.lora\.b first"):
        trained.run(save=saved.append)
    assert all(np.isfinite(part).all() for part in saved[-1].values())


def test_a_saved_state_has_the_losses_up_to_it(tuner, unet, make, tmp_path):
    config, _, timesteps = make()
    kept, told, found = Checkpoints(tmp_path, config, unet, timesteps), [], []
    trained = tuner(trajectories=3, save_every=2)

    def save(state):
        kept.save_training(state, told)
        found.append(len(kept.load_training_(tuner(trajectories=3, save_every=2))))

    trained.run(on_trajectory=told.append, save=save)

    assert found == [2, 3]


@pytest.mark.parametrize(
    ("change", "text"),
    [({"weight_bits": 4}, "weight_bits was 3, is 4 now"), ({"seed": 5}, "seed was 1, is 5 now")],
)
def test_other_settings_are_refused_by_name(tuner, unet, make, tmp_path, change, text):
    trained = tuner()
    config, _, timesteps = make()
    Checkpoints(tmp_path, config, unet, timesteps).save_training(trained.state(), [])

    other = Checkpoints(tmp_path, replace(config, **change), unet, timesteps)

    with pytest.raises(CheckpointError, match=text):
        other.load_training_(trained)


def test_another_model_is_refused(tuner, unet, make, tmp_path):
    trained = tuner()
    config, _, timesteps = make()
    Checkpoints(tmp_path, config, unet, timesteps).save_training(trained.state(), [])
    with torch.no_grad():
        unet.conv_in.bias[0] += 1

    with pytest.raises(CheckpointError, match="model was "):
        Checkpoints(tmp_path, config, unet, timesteps).load_training_(trained)


def test_a_damaged_state_is_refused(tuner, unet, make, tmp_path):
    trained = tuner()
    config, _, timesteps = make()
    kept = Checkpoints(tmp_path, config, unet, timesteps)
    state = trained.state()
    name = next(iter(trained._names))

    kept.save_training({"done": state["done"]}, [])
    with pytest.raises(CheckpointError, match="is missing, expected a state of this model"):
        kept.load_training_(trained)
    kept.save_training(state | {name: np.zeros(3)}, [])
    with pytest.raises(CheckpointError, match=r"has shape \(3,\), expected"):
        kept.load_training_(trained)
    path = tmp_path / "training.safetensors"
    kept.save_training(state, [])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"training\.safetensors"):
        kept.load_training_(trained)


def test_calibration_comes_back_as_it_was(unet, make, tmp_path):
    config, sampler, timesteps = make(skip_bits=16)
    found = calibrate(unet, sampler, timesteps, config)
    kept = Checkpoints(tmp_path, config, unet, timesteps)
    with pytest.raises(CheckpointError, match="interrupted before its first checkpoint"):
        kept.load_calibration()

    kept.save_calibration(found)
    again = kept.load_calibration()

    assert (again.left, again.halves) == (found.left, found.halves)
    for name, plan in found.plans.items():
        other = again.plans[name]
        assert (plan.role, plan.act_bits) == (other.role, other.act_bits)
        for key in ("bits", "scale", "zero", "smooth", "act_scale", "act_zero"):
            assert torch.equal(getattr(plan, key), getattr(other, key)), (name, key)
        if name in found.errors:
            np.testing.assert_array_equal(found.errors[name], again.errors[name])
