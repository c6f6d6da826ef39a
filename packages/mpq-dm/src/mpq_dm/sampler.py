# SPDX-License-Identifier: Apache-2.0
"""Sampling trajectories of a denoiser: whoever wants to follow one hooks the denoiser itself.

A sampler knows the conditions, the scheduler and the guidance, and turns a number into a batch of
images: the same number gives the same noise and the same conditions whatever denoiser is used, so
two denoisers can be compared image by image. `LatentSampler` runs a bare denoiser and a scheduler;
`PipelineSampler` lets a diffusers pipeline do it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.run.seeds import generator, torch_generator
from torch import Tensor, nn

__all__ = [
    "LatentSampler",
    "PipelineSampler",
    "Sampler",
    "called_timesteps",
    "every_call",
    "first_tensor",
    "following",
]


_CONDITIONS_FIRST = ("DiTPipeline", "LuminaPipeline")  # others put the unconditional half first


@runtime_checkable
class Sampler(Protocol):
    """What calibration, fine-tuning and evaluation ask of a sampler."""

    @property
    def batch_size(self) -> int:
        """Images of a trajectory."""
        ...

    def trajectory(self, model: nn.Module, number: int) -> Float[Tensor, "batch ..."]:
        """Return the images (or latents) of trajectory `number`."""
        ...

    def guide(self, output: Tensor, sample: Tensor) -> Tensor:
        """Return the guided noise prediction of one call, from the denoiser's raw output."""
        ...


@dataclass(frozen=True, kw_only=True)
class LatentSampler:
    """A denoiser, a scheduler, and conditions drawn for every trajectory.

    Attributes:
        scheduler: a diffusers scheduler; it is copied for every trajectory.
        latent_shape: shape of one sample, for example (4, 32, 32).
        steps: sampling steps.
        batch_size: images of a trajectory.
        seed: seed of noises and conditions.
        labels: class labels to draw from, if the denoiser takes `class_labels`.
        conditions: further arguments of the denoiser, one entry per condition on the first axis;
            rows are drawn, the same for all of them.
        shared: arguments that are the same for all samples.
        negative: the unconditional side of guidance: arguments of one sample, by name.
        guidance: scale of classifier-free guidance; 1 for none.
        eta: noise of a DDIM scheduler.
        timestep_scale: what the scheduler's timesteps are multiplied by (Flux: 1/1000).
    """

    scheduler: Any
    latent_shape: tuple[int, ...]
    steps: int
    batch_size: int = 4
    seed: int = 0
    labels: Sequence[int] | None = None
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    negative: Mapping[str, Tensor] = field(default_factory=dict)
    guidance: float = 1.0
    eta: float = 0.0
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance != 1 and not self.negative:
            raise ConfigError(
                f"guidance is {self.guidance}, but no unconditional arguments are known; "
                "give negative={'class_labels': ...} or guidance=1"
            )
        lengths = {name: len(value) for name, value in self.conditions.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"conditions: {lengths} entries, expected as many of each")
        drawn = [*self.conditions, *(["class_labels"] if self.labels is not None else [])]
        missing = [name for name in drawn if self.guidance != 1 and name not in self.negative]
        if missing:
            raise ConfigError(f"negative has no {missing[0]!r}, expected one for each condition")
        if getattr(self.scheduler.config, "use_dynamic_shifting", False):
            raise ConfigError(
                f"{type(self.scheduler).__name__} shifts its timesteps by the image size, which "
                "only its pipeline knows; give the pipeline, or use_dynamic_shifting=False"
            )

    def arguments(self, number: int) -> dict[str, Any]:
        """Return the conditions of trajectory `number`, the unconditional half first."""
        rng = generator(self.seed, f"conditions/{number}")
        chosen: dict[str, Tensor] = {}
        if self.labels is not None:
            drawn = rng.choice(torch.as_tensor(self.labels).numpy(), self.batch_size)
            chosen["class_labels"] = torch.from_numpy(drawn).long()
        if self.conditions:
            count = len(next(iter(self.conditions.values())))
            rows = torch.from_numpy(rng.integers(0, count, self.batch_size))
            chosen |= {name: value[rows] for name, value in self.conditions.items()}
        if self.guidance != 1:
            for name, value in chosen.items():
                other = torch.as_tensor(self.negative[name], dtype=value.dtype)
                chosen[name] = torch.cat((other.expand_as(value), value))
        return {**chosen, **self.shared}

    def timesteps(self) -> list[float]:
        """Return what the denoiser is called with, in order."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(self.steps)
        return (scheduler.timesteps.float() * self.timestep_scale).tolist()

    def noise(self, number: int) -> Float[Tensor, "batch ..."]:
        """Return the starting noise of trajectory `number`, before the scheduler's scale."""
        stream = torch_generator(self.seed, f"noise/{number}")
        return torch.randn(self.batch_size, *self.latent_shape, generator=stream)

    @torch.no_grad()
    def trajectory(self, model: nn.Module, number: int) -> Float[Tensor, "batch ..."]:
        """Return the samples of trajectory `number`, on the model's device."""
        device = next(model.parameters()).device
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(self.steps, device=device)
        extra = _step_arguments(scheduler, self.eta, self.seed, number)
        arguments = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.arguments(number).items()
        }
        x = self.noise(number).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
        for timestep in scheduler.timesteps:
            inputs = torch.cat((x, x)) if self.guidance != 1 else x
            if hasattr(scheduler, "scale_model_input"):
                inputs = scheduler.scale_model_input(inputs, timestep)
            called = (timestep * self.timestep_scale).expand(len(inputs))
            output = model(inputs, timestep=called, **arguments, return_dict=False)
            found = first_tensor(output)
            guided = self.guide(found, inputs)
            if _learns_variance(scheduler):  # of the conditional half, the last one
                guided = torch.cat((guided, found[-len(x) :, x.shape[1] :]), dim=1)
            x = scheduler.step(guided, timestep, x, **extra, return_dict=False)[0]
        return x

    def guide(self, output: Tensor, sample: Tensor) -> Tensor:
        """Return `u + guidance (c - u)` of the two halves; a predicted variance is dropped."""
        output = _without_variance(output, sample)
        if self.guidance == 1:
            return output
        free, conditional = output.chunk(2)
        return free + self.guidance * (conditional - free)


@dataclass(frozen=True, kw_only=True)
class PipelineSampler:
    """A diffusers pipeline, called with conditions drawn for every trajectory.

    Attributes:
        pipe: the pipeline; its denoiser is exchanged while a trajectory runs.
        steps: sampling steps.
        batch_size: images of a trajectory.
        seed: seed of noises and conditions.
        conditions: arguments of the pipeline's call, lists or tensors with one entry per condition;
            rows are drawn, the same for all of them.
        shared: arguments that are the same for all samples.
        guidance: scale of classifier-free guidance, passed as `guidance_scale`; 1 for none.
        eta: noise of a DDIM scheduler.
        output_type: what the pipeline returns: `latent`, `pt` or `np`.
    """

    pipe: Any
    steps: int
    batch_size: int = 4
    seed: int = 0
    conditions: Mapping[str, Sequence[Any] | Tensor] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    guidance: float = 1.0
    eta: float = 0.0
    output_type: str = "latent"

    def __post_init__(self) -> None:
        lengths = {name: len(value) for name, value in self.conditions.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"conditions: {lengths} entries, expected as many of each")

    @property
    def component(self) -> str:
        """Name of the pipeline's denoiser."""
        for name in ("transformer", "unet"):
            if getattr(self.pipe, name, None) is not None:
                return name
        raise ConfigError(f"{type(self.pipe).__name__} has neither transformer nor unet")

    def arguments(self, number: int) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for trajectory `number`."""
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        found: dict[str, Any] = dict(self.shared)
        if self.conditions:
            rng = generator(self.seed, f"conditions/{number}")
            count = len(next(iter(self.conditions.values())))
            rows = rng.integers(0, count, self.batch_size).tolist()
            for name, value in self.conditions.items():
                taken = [value[row] for row in rows]
                found[name] = torch.stack(taken) if isinstance(value, Tensor) else taken
        elif "batch_size" in accepted:
            found["batch_size"] = self.batch_size
        else:
            found.setdefault("num_images_per_prompt", self.batch_size)
        settings = {
            "guidance_scale": self.guidance, "eta": self.eta, "output_type": self.output_type,
        }  # fmt: skip
        found |= {name: value for name, value in settings.items() if name in accepted}
        # noise is drawn on the CPU, so that it is the same on every device
        stream = torch_generator(self.seed, f"noise/{number}")
        return found | {"generator": stream, "num_inference_steps": self.steps}

    @torch.no_grad()
    def trajectory(self, model: nn.Module, number: int) -> Float[Tensor, "batch ..."]:
        """Return what the pipeline makes of trajectory `number` with this denoiser."""
        name = self.component
        own = getattr(self.pipe, name)
        self.pipe.set_progress_bar_config(disable=True)
        setattr(self.pipe, name, model)
        try:
            images = self.pipe(**self.arguments(number)).images
        finally:
            setattr(self.pipe, name, own)
        if isinstance(images, Tensor):
            return images
        return torch.from_numpy(images).movedim(-1, 1)

    def guide(self, output: Tensor, sample: Tensor) -> Tensor:
        """Return the guided prediction if the pipeline doubled the batch, else the prediction."""
        output = _without_variance(output, sample)
        if len(output) == 2 * self.batch_size:
            free, conditional = output.chunk(2)
            if type(self.pipe).__name__ in _CONDITIONS_FIRST:
                free, conditional = conditional, free
            return free + self.guidance * (conditional - free)
        embedded = getattr(getattr(self.pipe, self.component).config, "guidance_embeds", False)
        if len(output) == self.batch_size and (self.guidance == 1 or embedded):
            return output
        raise ConfigError(
            f"{type(self.pipe).__name__}: a batch of {len(output)} for {self.batch_size} images at "
            f"guidance {self.guidance}; only guidance by a doubled batch or an embedded scale is "
            "understood, use guidance=1"
        )


def called_timesteps(model: nn.Module, sampler: Sampler) -> list[float]:
    """Return the timesteps that one trajectory calls the denoiser with, each once, in order.

    Raises:
        ConfigError: they neither rise nor fall throughout, so no order of steps exists.
    """
    found = list(dict.fromkeys(every_call(model, sampler)))
    steps = [later - earlier for earlier, later in pairwise(found)]
    if steps and not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise ConfigError(f"timesteps of the sampler are {found}, expected rising or falling ones")
    return found


def every_call(model: nn.Module, sampler: Sampler) -> list[float]:
    """Return the timestep of every call of one trajectory; some schedulers repeat timesteps."""
    if isinstance(sampler, LatentSampler):
        return sampler.timesteps()
    calls: list[float] = []

    def follow(call: inspect.BoundArguments, _: Any) -> None:
        timestep = torch.as_tensor(call.arguments["timestep"])
        calls.append(float(timestep.reshape(-1)[0]))

    with following(model, follow):
        sampler.trajectory(model, 0)
    return calls


@contextmanager
def following(
    model: nn.Module, on_call: Callable[[inspect.BoundArguments, Any], None]
) -> Iterator[None]:
    """Call `on_call(arguments, output)` after every call of the denoiser.

    Raises:
        ConfigError: the model takes no timestep.
    """
    signature = inspect.signature(model.forward)
    if "timestep" not in signature.parameters:
        raise ConfigError(
            f"{type(model).__name__} takes no timestep, expected the denoiser of a diffusion model"
        )

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        on_call(signature.bind(*args, **kwargs), output)

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def first_tensor(output: Any) -> Tensor:
    """Return the prediction in a denoiser's output: a tensor, a tuple, or an output class."""
    return output if isinstance(output, Tensor) else output[0]


def _learns_variance(scheduler: Any) -> bool:
    return getattr(scheduler.config, "variance_type", None) in ("learned", "learned_range")


def _without_variance(output: Tensor, sample: Tensor) -> Tensor:
    channels = sample.shape[1]
    learned = output.dim() == 4 and output.shape[1] == 2 * channels
    return output[:, :channels] if learned else output


def _step_arguments(scheduler: Any, eta: float, seed: int, number: int) -> dict[str, Any]:
    """Return what this scheduler's step takes of eta and a generator."""
    accepted = inspect.signature(scheduler.step).parameters
    found: dict[str, Any] = {}
    if "eta" in accepted:
        found["eta"] = eta
    if "generator" in accepted:
        found["generator"] = torch_generator(seed, f"steps/{number}")
    return found
