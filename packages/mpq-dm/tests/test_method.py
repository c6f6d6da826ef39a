# SPDX-License-Identifier: Apache-2.0
"""`quantize` from end to end: what comes out is what was computed, saved and loaded bit for bit."""

import json
from dataclasses import replace

import mpq_dm
import pytest
import torch
from mpq_dm.calibration import calibrate
from mpq_dm.method import make_student, quantize
from mpq_dm.packed import MODES, set_mode
from tenfold_core.errors import ConfigError

FAST = {"trajectories": 2, "lora_lr": 1 / 40, "act_lr": 2e-3}


@pytest.fixture
def flat():
    """One level without attention is enough here."""
    return True


@pytest.mark.parametrize("flat", [False])
def test_a_packed_model_computes_what_its_student_did(unet, make):
    config, sampler, timesteps = make(weight_bits=4, act_bits=8)
    student, _ = make_student(unet, calibrate(unet, sampler, timesteps, config), timesteps, config)

    packed = quantize(unet, config, sampler=sampler).model

    x, labels = sampler.noise(0), torch.tensor([1, 2])
    for timestep in (750, 0):
        with torch.no_grad():
            ours, theirs = (
                model(x, timestep, class_labels=labels).sample for model in (packed, student)
            )
        # codes of inputs may differ by one where the two ways round differently
        assert (ours - theirs).square().mean() < 1e-3 * theirs.square().mean()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"allocation": "exact"} | FAST,
        {"allocation": "exact-layers"},
        {"skip_bits": 16, "plus": 0.1},
        {"skip_bits": 32, "edge_bits": 16},
        {"smooth_alpha": 0.0},
        {"lora_init": "svd-residual"} | FAST,
        {"cache_temb": True},
    ],
)
def test_what_is_saved_is_loaded_and_samples_the_same_images(unet, make, tmp_path, settings):
    config, sampler, _ = make(**settings)
    result = quantize(unet, config, sampler=sampler)
    images = sampler.trajectory(result.model, 5)

    result.model.save_pretrained(tmp_path / "unet")
    loaded = mpq_dm.load(tmp_path / "unet").eval()

    assert torch.equal(sampler.trajectory(loaded, 5), images)
    size = mpq_dm.account(tmp_path / "unet")
    assert size.agrees
    assert size.accounted == result.report.sizes["accounted"]


def test_all_modes_sample_the_same_images(unet, make):
    config, sampler, _ = make()
    model = quantize(unet, config, sampler=sampler).model

    images = []
    for mode in MODES:
        set_mode(model, mode)
        images.append(sampler.trajectory(model, 3))

    assert torch.equal(images[0], images[1]) or torch.equal(images[1], images[2])
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], rtol=0, atol=1e-3)


def test_the_original_stays_as_it_is(unet, make):
    before = {name: part.clone() for name, part in unet.state_dict().items()}
    config, sampler, _ = make(**FAST)

    quantize(unet, config, sampler=sampler)

    assert all(torch.equal(part, before[name]) for name, part in unet.state_dict().items())
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks
    assert not hasattr(unet, "hf_quantizer")


def test_the_same_seed_gives_the_same_file_and_another_seed_another(unet, make, tmp_path):
    config, sampler, _ = make(**FAST)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        chosen = replace(config, seed=seed)
        quantize(unet, chosen, sampler=sampler).model.save_pretrained(tmp_path / name)
    files = [
        (tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in "abc"
    ]

    assert files[0] == files[1]
    assert files[0] != files[2]


def test_more_bits_lose_less(unet, make):
    config, sampler, timesteps = make("rtn-mse")
    x, labels = sampler.noise(0), torch.tensor([1, 2])
    errors = []
    for bits in (2, 3, 4, 8):
        chosen = replace(config, weight_bits=bits, act_bits=8)
        packed = quantize(unet, chosen, sampler=sampler).model
        with torch.no_grad():
            found, exact = (
                model(x, timesteps[0], class_labels=labels).sample for model in (packed, unet)
            )
        errors.append((found - exact).square().mean().item())

    assert errors == sorted(errors, reverse=True)


def test_an_interrupted_run_ends_with_the_same_file(unet, make, tmp_path):
    config, sampler, _ = make(**FAST | {"trajectories": 3})
    whole = quantize(unet, config, sampler=sampler).model

    def stop(what, done, total):
        if what == "fine-tuning trajectories" and done == 2:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        quantize(unet, config, sampler=sampler, checkpoint_dir=state, progress=stop)
    told = []
    resumed = quantize(
        unet, config, sampler=sampler, resume_from=state, progress=lambda *what: told.append(what)
    )

    assert told == [("fine-tuning trajectories", 3, 3)]
    assert len(resumed.report.losses) == 3
    for name, part in whole.state_dict().items():
        assert torch.equal(part, resumed.model.state_dict()[name]), name


def test_steps_that_were_not_calibrated_are_interpolated_and_said_once(unet, make):
    from tenfold_core.errors import TenfoldWarning

    config, sampler, _ = make()
    model = quantize(unet, config, sampler=sampler).model

    with pytest.warns(TenfoldWarning, match="outside the 4 calibrated ones") as said:
        images = replace(sampler, steps=7).trajectory(model, 0)

    assert len(said) == 1
    assert images.isfinite().all()


def test_timesteps_in_any_order_give_the_same_result(unet, make):
    config, sampler, timesteps = make()
    model = quantize(unet, config, sampler=sampler).model
    x, labels = sampler.noise(0), torch.tensor([3, 4])

    def run(order):
        with torch.no_grad():
            return {step: model(x, step, class_labels=labels).sample for step in order}

    forwards, backwards = run(timesteps), run(timesteps[::-1])
    assert all(torch.equal(forwards[step], backwards[step]) for step in timesteps)
    mixed = model(x, torch.tensor([timesteps[0], timesteps[2]]), class_labels=labels).sample
    torch.testing.assert_close(mixed[0], forwards[timesteps[0]][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], forwards[timesteps[2]][1], rtol=1e-4, atol=1e-4)


def test_the_report_says_bits_errors_and_losses(unet, make, tmp_path):
    config, sampler, timesteps = make("mpq-dm-exact", **FAST)
    report = quantize(unet, config, sampler=sampler).report

    report.to_json(tmp_path / "report.json")

    found = json.loads((tmp_path / "report.json").read_text())
    assert found["timesteps"] == timesteps
    assert [loss["trajectory"] for loss in found["losses"]] == [0, 1]
    rows = [row for row in found["layers"] if row["role"] == "body"]
    for row in rows:
        assert row["error_chosen"] == pytest.approx(row["error_exact"], rel=1e-6)
        assert row["error_exact"] <= row["error_kurtosis"] * (1 + 1e-9)
        assert row["error_kurtosis"] <= row["error_uniform"] * (1 + 1e-9)
        assert row["mean_bits"] == 3
    assert found["sizes"]["bits_per_weight"] > 3


def test_pipelines_come_back_as_pipelines(make_unet, scheduler, tmp_path):
    from diffusers import DDIMPipeline, DiffusionPipeline

    pipe = DDIMPipeline(unet=make_unet(num_class_embeds=None), scheduler=scheduler)
    config = mpq_dm.method_config("rtn-mse", weight_bits=4, act_bits=8, steps=3, batch_size=2,
                                  calib_samples=2)  # fmt: skip

    result = mpq_dm.quantize(pipe, config)
    result.pipe.save_pretrained(tmp_path / "out")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")

    images = [
        found(batch_size=1, num_inference_steps=3, output_type="np",
              generator=torch.Generator().manual_seed(0)).images
        for found in (result.pipe, loaded)
    ]  # fmt: skip
    assert (images[0] == images[1]).all()
    assert not getattr(pipe.unet, "is_quantized", False)


def test_weights_that_are_not_float32_are_named(unet, make):
    config, sampler, _ = make()

    with pytest.raises(ConfigError, match=r"torch.float16, expected float32; load it with dtype"):
        quantize(unet.half(), config, sampler=sampler)


def test_a_denoiser_needs_a_scheduler(unet):
    with pytest.raises(ConfigError, match="needs a scheduler"):
        quantize(unet)
