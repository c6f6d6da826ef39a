# SPDX-License-Identifier: Apache-2.0
"""MPQ-DM from end to end: calibrate, allocate, fine-tune, pack."""

import copy
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tenfold_core.errors import ConfigError
from tenfold_core.quant.activations import TimestepContext
from tenfold_core.quant.affine import fake_quant, max_code
from tenfold_core.quant.state import replace_module
from tenfold_core.run.seeds import torch_generator
from torch import Tensor, nn

from mpq_dm.adaround import learn_rounding
from mpq_dm.calibration import Calibration, Progress, calibrate, check_model
from mpq_dm.checkpoint import Checkpoints
from mpq_dm.config import MPQDMConfig
from mpq_dm.finetune import FineTuner, TrajectoryLoss
from mpq_dm.layers import QuantLayer
from mpq_dm.operators import LINEAR
from mpq_dm.sampler import LatentSampler, PipelineSampler, Sampler, called_timesteps, every_call
from mpq_dm.summary import QuantReport, describe
from mpq_dm.temb_cache import cache_timestep

__all__ = ["Progress", "QuantResult", "make_sampler", "make_student", "quantize"]


@dataclass(frozen=True, kw_only=True)
class QuantResult:
    """A packed model, ready for `save_pretrained`, and what it cost.

    Attributes:
        model: the packed denoiser.
        report: layers, bits, errors, losses, sizes.
        pipe: the pipeline with the packed denoiser, if a pipeline was given.
    """

    model: Any
    report: QuantReport
    pipe: Any = None


def quantize(
    pipe_or_model: Any,
    config: MPQDMConfig | None = None,
    *,
    scheduler: Any = None,
    conditions: Mapping[str, Any] | None = None,
    labels: Sequence[int] | None = None,
    sampler: Sampler | None = None,
    checkpoint_dir: str | Path | None = None,
    resume_from: str | Path | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> QuantResult:
    """Quantize a diffusion model; the model given stays as it is.

    Args:
        pipe_or_model: a diffusers pipeline, or its denoiser, in float32.
        config: bits, method and cost; by default the paper's settings.
        scheduler: the scheduler, with a bare denoiser.
        conditions: what trajectories are conditioned on, see `make_sampler`.
        labels: class labels to draw from.
        sampler: takes the place of the three above.
        checkpoint_dir: where the state of fine-tuning is kept, so that it can be resumed.
        resume_from: such a folder; its calibration and state are taken up.
        calibration: plans of the same model and bits, made by `calibrate` or `plan_layers`; taken
            in place of calibrating.
        progress: called with what is being done, how much of it, of how much.

    Raises:
        ConfigError: settings, sampler and model do not fit each other.
        InputError: the model cannot be quantized as it is.
        CheckpointError: `resume_from` belongs to another model or other settings.
        DivergedError: the loss became infinite; the last good state is in `checkpoint_dir`.
    """
    config = config or MPQDMConfig()
    started = time.perf_counter()
    if sampler is None:
        sampler = make_sampler(
            pipe_or_model, config, scheduler=scheduler, conditions=conditions, labels=labels
        )
    model, pipe = _denoiser(pipe_or_model)
    check_model(model)
    timesteps = called_timesteps(model, sampler)
    if config.cache_temb:
        model = cache_timestep(model, sampler, timesteps)
    folder = resume_from or checkpoint_dir
    checkpoints = Checkpoints(folder, config, model, timesteps, sampler) if folder else None
    found = checkpoints.load_calibration() if checkpoints and resume_from else calibration
    if found is None:
        found = calibrate(model, sampler, timesteps, config, progress)
        if checkpoints:
            checkpoints.save_calibration(found)
    student, layers = make_student(model, found, timesteps, config)
    losses = _finetune(
        model, student, layers, sampler, config,
        checkpoints=checkpoints, resume=resume_from is not None, progress=progress,
    )  # fmt: skip
    if config.rounding == "adaround":
        learned = learn_rounding(model, student, layers, sampler, timesteps, config, progress)
        for name, codes in learned.items():
            layers[name].codes = codes
    packed = pack(student, layers, found, timesteps, config, sampler)
    seconds = time.perf_counter() - started
    report = describe(model, packed, found, config, timesteps, losses, seconds=seconds)
    return QuantResult(model=packed, report=report, pipe=_with_denoiser(pipe, packed))


def make_sampler(
    pipe_or_model: Any,
    config: MPQDMConfig,
    *,
    scheduler: Any = None,
    conditions: Mapping[str, Any] | None = None,
    labels: Sequence[int] | None = None,
    negative: Mapping[str, Any] | None = None,
) -> Sampler:
    """Return the sampler for a pipeline, or for a bare denoiser and a scheduler.

    Args:
        pipe_or_model: a diffusers pipeline, or its denoiser.
        config: steps, guidance, batch size and seed.
        scheduler: with a bare denoiser, its scheduler.
        conditions: lists or tensors by name, one entry per condition: arguments of the pipeline's
            call (`prompt`, `prompt_embeds`, ...) or of the denoiser (`encoder_hidden_states`, ...).
        labels: class labels to draw from: `class_labels` of either.
        negative: with a bare denoiser and guidance, its arguments without a condition.

    Raises:
        ConfigError: a bare denoiser without a scheduler, or of unknown input size.
    """
    settings: dict[str, Any] = {
        "steps": config.steps, "batch_size": config.batch_size, "seed": config.seed,
        "guidance": config.guidance, "eta": config.eta, "conditions": dict(conditions or {}),
    }  # fmt: skip
    if not isinstance(pipe_or_model, nn.Module):
        if labels is not None:
            settings["conditions"]["class_labels"] = list(labels)
        return PipelineSampler(pipe=pipe_or_model, **settings)
    if scheduler is None:
        raise ConfigError("a denoiser without its pipeline needs a scheduler; give scheduler=")
    return LatentSampler(
        scheduler=scheduler, latent_shape=_latent_shape(pipe_or_model), labels=labels,
        negative=dict(negative or {}), **settings,
    )  # fmt: skip


def make_student(
    model: nn.Module, found: Calibration, timesteps: Sequence[float], config: MPQDMConfig
) -> tuple[nn.Module, dict[str, QuantLayer]]:
    """Return a copy of the model that computes with rounded weights and inputs, and its layers."""
    device = next(model.parameters()).device
    student = copy.deepcopy(model).eval().requires_grad_(False)
    context = TimestepContext(timesteps).to(device)
    layers: dict[str, QuantLayer] = {}
    for name, plan in found.plans.items():
        module = student.get_submodule(name)
        body = plan.role == "body"
        stream = torch_generator(config.seed, f"lora/{name}", str(device))
        rank = config.rank if body and config.trajectories and _takes_lora(module) else 0
        layer = QuantLayer(module, plan, context, rank=rank, generator=stream).to(device)
        if config.lora_init == "svd-residual":
            layer.start_from_residual_()
        layer.requires_grad_(body)
        layer.module.requires_grad_(False)
        if not body:
            layer.fix_()  # never trained: rounded once
        replace_module(student, name, layer)
        layers[name] = layer
    for name in found.halves:
        weight: Any = student.get_submodule(name).weight
        weight.data = weight.data.half().float()
    context.attach(student)
    return student, layers


def pack(
    student: nn.Module,
    layers: Mapping[str, QuantLayer],
    found: Calibration,
    timesteps: Sequence[float],
    config: MPQDMConfig,
    sampler: Sampler,
) -> Any:
    """Turn a student's layers into packed ones, in place, and verify them.

    Raises:
        RuntimeError: a packed weight is not the rounded one; a defect of this package.
    """
    from mpq_dm.plugin import attach_packed

    finished = {}
    for name, trained in layers.items():
        plan, codes = trained.finish()
        finished[name] = (plan, codes, _rounded(trained, plan))
        replace_module(student, name, trained.module)
    for hooks in (student._forward_pre_hooks, student._forward_pre_hooks_with_kwargs):
        hooks.clear()  # the student's own context; the packed model gets another
    scheduler = getattr(sampler, "scheduler", None) or getattr(
        getattr(sampler, "pipe", None), "scheduler", None
    )
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    attach_packed(
        student,
        {name: (plan, codes) for name, (plan, codes, _) in finished.items()},
        timesteps=timesteps,
        weight_bits=config.weight_bits,
        act_bits=config.act_bits,
        prediction_type=kind,
        halves=found.halves,
    )
    for name, (_, _, expected) in finished.items():
        layer: Any = student.get_submodule(name)
        if not torch.equal(layer.quantized_rows(), expected):
            raise RuntimeError(f"layer {name!r}: the packed weight is not the rounded one")
    return student


def _rounded(layer: QuantLayer, plan: Any) -> Tensor:
    if layer.codes is not None:
        return layer.quantized_rows()
    rows = layer.smoothed_rows().detach()
    most = max_code(plan.bits.to(rows.device))
    return fake_quant(rows.flatten(1), plan.scale, plan.zero, most).view_as(rows)


def _finetune(
    model: nn.Module,
    student: nn.Module,
    layers: Mapping[str, QuantLayer],
    sampler: Sampler,
    config: MPQDMConfig,
    *,
    checkpoints: Checkpoints | None,
    resume: bool,
    progress: Progress | None,
) -> list[TrajectoryLoss]:
    body = {name: layer for name, layer in layers.items() if layer.plan.role == "body"}
    losses: list[TrajectoryLoss] = []
    if not config.trajectories or not body:
        return losses
    num_calls = len(every_call(model, sampler))
    tuner = FineTuner(model, student, body, sampler, config, num_calls)
    if checkpoints and resume:
        losses += checkpoints.load_training_(tuner)

    def told(loss: TrajectoryLoss) -> None:
        losses.append(loss)
        if progress:
            progress("fine-tuning trajectories", tuner.done, config.trajectories)

    def save(state: Any) -> None:
        if checkpoints:
            checkpoints.save_training(state, losses)

    tuner.run(on_trajectory=told, save=save)
    return losses


def _takes_lora(module: nn.Module) -> bool:
    return isinstance(module, LINEAR) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _denoiser(pipe_or_model: Any) -> tuple[nn.Module, Any]:
    if isinstance(pipe_or_model, nn.Module):
        model, pipe = pipe_or_model, None
    else:
        for name in ("transformer", "unet"):
            if isinstance(getattr(pipe_or_model, name, None), nn.Module):
                model, pipe = getattr(pipe_or_model, name), pipe_or_model
                break
        else:
            raise ConfigError(
                f"{type(pipe_or_model).__name__} has neither transformer nor unet, expected a "
                "diffusion pipeline or its denoiser"
            )
    odd = {part.dtype for part in model.parameters()} - {torch.float32}
    if odd:
        raise ConfigError(
            f"{type(model).__name__}: weights in {odd.pop()}, expected float32; load it with "
            "dtype=torch.float32"
        )
    return model.eval(), pipe


def _with_denoiser(pipe: Any, model: Any) -> Any:
    if pipe is None:
        return None
    name = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    accepted = inspect.signature(type(pipe).__init__).parameters
    settings = {key: value for key, value in pipe.config.items() if key in accepted}
    return type(pipe)(**settings | {**pipe.components, name: model})


def _latent_shape(model: Any) -> tuple[int, ...]:
    config = getattr(model, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise ConfigError(
            f"{type(model).__name__} does not say its input size; give "
            "sampler=LatentSampler(latent_shape=...)"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width
