# SPDX-License-Identifier: Apache-2.0
"""What the package promises, end to end: invariances, every kind of layer, all verbs."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import mpq_dm
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from mpq_dm.allocation import allocate, table_error
from mpq_dm.calibration import calibrate, output_errors
from mpq_dm.cli import main as run_cli
from mpq_dm.config import MPQDMConfig, method_config, parse_settings
from mpq_dm.finetune import FineTuner
from mpq_dm.images import grid, is_image, save_grid, save_png, to_pixels
from mpq_dm.method import make_sampler, make_student, pack, quantize
from mpq_dm.models import open_source
from mpq_dm.omq import allocate_exact, allocate_kurtosis, kurtosis
from mpq_dm.packed import set_mode
from mpq_dm.planted import planted_layer
from mpq_dm.plugin import sampling_steps
from mpq_dm.sampler import LatentSampler, called_timesteps
from PIL import Image
from tenfold_core.errors import ConfigError, InputError
from torch import nn

WEIGHTS = "diffusion_pytorch_model.safetensors"
QUICK = {"scale_method": "minmax", "steps": 2, "calib_samples": 2, "batch_size": 2, "rank": 2}
TUNED = QUICK | {"trajectories": 2, "lora_lr": 1 / 40, "act_lr": 2e-3, "weight_bits": 3}


@pytest.fixture
def flat():
    """One level without attention is enough here."""
    return True


@pytest.fixture
def made(unet, scheduler):
    """Make a config, a sampler of the UNet and its timesteps."""

    def build(method="mpq-dm", **settings):
        config = method_config(method, **TUNED | settings)
        negative = {"class_labels": torch.tensor([9])}
        sampler = make_sampler(
            unet, config, scheduler=scheduler, labels=range(9), negative=negative
        )
        return config, sampler, called_timesteps(unet, sampler)

    return build


def tuner_of(model, made):
    config, sampler, timesteps = made
    student, layers = make_student(
        model, calibrate(model, sampler, timesteps, config), timesteps, config
    )
    body = {name: layer for name, layer in layers.items() if layer.plan.role == "body"}
    return FineTuner(model, student, body, sampler, config, len(timesteps)), layers


def trained(tuner):
    return {name: part.detach().clone() for name, part in tuner._names.items()}


# --- invariances --------------------------------------------------------------------------------


def rescale_values(model, factor=64.0, channels=slice(0, 2)):
    """Plant outliers in every attention: rows of W_v times the factor, columns of W_o over it."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "to_v"):
                module.to_v.weight[channels] *= factor
                module.to_v.bias[channels] *= factor
                module.to_out[0].weight[:, channels] /= factor


def test_rescaling_values_against_outputs_changes_nothing_that_pre_scaling_does_not_undo(
    make_unet, scheduler
):
    """A power of two moves from W_o to W_v without any rounding: the function is the same."""
    plain = make_unet()
    planted = copy.deepcopy(plain)
    rescale_values(planted)
    config = method_config("rtn-minmax", **QUICK | {"weight_bits": 4, "act_bits": 8})
    sampler = make_sampler(plain, config, scheduler=scheduler, labels=range(10))
    assert torch.equal(sampler.trajectory(plain, 0), sampler.trajectory(planted, 0))
    name, seen = "mid_block.attentions.0", []
    handle = plain.get_submodule(name).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    sampler.trajectory(plain, 0)
    handle.remove()

    def error(model, alpha):
        chosen = replace(config, smooth_alpha=alpha)
        packed = quantize(model, chosen, sampler=sampler).model
        steps = sampling_steps(packed)
        total = 0.0
        for timestep, x in zip(called_timesteps(plain, sampler), seen, strict=True):
            steps.set_(timestep)
            with torch.no_grad():
                lost = packed.get_submodule(name)(x) - plain.get_submodule(name)(x)
            total += float(lost.square().mean())
        return total

    smooth, without = (error(plain, alpha) for alpha in (0.5, 0.0))
    assert error(planted, 0.5) < 2 * smooth
    assert error(planted, 0.0) > 100 * without


@pytest.mark.parametrize("allocation", ["kurtosis", "exact", "exact-layers"])
def test_bits_follow_the_rows_when_rows_are_permuted(allocation):
    weight = planted_layer(12, seed=3)[:60]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    config = MPQDMConfig(weight_bits=2, allocation=allocation)

    (found,), (permuted,) = (allocate([rows], config) for rows in (weight, weight[order]))

    assert len(set(found.tolist())) > 1
    np.testing.assert_array_equal(permuted, found[order.numpy()])


@pytest.mark.parametrize("bits", [2, 3])
def test_allocations_hold_on_inputs_they_have_not_seen(bits):
    """Bits are chosen on one half of the inputs and judged on the other."""
    generator = torch.Generator().manual_seed(0)
    loud = torch.rand(512, generator=generator, dtype=torch.float64).exp()
    x = torch.randn(512, 512, generator=generator, dtype=torch.float64) * loud
    weight, choices = planted_layer(30, seed=1), (bits - 1, bits, bits + 1)
    layer = nn.Linear(512, 100, bias=False)
    tables = [output_errors(layer, half, half, weight, choices) for half in (x[:256], x[256:])]
    paper = allocate_kurtosis(kurtosis(weight).numpy(), table_error(tables[0], choices), bits)
    exact = allocate_exact(tables[0], choices, bits * 100)

    seen, unseen = (
        [table_error(table, choices)(chosen) for chosen in (exact, paper, np.full(100, bits))]
        for table in tables
    )

    assert seen == sorted(seen)
    assert unseen[0] <= 1.03 * unseen[1]
    assert unseen[1] < 0.85 * unseen[2]


def test_a_trained_student_and_its_packed_model_agree_and_no_lora_is_left(made, unet):
    config, sampler, timesteps = made(weight_bits=4)
    tuner, layers = tuner_of(unet, (config, sampler, timesteps))
    tuner.run()
    assert any(layer.lora.b.abs().sum() > 0 for layer in tuner.layers.values())
    x, labels = sampler.noise(7), torch.tensor([1, 2])
    with torch.no_grad():
        expected = tuner.student(x, timesteps[0], class_labels=labels).sample

    found = calibrate(unet, sampler, timesteps, config)
    packed = pack(tuner.student, layers, found, timesteps, config, sampler)

    set_mode(packed, "dequant")
    with torch.no_grad():
        ours = packed(x, timesteps[0], class_labels=labels).sample
    assert (ours - expected).square().mean() < 1e-3 * expected.square().mean()
    assert not [name for name in packed.state_dict() if "lora" in name]
    assert not any(isinstance(module, mpq_dm.layers.QuantLayer) for module in packed.modules())


# --- training -----------------------------------------------------------------------------------


def test_the_task_loss_is_that_of_the_guided_prediction(made, unet):
    made = made("efficientdm", steps=1, guidance=3.0, trajectories=1)
    (tuner, _), sampler = tuner_of(unet, made), made[1]
    arguments = sampler.arguments(0)
    x = sampler.noise(0)
    pair = torch.cat((x, x))
    with torch.no_grad():
        free, wanted = (
            model(pair, made[2][0], class_labels=arguments["class_labels"]).sample.chunk(2)
            for model in (tuner.student, unet)
        )
    guided = [part[0] + 3 * (part[1] - part[0]) for part in (free, wanted)]
    expected = (guided[0] - guided[1]).square().sum()
    losses = []

    tuner.run(on_trajectory=losses.append)

    assert losses[0].task == pytest.approx(float(expected), rel=1e-5)


def test_a_window_never_spans_two_trajectories(made, unet, monkeypatch):
    """Three steps and windows of two: one window a trajectory, the third step is dropped."""
    import mpq_dm.trd

    calls = []
    relation = mpq_dm.trd.relation_kl
    monkeypatch.setattr(
        mpq_dm.trd, "relation_kl", lambda *a, **k: calls.append(1) or relation(*a, **k)
    )
    tuner, _ = tuner_of(unet, made(steps=3, trajectories=3, allocation="uniform"))

    tuner.run()

    assert len(calls) == 3


def test_sampling_between_two_trajectories_does_not_disturb_training(made, unet):
    made = made(allocation="uniform")
    whole, disturbed = (tuner_of(unet, made)[0] for _ in range(2))
    whole.run()

    disturbed.run(on_trajectory=lambda _: made[1].trajectory(disturbed.student, 50))

    for name, value in trained(whole).items():
        assert torch.equal(value, trained(disturbed)[name]), name
    assert not unet._forward_hooks
    assert not disturbed.student.conv_norm_out._forward_pre_hooks


def test_a_teacher_in_training_mode_gives_the_same_as_one_that_is_not(make_unet, scheduler):
    config = method_config("rtn-minmax", **QUICK)
    models = [make_unet(flat=True, dropout=0.5) for _ in range(2)]
    models[1].train()

    found = [
        quantize(model, config, scheduler=scheduler, labels=range(10)).model for model in models
    ]

    for name, part in found[0].state_dict().items():
        assert torch.equal(part, found[1].state_dict()[name]), name


# --- samplers -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_two_calls_a_step_share_the_scales_of_their_timestep(unet):
    """Heun calls the denoiser twice at most timesteps; counters of calls would run away."""
    heun = diffusers.HeunDiscreteScheduler()
    config = method_config("rtn-minmax", **QUICK | {"steps": 3, "weight_bits": 4})
    sampler = make_sampler(unet, config, scheduler=heun, labels=range(10))
    calls = []
    handle = unet.register_forward_hook(lambda *_: calls.append(1))
    exact = sampler.trajectory(unet, 5)
    handle.remove()

    packed = quantize(unet, config, sampler=sampler).model

    assert (len(calls), sampling_steps(packed).num_steps) == (5, 3)
    assert (sampler.trajectory(packed, 5) - exact).square().mean() < 0.1 * exact.square().mean()


def test_float_timesteps_of_a_flow_are_calibrated_and_mixed_in_a_batch(unet, tmp_path):
    config = method_config("stepwise-mse", **QUICK | {"steps": 3, "weight_bits": 4, "act_bits": 8})
    sampler = LatentSampler(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), latent_shape=(1, 8, 8), steps=3,
        batch_size=2, labels=range(10), timestep_scale=1e-3,
    )  # fmt: skip
    timesteps = sampler.timesteps()
    assert all(0 < step <= 1 for step in timesteps)
    quantize(unet, config, sampler=sampler).model.save_pretrained(tmp_path / "unet")
    packed = mpq_dm.load(tmp_path / "unet").eval()
    x, labels = sampler.noise(0), torch.tensor([1, 2])

    def output(timestep):
        with torch.no_grad():
            return packed(x, timestep, class_labels=labels).sample

    assert packed.config["quantization_config"].timesteps == pytest.approx(timesteps)
    mixed = output(torch.tensor([timesteps[0], timesteps[2]]))
    for sample, step in ((0, 0), (1, 2)):
        alone = output(torch.tensor(timesteps[step]))[sample]
        torch.testing.assert_close(mixed[sample], alone, rtol=1e-4, atol=1e-4)


# --- layers of every kind -----------------------------------------------------------------------


class Zoo(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A denoiser with one layer of every kind that is quantized, and two that are not."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1):
        super().__init__()
        self.conv_in = nn.Conv2d(1, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 12, 1, groups=3)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2)
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1, padding_mode="reflect")
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.volume = nn.Conv3d(1, 2, 3, padding=1)
        self.narrow = nn.Linear(2, 3)
        self.one_row = nn.Linear(16, 1)
        self.wide = nn.Linear(3, 16)
        self.bilinear = nn.Bilinear(16, 16, 16)
        self.uncalled = nn.Linear(5, 5)
        self.conv_out = nn.Conv2d(1, 1, 1)
        for turned in (self.wide.weight, self.grouped.weight):
            turned.data = turned.data.transpose(0, 1).contiguous().transpose(0, 1)

    def forward(self, sample, timestep, return_dict=True):
        batch = len(sample)
        x = self.down(self.up(self.grouped(self.depthwise(self.conv_in(sample)))))
        x = self.line(x.flatten(2)).mean(1).view(batch, 1, 1, 4, 4)
        x = self.narrow(self.volume(x).flatten(2).mT)
        x = self.wide(x.sin())
        x = self.bilinear(x, x) * self.one_row(x).tanh()
        x = self.conv_out(x.mean(-1).view(batch, 1, 4, 4) + sample)
        return SimpleNamespace(sample=x) if return_dict else (x,)


@pytest.fixture
def zoo():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Zoo().eval()


@pytest.mark.parametrize("bits", [2, 4])
def test_layers_of_every_kind_are_quantized_or_left_and_named(zoo, scheduler, tmp_path, bits):
    assert not zoo.wide.weight.is_contiguous()
    config = method_config("mpq-dm-exact", **TUNED | {"weight_bits": bits, "trd_weight": 0.0})

    result = quantize(zoo, config, scheduler=scheduler)

    assert result.report.left == {
        "bilinear": "unknown class (Bilinear)", "uncalled": "not called by the sampler"
    }  # fmt: skip
    rows = {row["layer"]: row for row in result.report.layers}
    assert rows.keys() == {name for name, _ in zoo.named_children()} - {"bilinear", "uncalled"}
    for name, row in rows.items():
        assert row["mean_bits"] == (8 if name.startswith("conv_") else bits), name
        assert set(row["rows_by_bits"]) <= {bits - 1, bits, bits + 1, 8}
    assert rows["one_row"]["rows_by_bits"] == {bits: 1}
    result.model.save_pretrained(tmp_path)
    loaded = Zoo.from_pretrained(tmp_path).eval()
    sampler = make_sampler(zoo, config, scheduler=scheduler)
    images = [sampler.trajectory(model, 3) for model in (zoo, result.model, loaded)]
    assert torch.equal(images[1], images[2])
    assert (images[1] - images[0]).square().mean() < 0.5 * images[0].square().mean()
    assert mpq_dm.account(result.model).accounted == result.report.sizes["accounted"]


# --- settings -----------------------------------------------------------------------------------


def test_settings_are_json_or_text():
    found = parse_settings(
        ("rank=4", "lora-lr=0.5", "allocation=exact", "trd_rows=null", "omq_acts=false")
    )
    assert found == {
        "rank": 4, "lora_lr": 0.5, "allocation": "exact", "trd_rows": None, "omq_acts": False
    }  # fmt: skip
    assert parse_settings(()) == {}
    assert parse_settings(("a=b=c",)) == {"a": "b=c"}


@pytest.mark.parametrize("pair", ["rank", "rank=", "=4", ""])
def test_a_setting_without_a_name_or_a_value_is_told(pair):
    with pytest.raises(ConfigError, match=f"--set {pair}: expected name=value"):
        parse_settings([pair])


# --- pictures -----------------------------------------------------------------------------------


def test_values_become_bytes():
    signed = torch.tensor([-2.0, -1, 0, 1, 3, float("nan")]).view(1, 1, 2, 3)
    assert to_pixels(signed).reshape(-1).tolist() == [0, 0, 128, 255, 255, 0]
    unsigned = torch.tensor([-1.0, 0, 0.5, 1]).view(1, 1, 2, 2)
    assert to_pixels(unsigned, signed=False).reshape(-1).tolist() == [0, 0, 128, 255]
    assert to_pixels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_only_maps_of_one_or_three_channels_are_images():
    assert [is_image(torch.zeros(1, n, 2, 2)) for n in (1, 2, 3, 4)] == [True, False, True, False]
    assert not is_image(torch.zeros(1, 3, 2))
    with pytest.raises(InputError, match=r"shape \(1, 4, 2, 2\), expected \(batch, 1 or 3,"):
        to_pixels(torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(1, None, (6, 7)), (4, None, (11, 13)), (5, None, (11, 19)), (5, 5, (6, 31)), (2, 1, (11, 7))],
)
def test_a_grid_has_a_gap_around_every_image(count, columns, shape):
    images = np.zeros((count, 4, 5, 1), np.uint8)
    sheet = grid(images, columns=columns)
    assert sheet.shape == (*shape, 1)
    assert (sheet == 0).sum() == count * 20
    assert (sheet[[0, -1]] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_hold_the_pixels(channels, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 5, channels), dtype=np.uint8)

    save_png(tmp_path / "one.png", pixels)
    save_png(tmp_path / "three.png", pixels, scale=3)

    with Image.open(tmp_path / "one.png") as image:
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    with Image.open(tmp_path / "three.png") as image:
        assert image.size == (15, 12)
        np.testing.assert_array_equal(np.asarray(image)[1::3, 1::3].reshape(pixels.shape), pixels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "three.png"]


def test_a_labelled_grid_has_one_row_of_magnified_images_for_each_model(tmp_path):
    rows = {name: np.full((3, 8, 8, 1), value, np.uint8) for name, value in (("a", 0), ("b", 90))}

    save_grid(tmp_path / "grid.png", rows)

    with Image.open(tmp_path / "grid.png") as image:
        found = np.asarray(image)
        assert image.mode == "RGB"
    assert found.shape[0] == 2 * (32 + 2)
    assert (found[17, -17] == 0).all()
    assert (found[34 + 17, -17] == 90).all()


# --- the verbs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(make_unet, tmp_path_factory):
    """A denoiser and a pipeline, and both quantized from the command line."""
    path = tmp_path_factory.mktemp("verbs")
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    make_unet(flat=True).save_pretrained(path / "unet" / "unet")
    scheduler.save_pretrained(path / "unet" / "scheduler")
    free = make_unet(flat=True, num_class_embeds=None)
    diffusers.DDIMPipeline(free, scheduler).save_pretrained(path / "pipe")
    quick = (
        "--method", "rtn-minmax", "-w", "4", "-a", "8", "--steps", "3", "--batch-size", "2",
        "--device", "cpu", "--quiet", "--set", "calib_samples=3", "--set", "act_init=step",
    )  # fmt: skip
    for name, more in (("unet", ("--labels", "0-9")), ("pipe", ())):
        assert (
            run_cli(["quantize", str(path / name), "-o", str(path / f"{name}-q"), *quick, *more])
            == 0
        )
    return path


def sample(folders, model, out, *more):
    return run_cli([
        "sample", str(folders / model), "-o", str(out), "-n", "5", "--batch-size", "2",
        "--device", "cpu", "--quiet", *more,
    ])  # fmt: skip


def test_settings_given_by_name_are_those_of_the_record(folders):
    record = json.loads((folders / "unet-q" / "run.json").read_text())

    assert record["status"] == "done"
    assert record["config"]["calib_samples"] == 3
    assert record["config"]["act_init"] == "step"
    assert {part["path"] for part in record["artefacts"]} == {f"unet/{WEIGHTS}"}
    assert not (folders / "unet-q.state").exists()


def test_a_quantized_pipeline_is_one_for_diffusers(folders):
    pipes = [
        diffusers.DiffusionPipeline.from_pretrained(folders / name) for name in ("pipe", "pipe-q")
    ]
    images = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        images.append(
            pipe(
                batch_size=2, num_inference_steps=3, output_type="np",
                generator=torch.Generator().manual_seed(0),
            ).images
        )  # fmt: skip

    assert type(pipes[1]) is diffusers.DDIMPipeline
    assert pipes[1].unet.is_quantized
    assert 0 < np.abs(images[0] - images[1]).mean() < 0.1
    assert mpq_dm.account(folders / "pipe-q").agrees


def test_samples_are_the_samplers_as_files_and_a_grid(folders, tmp_path, capsys):
    assert sample(folders, "unet-q", tmp_path / "out", "--labels", "0-9", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"count": 5, "steps": 3}

    out = tmp_path / "out"
    names = [f"{number:05d}.png" for number in range(5)]
    assert sorted(path.name for path in out.iterdir()) == [*names, "grid.png", "run.json"]
    source = open_source(folders / "unet-q", packed=True)
    sampler = LatentSampler(
        scheduler=source.scheduler, latent_shape=(1, 8, 8), steps=3, batch_size=2,
        labels=range(10),
    )  # fmt: skip
    expected = to_pixels(sampler.trajectory(source.model, 2))[0, :, :, 0]
    with Image.open(out / "00004.png") as image:
        np.testing.assert_array_equal(np.asarray(image), expected)
    assert sample(folders, "unet-q", out, "--labels", "0-9") == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "more"), [("unet", ("--labels", "0-9")), ("pipe", ())])
def test_samples_against_the_original_come_in_pairs(name, more, folders, tmp_path, capsys):
    out = tmp_path / "out"
    against = ("--against", str(folders / name), *more, "--json")
    assert sample(folders, f"{name}-q", out, *against) == 0
    found = json.loads(capsys.readouterr().out)

    assert found["ci_low"] <= found["paired_error"] <= found["ci_high"]
    assert 0 < found["paired_error"] < 1
    assert len(list(out.glob("?????.png"))) == len(list(out.glob("?????-original.png"))) == 5
    record = json.loads((out / "run.json").read_text())
    assert record["metrics"]["paired_error"]["value"] == found["paired_error"]


def test_samples_need_a_quantized_model(folders, tmp_path, capsys):
    assert sample(folders, "unet", tmp_path / "out", "--labels", "0-9") == 2
    assert "is not quantized by mpq-dm; run mpq-dm quantize first" in capsys.readouterr().err
    assert sample(folders, "unet-q", tmp_path / "out", "--labels", "0-9", "--mode", "fast") == 2
    assert "mode is 'fast'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_analysis_with_calibration_measures_outputs(folders, capsys):
    common = ["analyze", str(folders / "unet"), "--json", "--quiet"]
    found = []
    for more in ([], ["--calib", "--steps", "2", "--labels", "0-9"]):
        assert run_cli(common + more) == 0
        found.append(json.loads(capsys.readouterr().out))

    weights, outputs = found
    assert weights["layers"] == outputs["layers"]
    assert 0 <= outputs["gain_kurtosis"] <= outputs["gain_exact"] < 1
    assert outputs["gain_exact"] != weights["gain_exact"]
    assert run_cli([*common, "--calib"]) == 2
    assert "give --labels" in capsys.readouterr().err
