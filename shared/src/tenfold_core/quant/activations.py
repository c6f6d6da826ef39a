# SPDX-License-Identifier: Apache-2.0
"""Activation quantizers: static per sampling step, dynamic per token, and the step they are at.

Codes are unsigned, ``q = clamp(round(x / d) + z, 0, 2**bits - 1)`` and ``x_hat = d (q - z)``, with
an integer ``z`` inside the range: exact 0 is a code, as a convolution pads with zeros.
"""

import inspect
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tenfold_core.errors import ConfigError, InputError, TenfoldWarning
from tenfold_core.quant.affine import clamp_codes, fake_quant, quantize, round_ste

__all__ = ["ActQuant", "DynamicTokenQuant", "StepwiseActQuant", "TimestepContext"]

_TOLERANCE = 0.01  # of the least step: a timestep this close to a calibrated one is that one


class TimestepContext(nn.Module):
    """Say at which calibrated sampling step every sample of the current batch is.

    A hook on the denoiser (:meth:`attach`) reads the ``timestep`` argument of each call; the
    quantizers inside ask for their step. Everything that depends on data is a tensor operation,
    so the hook compiles with the model. The context knows the last call only: a layer evaluated
    again later, as by activation checkpointing, must come before the next call of the model.

    Args:
        timesteps: The calibrated timesteps in sampling order, strictly rising or falling.

    Attributes:
        num_steps: Number of calibrated steps.
        off_grid: Whether a timestep so far was not a calibrated one.

    Raises:
        ConfigError: The timesteps are empty, not finite, repeated or not in order.
    """

    grid: Tensor
    off_grid: Tensor

    def __init__(self, timesteps: Sequence[int | float] | Tensor) -> None:
        super().__init__()
        grid = torch.as_tensor(timesteps, dtype=torch.float32).detach().reshape(-1)
        steps = grid.diff()
        if not grid.numel() or not bool(grid.isfinite().all()):
            raise ConfigError(f"timesteps: expected at least one finite number, got {timesteps!r}")
        self.sign = -1.0 if bool((steps < 0).any()) else 1.0
        if not bool((steps * self.sign > 0).all()):
            raise ConfigError(
                "timesteps: expected strictly rising or falling values; "
                "drop what the scheduler repeats"
            )
        least = float(steps.abs().min()) if grid.numel() > 1 else max(1.0, abs(float(grid[0])))
        self.num_steps = grid.numel()
        self.tolerance = _TOLERANCE * least
        self._warned = False
        self.register_buffer("grid", grid.clone() * self.sign, persistent=False)
        self.register_buffer("off_grid", torch.zeros((), dtype=torch.bool), persistent=False)
        # not buffers: a compiled graph would be guarded by what the last call left there
        self._on_grid = False
        self._step: int | None = None
        self._lower: Tensor | None = None
        self._weight: Tensor | None = None

    def attach(self, model: nn.Module, argument: str = "timestep") -> RemovableHandle:
        """Follow the calls of ``model``; ``remove()`` of the returned handle ends it.

        Args:
            model: The module whose ``forward`` takes the timestep.
            argument: Name of that parameter, which callers may pass by position or by name.

        Raises:
            ConfigError: ``forward`` has no such parameter.
        """
        names = list(inspect.signature(model.forward).parameters)
        if argument not in names:
            raise ConfigError(
                f"{type(model).__name__}.forward: no parameter {argument!r} among {names}; "
                "name the one that carries the timestep"
            )
        # A bound method, not a closure: a deep copy of the model then follows with its own context.
        hook = partial(self._follow, argument, names.index(argument))
        return model.register_forward_pre_hook(hook, with_kwargs=True)

    def set_(self, timestep: Tensor | int | float) -> None:
        """Set the timestep of every sample: a number, a 0-d tensor or one value per sample."""
        value = torch.as_tensor(timestep, device=self.grid.device).detach().reshape(-1)
        # Reading a value on a GPU would stall every call, and a compiled graph cannot branch or
        # warn: there the caller asks by `check` when the run is over.
        readable = not torch.compiler.is_compiling() and value.device.type == "cpu"
        if readable and len(value) > 1 and bool((value == value[0]).all()):
            value = value[:1]  # one scale for the whole batch, which is what samplers do
        self._lower, self._weight, off_grid = self._locate(value.to(torch.float32))
        self.off_grid = self.off_grid | off_grid
        self._on_grid = readable and not bool(off_grid)
        self._step = int(self._lower) if self._on_grid and len(value) == 1 else None
        if readable:
            self.check()

    @property
    def step(self) -> int | None:
        """The calibrated step of all samples, where it is one and was read without waiting."""
        return self._step

    @property
    def index(self) -> Int[Tensor, " batch"]:
        """Return the nearest calibrated step of every sample."""
        lower, weight = self._current()
        return (lower + (weight > 0.5)).clamp(max=self.num_steps - 1)

    def interpolate(
        self, table: Float[Tensor, " steps"], *, log: bool = False
    ) -> Float[Tensor, " batch"]:
        """Look up one value per step; at a calibrated timestep, its own value exactly.

        Args:
            table: One value per step, positive if ``log``.
            log: Interpolate the logarithm linearly in the timestep, not the value.
        """
        lower, weight = self._current()
        if self._on_grid:
            return table[lower]
        lower, weight = lower.to(table.device), weight.to(table.device, table.dtype)
        start, end = table[lower], table[(lower + 1).clamp(max=self.num_steps - 1)]
        return start * (end / start) ** weight if log else torch.lerp(start, end, weight)

    def check(self) -> None:
        """Warn, once, if a timestep so far was not a calibrated one."""
        if not self._warned and bool(self.off_grid):
            self._warned = True
            warnings.warn(
                f"timestep outside the {self.num_steps} calibrated ones: scales are interpolated; "
                "calibrate with the sampler and step count that are used",
                TenfoldWarning,
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"num_steps={self.num_steps}"

    def _follow(
        self,
        argument: str,
        position: int,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        value = args[position] if position < len(args) else kwargs.get(argument)
        if value is None:
            raise InputError(f"{argument}: not given to the model; the quantizers need it")
        self.set_(value)

    def _current(self) -> tuple[Tensor, Tensor]:
        if self._lower is None or self._weight is None:
            raise InputError("timestep: not set yet; attach the context and call the model itself")
        return self._lower, self._weight

    def _locate(self, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, last = timestep * self.sign, self.num_steps - 1
        lower = (torch.searchsorted(self.grid, value, right=True) - 1).clamp(0, last)
        upper = (lower + 1).clamp(max=last)
        start, end = self.grid[lower], self.grid[upper]
        near_start = (value - start).abs() <= self.tolerance
        near_end = (value - end).abs() <= self.tolerance
        weight = (value - start) / (end - start).clamp(min=self.tolerance)
        near = near_start | near_end
        weight = torch.where(near, torch.zeros_like(weight), weight.clamp(0, 1))
        return torch.where(near_end & ~near_start, upper, lower), weight, ~near.all()


class ActQuant(nn.Module):
    """Base of the activation quantizers: ``params`` says scale and zero point, the rest is here.

    Args:
        bits: Width of the codes, 1 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        if bits not in range(1, 9):
            raise ConfigError(f"activation bits: got {bits}, expected 1 to 8")
        self.bits = bits
        self.qmax = 2**bits - 1

    def params(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and integer zero point, each broadcasting against ``x``."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Quantize and dequantize in float32, with straight-through gradients."""
        scale, zero = self.params(x)
        return fake_quant(x.float(), scale, zero, self.qmax).to(x.dtype)

    @torch.no_grad()
    def codes(self, x: Float[Tensor, "*shape"]) -> tuple[UInt8[Tensor, "*shape"], Tensor, Tensor]:
        """Return the codes of :meth:`forward` with their scale and zero point."""
        scale, zero = self.params(x)
        return quantize(x.float(), scale, zero, self.qmax), scale, zero

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"bits={self.bits}"


class StepwiseActQuant(ActQuant):
    """One static scale and zero point per sampling step, for a whole tensor (trained or not).

    Between calibrated timesteps the scale is interpolated in log space and the zero point is
    interpolated, then rounded. A batch may hold samples at different steps. Inputs whose first
    axis is a multiple of the batch (``batch * frames``, batch first) are understood.

    Args:
        scale: Scale of every step, positive.
        zero: Zero point of every step, rounded on use.
        bits: Width of the codes.
        context: The step of the current call, shared by all layers of a model.

    Attributes:
        rho: Logarithm of every scale relative to its initial value; trained, 0 at first.
        offset: Every zero point before rounding; trained.

    Raises:
        ConfigError: Lengths differ, or a scale is not positive and finite.
    """

    initial: Tensor

    def __init__(
        self,
        scale: Float[Tensor, " scales"],
        zero: Float[Tensor, " zeros"],
        *,
        bits: int,
        context: TimestepContext,
    ) -> None:
        super().__init__(bits)
        if not len(scale) == len(zero) == context.num_steps:
            raise ConfigError(
                f"activation scales: got {len(scale)} scales and {len(zero)} zero points for "
                f"{context.num_steps} calibrated steps"
            )
        if not bool(((scale > 0) & scale.isfinite() & zero.isfinite()).all()):
            raise ConfigError("activation scales: expected positive, finite scales, finite zeros")
        self.register_buffer("initial", scale.detach().float().clone())
        self.rho = nn.Parameter(torch.zeros_like(self.initial))
        self.offset = nn.Parameter(zero.detach().float().clone())
        self.context = context

    def params(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the current step, ``(batch or 1, 1, ...)``."""
        scale = self.context.interpolate(self.initial * torch.exp(self.rho), log=True)
        zero = clamp_codes(round_ste(self.context.interpolate(self.offset)), self.qmax)
        return self._per_sample(scale, x), self._per_sample(zero, x)

    @staticmethod
    def _per_sample(value: Tensor, x: Tensor) -> Tensor:
        count = value.shape[0]
        if count > 1 and x.shape[0] != count:
            if x.shape[0] % count:
                raise InputError(
                    f"activation: first axis of {tuple(x.shape)} is no multiple of the "
                    f"{count} timesteps of this call"
                )
            value = value[:, None].expand(count, x.shape[0] // count).reshape(-1)
        return value.reshape(-1, *[1] * (x.dim() - 1))


class DynamicTokenQuant(ActQuant):
    """The range of every token, over its channels (last axis), measured as it comes.

    No state, and nothing is shared across a batch: a token's codes depend on that token alone.
    Gradients pass straight through; the range is a constant to them.

    Args:
        bits: Width of the codes.
        symmetric: Range ``-max|x| .. max|x|`` around the middle code ``2**(bits-1)``; else from
            minimum to maximum, widened to hold 0.
    """

    def __init__(self, bits: int, *, symmetric: bool = False) -> None:
        super().__init__(bits)
        if symmetric and bits < 2:
            raise ConfigError("activation bits: a symmetric range needs at least 2")
        self.symmetric = symmetric

    def params(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of every token, ``(..., 1)``."""
        values = x.detach().float()
        tiny = torch.finfo(torch.float32).tiny
        if self.symmetric:
            middle = (self.qmax + 1) // 2
            scale = values.abs().amax(-1, keepdim=True) / (middle - 1)
            return scale.clamp(min=tiny), torch.full_like(scale, middle)
        low = values.amin(-1, keepdim=True).clamp(max=0)
        high = values.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / self.qmax).clamp(min=tiny)
        return scale, (-low / scale).round().clamp(0, self.qmax)
