# SPDX-License-Identifier: Apache-2.0
"""Six families of denoisers, tiny and random: packed, saved, loaded and sampled, bit for bit."""

import json

import pytest
import torch
from mpq_dm.packed import MODES, packed_layers, set_mode
from mpq_dm.plugin import load
from mpq_dm.roles import find_layers
from mpq_dm.sizes import account

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
GRID = [900.0, 600.0, 300.0]
TOKENS, WIDTH, POOLED = 5, 12, 10


def unet():
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def conditional_unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), attention_head_dim=4, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip


def pixart():
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        sample_size=128, patch_size=2, cross_attention_dim=24, caption_channels=WIDTH,
    )  # fmt: skip


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
        caption_projection_dim=16, pooled_projection_dim=POOLED, pos_embed_max_size=16,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip


def flux():
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=POOLED,
        guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


FAMILIES = {
    "unet": unet, "conditional unet": conditional_unet, "dit": dit, "pixart": pixart, "sd3": sd3,
    "flux": flux,
}  # fmt: skip


def made(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[family]().eval()


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def inputs(family, batch=2):
    """What one call of a family takes, beside the timestep."""
    text, pooled = drawn(batch, TOKENS, WIDTH), drawn(batch, POOLED)
    image = drawn(batch, 4, 8, 8)
    if family == "unet":
        return {"sample": drawn(batch, 3, 8, 8)}
    if family == "conditional unet":
        return {"sample": image, "encoder_hidden_states": text}
    if family == "dit":
        return {"hidden_states": image, "class_labels": torch.arange(batch)}
    if family == "pixart":
        sizes = torch.tensor([[8.0, 8.0]]).expand(batch, 2)
        extra = {"resolution": sizes, "aspect_ratio": sizes[:, :1]}
        return {
            "hidden_states": image, "encoder_hidden_states": text, "added_cond_kwargs": extra,
        }  # fmt: skip
    if family == "sd3":
        return {
            "hidden_states": image, "encoder_hidden_states": text, "pooled_projections": pooled,
        }  # fmt: skip
    return {
        "hidden_states": drawn(batch, 16, 16), "encoder_hidden_states": text,
        "pooled_projections": pooled, "guidance": torch.full((batch,), 3.5),
        "img_ids": torch.cartesian_prod(*[torch.arange(n) for n in (1, 4, 4)]).float(),
        "txt_ids": torch.zeros(TOKENS, 3),
    }  # fmt: skip


def output(model, family, timestep):
    with torch.no_grad():
        return model(**inputs(family), timestep=timestep).sample


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_bits_after_its_file(family, pack, tmp_path):
    grid = [step / 1000 for step in GRID] if family == "flux" else GRID
    model = made(family)
    layers = {layer.name for layer in find_layers(model)[0]}
    steps = torch.tensor([grid[0], grid[2]])  # each sample at its own
    plain = output(model, family, steps)
    pack(model, grid)
    assert {name for name, _ in packed_layers(model)} == layers
    model.save_pretrained(tmp_path / "first")
    for mode in MODES:
        set_mode(model, mode)
        loaded = load(tmp_path / "first", mode=mode)
        found = output(loaded, family, steps)
        assert torch.equal(found, output(model, family, steps))
        assert found.isfinite().all()
        assert found.shape == plain.shape
        assert found.std() > 0
    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("first", "second"))
    assert first == second
    assert account(tmp_path / "first").agrees


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_a_batch_do_not_meet(family, pack):
    grid = [step / 1000 for step in GRID] if family == "flux" else GRID
    model = pack(made(family), grid)
    mixed = output(model, family, torch.tensor([grid[0], grid[2]]))
    alone = [output(model, family, torch.tensor([step] * 2)) for step in (grid[0], grid[2])]
    expected = torch.stack((alone[0][0], alone[1][1]))
    # floats between the layers may round otherwise by batch, and move a code
    assert (mixed - expected).abs().mean() < 0.05 * expected.abs().mean()


# --- pipelines ----------------------------------------------------------------------------------


def vae():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return diffusers.AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=2, latent_channels=4, layers_per_block=1
        ).eval()


def ddim():
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler()


def texts(*names):
    return dict.fromkeys(names)


def pipeline(kind):
    """Return a tiny pipeline and what a call takes; texts come as embeddings."""
    text = {"prompt_embeds": drawn(1, TOKENS, WIDTH)}
    if kind == "DDIM":
        return diffusers.DDIMPipeline(made("unet"), ddim()), {"output_type": "np"}
    if kind == "DDPM":
        pipe = diffusers.DDPMPipeline(made("unet"), diffusers.DDPMScheduler(clip_sample=False))
        return pipe, {"output_type": "np"}
    if kind != "DiT":
        pytest.importorskip("transformers")
    if kind == "StableDiffusion":
        pipe = diffusers.StableDiffusionPipeline(
            vae(), None, None, made("conditional unet"), ddim(), None, None,
            requires_safety_checker=False,
        )  # fmt: skip
        negative = {"negative_prompt_embeds": drawn(1, TOKENS, WIDTH) - 1}
        return pipe, {"output_type": "latent", "height": 8, "width": 8, **text, **negative}
    if kind == "DiT":
        pipe = diffusers.DiTPipeline(made("dit"), vae(), ddim())
        return pipe, {"output_type": "np", "class_labels": [1, 2], "guidance_scale": 2.0}
    if kind == "PixArtAlpha":
        pipe = diffusers.PixArtAlphaPipeline(None, None, vae(), made("pixart"), ddim())
        masks = {"prompt_attention_mask": torch.ones(1, TOKENS)}
        return pipe, {
            "output_type": "latent", "height": 8, "width": 8, "guidance_scale": 1.0,
            "use_resolution_binning": False, "negative_prompt": None, **text, **masks,
        }  # fmt: skip
    text["pooled_prompt_embeds"] = drawn(1, POOLED)
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    if kind == "StableDiffusion3":
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=made("sd3"), scheduler=flow(), vae=vae(),
            **texts(*names, "text_encoder_3", "tokenizer_3"),
        )  # fmt: skip
        return pipe, {
            "output_type": "latent", "height": 8, "width": 8, "guidance_scale": 1.0, **text,
        }  # fmt: skip
    pipe = diffusers.FluxPipeline(
        transformer=made("flux"), scheduler=flow(), vae=vae(), **texts(*names)
    )
    return pipe, {"output_type": "latent", "height": 8, "width": 8, **text}


def denoiser(pipe):
    return pipe.unet if "unet" in pipe.components else pipe.transformer


def images(pipe, call):
    pipe.set_progress_bar_config(disable=True)
    found = pipe(generator=torch.Generator().manual_seed(3), num_inference_steps=2, **call)
    return torch.as_tensor(found.images)


def timesteps(pipe, call):
    """The timesteps that the pipeline calls its denoiser with, in order."""
    seen = []

    def note(_, args, kwargs):
        value = args[1] if len(args) > 1 else kwargs["timestep"]
        seen.append(float(torch.as_tensor(value).flatten()[0]))

    handle = denoiser(pipe).register_forward_pre_hook(note, with_kwargs=True)
    images(pipe, call)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    "kind",
    ["DDIM", "DDPM", "StableDiffusion", "DiT", "PixArtAlpha", "StableDiffusion3", "Flux"],
)
def test_a_pipeline_samples_the_same_after_its_files(kind, pack, tmp_path):
    pipe, call = pipeline(kind)
    steps = timesteps(pipe, call)
    assert len(steps) == 2
    pack(denoiser(pipe), steps)
    expected = images(pipe, call)
    assert expected.isfinite().all()
    pipe.save_pretrained(tmp_path / "first")
    missing = {name: None for name, part in pipe.components.items() if part is None}
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "first", **missing)
    assert type(loaded) is type(pipe)
    assert torch.equal(images(loaded, call), expected)
    loaded.save_pretrained(tmp_path / "second")
    first, second = (packed_folder(tmp_path / name) for name in ("first", "second"))
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def packed_folder(path):
    return next(
        place.parent
        for place in path.glob("*/config.json")
        if "quantization_config" in place.read_text()
    )
