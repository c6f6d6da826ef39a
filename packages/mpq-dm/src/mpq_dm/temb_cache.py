# SPDX-License-Identifier: Apache-2.0
"""What depends on the timestep alone becomes a table of its values at the sampling steps.

TFMQ-DM (Huang et al., CVPR 2024, arXiv 2311.16503) finds that rounding the embedding of the
timestep and its projections costs most, though they take only as many values as there are sampling
steps. It reconstructs the rounded modules over this finite set (sections 4.2 and 4.3).

Deviation: the finite set itself is stored, so that nothing of these modules is rounded. A table of
S steps is also smaller than the weights it replaces as long as S is below the inputs of the layer
times its bits over 32.

Which modules these are is found out twice. One differentiated call of the model, in which every
other input and weight asks for a gradient, shows what flows into a module beside the timestep; then
trajectories show that its outputs at a step are the same for all samples and conditions.
"""

import copy
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int32
from tenfold_core.errors import InputError
from tenfold_core.quant.activations import TimestepContext
from tenfold_core.quant.state import bits_of, float_of, replace_module
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from mpq_dm.sampler import Sampler, following

__all__ = ["TableLayer", "cache_timestep", "table_layers", "timestep_tables"]

TRAJECTORIES = 3  # that outputs are compared over, with the conditions of each
_SAME = 1e-5  # of the largest output: rows of one product differ by their place in the batch
_EMBEDDERS = ("time_embedding", "timestep_embedder")
_STORED = torch.float32
_KEYS = {"role", "table"}


class TableLayer(nn.Module):
    """Return the values of the current sampling step; between two steps, interpolated ones.

    The table is float32, so that nothing is lost at all. On the UNet of the demo, float16 changes
    the prediction by 1e-9 of its energy, 8 bits by 5e-6: float16 would do as well, but the file is
    smaller by less than a hundredth, and the equality could not be tested bit by bit.

    Args:
        steps: sampling steps.
        channels: length of a value.

    Attributes:
        table: the values, viewed as integers so that nothing casts them.
    """

    table: Int32[Tensor, "steps channels"]

    def __init__(self, steps: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(steps, channels, dtype=torch.int32))
        self.__dict__["context"] = None  # not a part: it is shared, and not saved

    @classmethod
    def empty(cls, entry: Mapping[str, Any], num_steps: int) -> "TableLayer":
        """Return the layer that an entry of a config describes.

        Args:
            entry: `role` (time) and `table` (steps, channels).
            num_steps: calibrated sampling steps.

        Raises:
            InputError: the entry contradicts itself or the number of steps.
        """
        shape = entry.get("table")
        whole = isinstance(shape, (list, tuple)) and all(type(size) is int for size in shape)
        if set(entry) != _KEYS or entry["role"] != "time" or not whole:
            raise InputError(f"expected role 'time' and the shape of a table, found {entry}")
        if len(shape) != 2 or shape[0] != num_steps or shape[1] < 1:  # type: ignore[arg-type]
            raise InputError(f"table: expected {num_steps} steps and channels, found {shape}")
        return cls(*shape)  # type: ignore[misc]

    @classmethod
    def from_values(
        cls, values: Float[Tensor, "steps channels"], context: TimestepContext
    ) -> "TableLayer":
        """Make a table that follows the steps of a context.

        Raises:
            InputError: a value is not finite, or their number is not that of the steps.
        """
        if len(values) != context.num_steps:
            raise InputError(f"table: expected {context.num_steps} steps, found {len(values)}")
        layer = cls(*values.shape)
        layer.table = bits_of(values.detach().to(_STORED).contiguous())
        layer.check("table layer")
        layer.bind_(context)
        return layer

    @property
    def values(self) -> Float[Tensor, "steps channels"]:
        """The table as numbers."""
        return float_of(self.table, _STORED)

    def entry(self) -> dict[str, Any]:
        """Return what the config says of this layer; `empty` reads it."""
        return {"role": "time", "table": list(self.table.shape)}

    def check(self, name: str) -> None:
        """Verify the values of a file.

        Raises:
            InputError: a value is not finite.
        """
        good = self.values.isfinite()
        if not bool(good.all()):
            step, channel = (~good).nonzero()[0].tolist()
            raise InputError(
                f"{name}.table: expected finite numbers, found {float(self.values[step, channel])} "
                f"at step {step}, channel {channel}"
            )

    def bind_(self, context: TimestepContext | None) -> None:
        """Follow the sampling steps of a context."""
        self.__dict__["context"] = context

    def forward(
        self, x: Float[Tensor, "batch features"], condition: Tensor | None = None
    ) -> Float[Tensor, "batch channels"]:
        """Return the step's values for every sample, in the type of `x`, which is not read.

        Raises:
            InputError: a condition is given, or the batch does not fit the timesteps.
        """
        if condition is not None:
            raise InputError("timestep: this embedding was cached without its condition")
        context = self.__dict__["context"]
        if context is None:
            raise InputError("sampling steps: the table follows no context; attach it to a model")
        values = self.values
        last = len(values) - 1
        place = context.interpolate(
            torch.arange(len(values), device=values.device, dtype=values.dtype)
        )
        lower = place.floor().long()
        upper = (lower + 1).clamp(max=last)
        rows = torch.lerp(values[lower], values[upper], (place - lower)[:, None])
        if len(x) % len(rows):
            raise InputError(
                f"input: first axis of {tuple(x.shape)} is no multiple of the {len(rows)} "
                "timesteps of this call"
            )
        return rows.repeat_interleave(len(x) // len(rows), dim=0).to(x.device, x.dtype)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"steps={self.table.shape[0]}, channels={self.table.shape[1]}"


def table_layers(model: nn.Module) -> Iterator[tuple[str, TableLayer]]:
    """Yield name and layer of every table of a model."""
    for name, module in model.named_modules():
        if isinstance(module, TableLayer):
            yield name, module


def cache_timestep(model: nn.Module, sampler: Sampler, timesteps: Sequence[float]) -> nn.Module:
    """Return a copy of a denoiser that looks up what depends on the timestep alone.

    Args:
        model: the full-precision denoiser.
        sampler: gives the trajectories; its conditions should vary as they will in use.
        timesteps: what the sampler calls the model with, in order.
    """
    tables = timestep_tables(model, sampler, timesteps)
    cached = copy.deepcopy(model)
    context = TimestepContext(timesteps).to(next(model.parameters()).device)
    for name, values in tables.items():
        replace_module(cached, name, TableLayer.from_values(values, context))
    context.attach(cached)
    return cached


def timestep_tables(
    model: nn.Module, sampler: Sampler, timesteps: Sequence[float]
) -> dict[str, Float[Tensor, "steps channels"]]:
    """Return the values at every step of all modules that depend on the timestep alone.

    These are embedders of the timestep and linear layers, such as the projections of UNets that
    take no labels.

    Args:
        model: the full-precision denoiser.
        sampler: gives the trajectories, its first ones.
        timesteps: what the sampler calls the model with, in order.
    """
    candidates = _fed_by_timestep(model, sampler)
    context = TimestepContext(timesteps).to(next(model.parameters()).device)
    seen: dict[str, dict[int, Tensor]] = {name: {} for name in candidates}
    differing: set[str] = set()

    def compare(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            steps = context.index.to(output.device)
            if output.dim() != 2 or len(output) % len(steps):
                differing.add(name)
                return
            steps = steps.repeat_interleave(len(output) // len(steps))
            for row, step in zip(output, steps.tolist(), strict=True):
                first = seen[name].setdefault(step, row.detach().clone())
                if float((row - first).abs().max()) > _SAME * float(first.abs().max()):
                    differing.add(name)

        return hook

    handles = [context.attach(model)]
    handles += [part.register_forward_hook(compare(name)) for name, part in candidates.items()]
    try:
        for number in range(TRAJECTORIES):
            sampler.trajectory(model, number)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: torch.stack([rows[step] for step in range(len(timesteps))])
        for name, rows in seen.items()
        if name not in differing and len(rows) == len(timesteps)
    }


def _fed_by_timestep(model: nn.Module, sampler: Sampler) -> dict[str, nn.Module]:
    """Return the modules into which nothing flows but the timestep, seen by the gradient."""
    embedders = {
        name: part
        for name, part in model.named_modules()
        if name.split(".")[-1] in _EMBEDDERS and type(part).__name__ == "TimestepEmbedding"
    }
    inside = {id(part) for embedder in embedders.values() for part in embedder.modules()}
    fixed = {id(part) for embedder in embedders.values() for part in embedder.parameters()}
    found = dict(embedders)
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and id(part) not in inside:
            found[name] = part
    fed: dict[str, bool] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()]
            alone = isinstance(values[0], Tensor) and all(value is None for value in values[1:])
            alone = alone and values[0].dim() == 2 and not values[0].requires_grad
            fed[name] = fed.get(name, True) and alone

        return hook

    handles = [
        part.register_forward_pre_hook(look(name), with_kwargs=True) for name, part in found.items()
    ]
    try:
        _call_with_gradients(model, sampler, fixed)
    finally:
        for handle in handles:
            handle.remove()
    return {name: part for name, part in found.items() if fed.get(name)}


def _call_with_gradients(model: nn.Module, sampler: Sampler, fixed: Container[int]) -> None:
    """Call the model once as the sampler does; all but the timestep and `fixed` ask for gradients.

    Nothing is kept for a backward pass, so that the call costs no more memory than another.
    """
    calls: list[Any] = []
    with following(model, lambda call, _: calls.append(call)):
        sampler.trajectory(model, 0)
    call = calls[0]

    def traced(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().requires_grad_(True) * 1
        return value

    with torch.enable_grad():
        for name, value in call.arguments.items():
            if name != "timestep":
                call.arguments[name] = tree_map(traced, value)
    before = [(part, part.requires_grad) for part in model.parameters()]
    try:
        for part, _ in before:
            part.requires_grad_(id(part) not in fixed)
        with torch.enable_grad(), saved_tensors_hooks(_forget, _forget):
            model(*call.args, **call.kwargs)
    finally:
        for part, asked in before:
            part.requires_grad_(asked)


def _forget(_: Any) -> Any:
    return None
