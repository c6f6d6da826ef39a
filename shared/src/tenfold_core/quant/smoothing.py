# SPDX-License-Identifier: Apache-2.0
"""Smoothing: move the size of input channels between activation and weight before rounding.

``X W^T = (X / s) (W s)^T`` for any positive ``s`` per input channel, with
``s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, Eq. 4).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_core.errors import ConfigError, InputError

__all__ = [
    "RangeMax",
    "activation_multiplier",
    "channel_max",
    "smooth_scale",
    "smooth_weight",
    "weight_channel_max",
]

_LEAST = 1e-5  # of the layer's maximum: below it a channel counts as dead


def smooth_scale(
    xmax: Float[Tensor, " channels"], wmax: Float[Tensor, " channels"], alpha: int | float
) -> Float[Tensor, " channels"]:
    """Return the divisor ``s`` of every input channel; ones for ``alpha == 0`` (off).

    Both maxima are clamped to 1e-5 of the layer's largest, so dead channels stay finite.

    Args:
        xmax: Largest magnitude of every input channel of the activation.
        wmax: Largest magnitude of the weights on every input channel.
        alpha: How much of the activation's size moves into the weight, 0 to 1.

    Raises:
        ConfigError: ``alpha`` is outside 0..1.
        InputError: The two differ in length, or a maximum is negative or not finite.

    Example:
        >>> smooth_scale(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 4.0]), 0.5)
        tensor([2.0000, 0.5000])
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: got {alpha}, expected 0 (off) to 1")
    if xmax.shape != wmax.shape:
        raise InputError(
            f"smoothing: {len(xmax)} channels of the activation, {len(wmax)} of the weight"
        )
    for name, value in (("activation", xmax), ("weight", wmax)):
        if not bool((value.isfinite() & (value >= 0)).all()):
            raise InputError(f"smoothing: a maximum of the {name} is negative or not finite")
    if alpha == 0 or not xmax.numel():
        return torch.ones_like(wmax)
    return _floored(xmax) ** alpha / _floored(wmax) ** (1 - alpha)


def smooth_weight(
    weight: Float[Tensor, "out ..."], smooth: Float[Tensor, " channels"], *, groups: int = 1
) -> Float[Tensor, "out ..."]:
    """Fold ``s`` into a linear or convolution weight: multiply every input channel by its own."""
    if weight.shape[1] * groups != len(smooth):
        raise InputError(
            f"smoothing: weight {tuple(weight.shape)} in {groups} groups has "
            f"{weight.shape[1] * groups} input channels, the scale has {len(smooth)}"
        )
    per_group = smooth.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (weight.unflatten(0, (groups, -1)) * per_group).flatten(0, 1)


def activation_multiplier(
    smooth: Float[Tensor, " channels"], scale: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch channels"]:
    """Return ``m = 1 / (s d)``: the codes are ``round(x m) + z``, smoothing costs nothing.

    Next to a rounding boundary these differ by one code from ``round((x / s) / d) + z``.
    """
    return 1 / (scale[..., None] * smooth)


def weight_channel_max(
    weight: Float[Tensor, "out ..."], *, groups: int = 1
) -> Float[Tensor, " channels"]:
    """Return the largest magnitude on every input channel, over outputs and kernel taps."""
    grouped = weight.detach().abs().unflatten(0, (groups, -1))
    return grouped.reshape(*grouped.shape[:3], -1).amax((1, 3)).reshape(-1)


def channel_max(x: Float[Tensor, "batch ..."], axis: int) -> Float[Tensor, "batch channels"]:
    """Return the largest magnitude of every channel of every sample, over all positions."""
    values = x.detach().float().abs().movedim(axis, -1)
    return values.reshape(len(values), -1, values.shape[-1]).amax(1)


class RangeMax:
    """Collect channel maxima for each range of timesteps.

    Args:
        num_channels: Channels of the layer's input.
        bounds: Rising timesteps that separate the ranges; none for one range.
        momentum: ``None`` keeps the true maximum; otherwise every call moves the value by
            ``1 - momentum`` towards the mean, over the samples of the call, of their maxima.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        bounds: Sequence[int | float] = (),
        momentum: int | float | None = None,
    ) -> None:
        if list(bounds) != sorted(set(bounds)):
            raise ConfigError(f"bounds: expected rising timesteps, got {list(bounds)}")
        if momentum is not None and not 0 <= momentum < 1:
            raise ConfigError(f"momentum: got {momentum}, expected 0 to below 1")
        self.momentum = momentum
        self.bounds = torch.tensor(list(bounds), dtype=torch.float32)
        self.value = torch.zeros(len(bounds) + 1, num_channels)
        self.count = torch.zeros(len(bounds) + 1, dtype=torch.int64)

    def range_of(self, timestep: Tensor | int | float) -> Int[Tensor, "*shape"]:
        """Return the range of a timestep; a bound belongs to the range above it."""
        value = torch.as_tensor(timestep, dtype=torch.float32, device=self.bounds.device)
        return torch.bucketize(value, self.bounds, right=True)

    def update_(
        self, xmax: Float[Tensor, "batch channels"], timestep: Tensor | int | float = 0.0
    ) -> None:
        """Add the maxima of one call, as :func:`channel_max` gives them.

        Args:
            xmax: Maxima of every sample.
            timestep: One value, or one per sample; without ``bounds`` it does not matter.

        Raises:
            InputError: Channels or timesteps do not fit, or a maximum is not finite.
        """
        if xmax.shape[-1] != self.value.shape[1] or not bool(xmax.isfinite().all()):
            raise InputError(
                f"channel maxima: expected {self.value.shape[1]} finite channels, "
                f"got shape {tuple(xmax.shape)}; the layer's input may hold NaN"
            )
        xmax, ranges = xmax.float().to(self.value.device), self.range_of(timestep).reshape(-1)
        if len(ranges) not in (1, len(xmax)):
            raise InputError(f"timestep: got {len(ranges)} values for {len(xmax)} samples")
        ranges = ranges.expand(len(xmax))
        for key in ranges.unique().tolist():
            self._merge(key, xmax[ranges == key])

    def _merge(self, key: int, xmax: Tensor) -> None:
        old = self.value[key]
        if self.momentum is None:
            self.value[key] = torch.maximum(old, xmax.amax(0))
        elif not self.count[key]:
            self.value[key] = xmax.mean(0)
        else:
            self.value[key] = torch.lerp(xmax.mean(0), old, self.momentum)
        self.count[key] += len(xmax)


def _floored(value: Tensor) -> Tensor:
    peak = value.max()
    return value.clamp(min=torch.where(peak > 0, _LEAST * peak, torch.ones_like(peak)))
