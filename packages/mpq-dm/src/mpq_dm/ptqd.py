# SPDX-License-Identifier: Apache-2.0
"""PTQD: take what quantization adds to the noise prediction out of the sampler again.

PTQD (He et al., NeurIPS 2023, arXiv 2305.10657) splits the error at each sampling step into a part
linear in the prediction, a bias, and a residual:

    eps_q = (1 + k_t) eps + b_t + r_t,    E[r_t] = 0, r_t uncorrelated with eps

The correction (section 4.2) divides by `1 + k_t` after the bias is subtracted, so that
`(eps_q - b_t) / (1 + k_t) = eps + r_t / (1 + k_t)`. The residual acts as noise of the sampler; its
variance is subtracted from what the sampler adds (section 4.3):

    sigma'_t^2 = max(0, sigma_t^2 - c_t^2 Var[r_t] / (1 + k_t)^2),  c_t = d x_{t-1} / d eps

The bias has one value per channel, as in the paper; k is the slope of the regression of the error
on eps within channels, so that neither takes from the other. Guidance combines two predictions by
weights of sum 1, hence the correction of both is the correction of what is guided.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant.activations import TimestepContext
from torch import Tensor, nn

from mpq_dm.config import MPQDMConfig
from mpq_dm.sampler import LatentSampler, PipelineSampler, Sampler, first_tensor, following

__all__ = ["CorrectedSampler", "NoiseCorrection", "fit_correction"]

_PROBE = 1e-4  # small enough that no scheduler clips the sample it predicts from it


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseCorrection:
    """What quantization does to the noise prediction at each sampling step.

    Attributes:
        timesteps: what the sampler called the model with.
        slope: k, the part of the error that is linear in the prediction.
        bias: b, by channel.
        variance: of the residual, after the division by `1 + k`.
        explained: share of the mean squared error that slope and bias remove.
    """

    timesteps: tuple[float, ...]
    slope: Float[Tensor, " steps"]
    bias: Float[Tensor, "steps channels"]
    variance: Float[Tensor, " steps"]
    explained: Float[Tensor, " steps"]


@torch.no_grad()
def fit_correction(
    teacher: nn.Module,
    student: nn.Module,
    sampler: Sampler,
    timesteps: Sequence[float],
    config: MPQDMConfig,
) -> NoiseCorrection:
    """Compare the predictions of two models along the teacher's calibration trajectories.

    Args:
        teacher: the full-precision model.
        student: the quantized model.
        sampler: gives the calibration trajectories, its first ones.
        timesteps: what the sampler calls the model with, in order.
        config: `calib_samples`.

    Raises:
        InputError: a prediction is not finite, or does not vary at all at some step.
    """
    context = TimestepContext(timesteps).to(next(teacher.parameters()).device)
    moments = [_Moments() for _ in timesteps]

    def on_call(call: inspect.BoundArguments, output: Any) -> None:
        sample = call.args[0]
        exact = sampler.guide(first_tensor(output), sample)
        found = sampler.guide(first_tensor(student(*call.args, **call.kwargs)), sample)
        steps = context.index.to(exact.device)
        for step in steps.unique().tolist():
            own = slice(None) if len(steps) != len(exact) else steps == step
            moments[step].add_(exact[own], found[own] - exact[own])

    handle = context.attach(teacher)
    try:
        with following(teacher, on_call):
            for number in range(math.ceil(config.calib_samples / sampler.batch_size)):
                sampler.trajectory(teacher, number)
    finally:
        handle.remove()
    parts = [moment.fit(timestep) for moment, timestep in zip(moments, timesteps, strict=True)]
    slope, bias, variance, explained = (torch.stack(part) for part in zip(*parts, strict=True))
    return NoiseCorrection(
        timesteps=tuple(float(step) for step in timesteps),
        slope=slope, bias=bias, variance=variance, explained=explained,
    )  # fmt: skip


class _Moments:
    """Sums by channel, in float64: of eps, of the error, of their squares and product."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None

    def add_(self, exact: Tensor, error: Tensor) -> None:
        eps, lost = (
            part.double().movedim(_axis(part), 0).flatten(1).cpu() for part in (exact, error)
        )
        parts = (eps, lost, eps * eps, eps * lost, lost * lost)
        sums = torch.stack([part.sum(1) for part in parts])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += eps.shape[1]

    def fit(self, timestep: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.sums is None or not bool(self.sums.isfinite().all()):
            found = "no" if self.sums is None else "not a finite"
            raise InputError(f"timestep {timestep:g}: {found} prediction, expected finite ones")
        mean, lost, square, product, energy = self.sums / self.count
        spread = float((square - mean.square()).sum())
        if spread <= 0:
            raise InputError(f"timestep {timestep:g}: the prediction does not vary over samples")
        slope = (product - mean * lost).sum() / spread
        if slope <= -1:
            raise InputError(
                f"timestep {timestep:g}: k is {float(slope):.3g}, expected more than -1; the "
                "quantized prediction has nothing in common with the exact one, raise the bits"
            )
        bias = lost - slope * mean
        residual = (energy - lost.square()).mean() - slope.square() * spread / len(mean)
        residual = residual.clamp(min=0)
        explained = 1 - residual / energy.mean().clamp(min=1e-300)
        values = (slope, bias, residual / (1 + slope).square(), explained)
        return tuple(value.float() for value in values)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class CorrectedSampler:
    """A sampler whose denoiser is corrected, and whose noise makes room for the residual's.

    The variance is taken from schedulers that let their noise be given (DDIM with eta above 0);
    for others only slope and bias are corrected.

    Attributes:
        sampler: what draws noises and conditions and runs the scheduler.
        correction: of the denoiser that will be sampled from.
    """

    sampler: LatentSampler | PipelineSampler
    correction: NoiseCorrection

    @property
    def batch_size(self) -> int:
        """Images of a trajectory."""
        return self.sampler.batch_size

    @torch.no_grad()
    def trajectory(self, model: nn.Module, number: int) -> Float[Tensor, "batch ..."]:
        """Return the images (or latents) of trajectory `number`, corrected."""
        with _corrected(model, self.correction):
            if isinstance(self.sampler, LatentSampler):
                scheduler = _with_less_noise(self.sampler.scheduler, self.correction)
                return replace(self.sampler, scheduler=scheduler).trajectory(model, number)
            pipe = self.sampler.pipe
            own = pipe.scheduler
            pipe.scheduler = _with_less_noise(own, self.correction)
            try:
                return self.sampler.trajectory(model, number)
            finally:
                pipe.scheduler = own

    def guide(self, output: Tensor, sample: Tensor) -> Tensor:
        """Return the guided noise prediction of one call, from the denoiser's output."""
        return self.sampler.guide(output, sample)


@contextmanager
def _corrected(model: nn.Module, correction: NoiseCorrection) -> Iterator[None]:
    """Let the model return `(eps_q - b) / (1 + k)` at the step of its call."""
    device = next(model.parameters()).device
    context = TimestepContext(correction.timesteps).to(device)
    slope, bias = correction.slope.to(device), correction.bias.to(device)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        predicted = first_tensor(output)
        eps = predicted.movedim(_axis(predicted), 1)
        spread = [1] * (eps.dim() - 2)
        factor = 1 + context.interpolate(slope).view(-1, 1, *spread)
        shift = torch.stack([context.interpolate(part) for part in bias.T], dim=1)
        # a predicted variance, the second half of the channels, stays as it is
        noise, rest = eps[:, : bias.shape[1]], eps[:, bias.shape[1] :]
        noise = (noise - shift.view(*shift.shape, *spread).to(eps)) / factor.to(eps)
        return _with_first(output, torch.cat((noise, rest), 1).movedim(1, _axis(predicted)))

    handles = [context.attach(model), model.register_forward_hook(hook, with_kwargs=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _axis(eps: Tensor) -> int:
    """Return the axis of the channels: the last of tokens, else 1."""
    return -1 if eps.dim() == 3 else 1


def _with_first(output: Any, value: Tensor) -> Any:
    """Return a denoiser's output with another prediction in it."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple):
        return (value, *output[1:])
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, **{fields(output)[0].name: value})
    raise ConfigError(f"{type(output).__name__}: expected a tensor, a tuple or an output class")


def _with_less_noise(scheduler: Any, correction: NoiseCorrection) -> Any:
    """Return a copy of the scheduler that adds `sigma'` of noise where it added `sigma`."""
    kind: Any = type(scheduler)
    accepted = inspect.signature(scheduler.step).parameters
    if not {"eta", "generator", "variance_noise"} <= set(accepted):
        return scheduler
    variances = dict(zip(correction.timesteps, correction.variance.tolist(), strict=True))

    class Corrected(kind):
        def step(
            self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0,
            use_clipped_model_output: bool = False, generator: Any = None,
            variance_noise: Tensor | None = None, return_dict: bool = True,
        ) -> Any:  # fmt: skip
            def stepped(output: Tensor, state: Tensor, noise: Tensor | None) -> Any:
                return super(Corrected, self).step(
                    output, timestep, state, eta, use_clipped_model_output,
                    variance_noise=noise, return_dict=return_dict,
                )  # fmt: skip

            if eta <= 0:
                return stepped(model_output, sample, None)
            if variance_noise is None:
                variance_noise = _noise_like(model_output, generator)
            share = _noise_share(stepped, timestep, variances)
            return stepped(model_output, sample, share * variance_noise)

    Corrected.__name__ = kind.__name__  # the name is written to config files
    return Corrected.from_config(scheduler.config)


def _noise_like(output: Tensor, generator: Any) -> Tensor:
    # diffusers' own function: a list of generators, one on another device, are all allowed
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)


def _noise_share(
    stepped: Callable[[Tensor, Tensor, Tensor], Any],
    timestep: Any,
    variances: dict[float, float],
) -> float:
    """Return `sigma' / sigma`; both `c` and `sigma` are read off the scheduler's own step.

    A step is linear in prediction, state and noise, whatever the prediction stands for.
    """
    nearest = min(variances, key=lambda known: abs(known - float(timestep)))
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    probe = torch.full_like(zero, _PROBE)

    def response(output: Tensor, noise: Tensor) -> float:
        found = stepped(output, zero, noise)
        return float(found[0] if isinstance(found, tuple) else found.prev_sample) / _PROBE

    sigma, slope = response(zero, probe), response(probe, zero)
    if sigma <= 0:
        return 1.0
    return math.sqrt(max(0.0, 1 - (slope / sigma) ** 2 * variances[nearest]))
