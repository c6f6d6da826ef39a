# SPDX-License-Identifier: Apache-2.0
"""Collect layer inputs while a model runs, in bounded memory.

Every reservoir is a uniform random sample, without replacement, of all that passed (Vitter 1985,
Algorithm R), so one long run of the sampler is enough and no order of timesteps is special.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant.activations import TimestepContext
from tenfold_core.quant.smoothing import RangeMax, channel_max

__all__ = ["InputCollector", "Reservoir"]

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class Reservoir:
    """Keep a uniform sample of at most ``capacity`` of the items it was shown.

    Args:
        capacity: Items kept, at least 1.
        generator: CPU generator that decides which.
    """

    def __init__(self, capacity: int, generator: torch.Generator) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity: got {capacity}, expected at least 1")
        self.capacity = capacity
        self.seen = 0
        self._generator = generator
        self._kept: Tensor | None = None

    @property
    def items(self) -> Float[Tensor, "items ..."]:
        """Return what is kept, in no particular order."""
        if self._kept is None:
            raise InputError("reservoir: nothing was collected; run the model inside the collector")
        return self._kept[: min(self.seen, self.capacity)]

    def add_(self, items: Float[Tensor, "items ..."]) -> None:
        """Show it a batch: item number ``i`` (from 0) takes slot ``randint(0, i)`` if that exists.

        Raises:
            InputError: The items differ in shape from earlier ones.
        """
        if self._kept is None:
            self._kept = torch.empty(self.capacity, *items.shape[1:], dtype=items.dtype)
        if items.shape[1:] != self._kept.shape[1:]:
            raise InputError(
                f"reservoir: got items of shape {tuple(items.shape[1:])} after "
                f"{tuple(self._kept.shape[1:])}; calibrate with one input size"
            )
        numbers = torch.arange(self.seen, self.seen + len(items))
        draws = torch.rand(len(items), generator=self._generator, dtype=torch.float64)
        slots = torch.where(numbers < self.capacity, numbers, (draws * (numbers + 1)).long())
        self.seen += len(items)
        chosen = (slots < self.capacity).nonzero().flatten().tolist()
        last = {int(slots[item]): item for item in chosen}  # a later item replaces an earlier one
        if last:
            sources = torch.tensor(list(last.values()), device=items.device)
            self._kept[torch.tensor(list(last))] = items[sources].to("cpu")


class InputCollector:
    """Sample the inputs of layers, and their channel maxima, while the model is called.

    ``max_bytes`` is shared evenly among the reservoirs, one per layer, or one per layer and step
    when a ``context`` tells the step. Nothing beyond it is kept. Use it as a context manager, or
    call :meth:`remove` when done.

    Args:
        layers: The layers by name; convolutions have their channels on axis 1, others last.
        max_bytes: Upper limit of all samples together.
        generator: CPU generator of the sampling.
        context: If given, reservoirs are per calibrated step; else all steps are pooled.
        unit: What an item is: one ``sample`` of the batch, or one ``row`` along the last axis
            (a token).
        momentum: Of the channel maxima, as in :class:`RangeMax`.

    Raises:
        ConfigError: No layers, no bytes, or rows of a convolution.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> seeded = torch.Generator().manual_seed(0)
        >>> with InputCollector({"fc": layer}, max_bytes=64, generator=seeded) as collector:
        ...     _ = layer(torch.tensor([[1.0, -3.0]]))
        >>> collector.inputs("fc"), collector.channel_max("fc")
        (tensor([[ 1., -3.]]), tensor([1., 3.]))
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        max_bytes: int,
        generator: torch.Generator,
        context: TimestepContext | None = None,
        unit: Literal["sample", "row"] = "sample",
        momentum: int | float | None = None,
    ) -> None:
        if not layers or max_bytes < 1:
            raise ConfigError(
                f"calibration: expected layers and a budget, got {len(layers)} layers and "
                f"{max_bytes} bytes"
            )
        if unit == "row" and any(isinstance(layer, _CONVOLUTIONS) for layer in layers.values()):
            raise ConfigError("calibration: a convolution has no rows; sample whole inputs")
        self._share = max_bytes // (len(layers) * (context.num_steps if context else 1))
        self._generator = generator
        self._context = context
        self._rows = unit == "row"
        self._momentum = momentum
        self._reservoirs: dict[tuple[str, int], Reservoir] = {}
        self._maxima: dict[str, RangeMax] = {}
        self._handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, layer in layers.items()
        ]

    def __enter__(self) -> "InputCollector":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the layers; what was collected stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def inputs(self, name: str, step: int | None = None) -> Float[Tensor, "items ..."]:
        """Return the sampled inputs of a layer, on the CPU.

        Args:
            name: The layer.
            step: The calibrated step; all of them together if not given.

        Raises:
            InputError: Nothing was collected there.
        """
        found = [
            reservoir.items
            for (layer, number), reservoir in sorted(self._reservoirs.items())
            if layer == name and step in (None, number)
        ]
        if not found:
            where = "" if step is None else f" at step {step}"
            raise InputError(f"calibration: no inputs of layer {name!r}{where}; was it called?")
        return torch.cat(found)

    def channel_max(self, name: str) -> Float[Tensor, " channels"]:
        """Return the largest magnitude of every input channel of a layer, over all it saw.

        Raises:
            InputError: Nothing was collected there.
        """
        if name not in self._maxima:
            raise InputError(f"calibration: no inputs of layer {name!r}; was it called?")
        return self._maxima[name].value[0]

    def drop(self, name: str) -> None:
        """Free the samples of a layer that is done with."""
        for key in [key for key in self._reservoirs if key[0] == name]:
            del self._reservoirs[key]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all samples kept."""
        return sum(reservoir.items.nbytes for reservoir in self._reservoirs.values())

    def _hook(self, name: str) -> Callable[..., None]:
        def collect(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor):
                raise InputError(f"calibration: layer {name!r} was called without a tensor")
            self._record(name, x.detach(), 1 if isinstance(layer, _CONVOLUTIONS) else -1)

        return collect

    def _record(self, name: str, x: Tensor, axis: int) -> None:
        if not x.numel():
            return
        if name not in self._maxima:
            self._maxima[name] = RangeMax(x.shape[axis], momentum=self._momentum)
        try:
            self._maxima[name].update_(channel_max(x, axis).to("cpu"))
        except InputError as error:
            raise InputError(f"layer {name!r}: {error}") from None
        items = x.reshape(-1, x.shape[-1]) if self._rows else x
        if self._context is None:
            self._reservoir(name, 0, items).add_(items)
            return
        steps = self._context.index.to("cpu")
        if len(items) % len(steps):
            raise InputError(
                f"layer {name!r}: {len(items)} items are no multiple of the {len(steps)} "
                "timesteps of this call"
            )
        steps = steps.repeat_interleave(len(items) // len(steps))
        for step in steps.unique().tolist():
            own = items[(steps == step).to(items.device)]
            self._reservoir(name, step, own).add_(own)

    def _reservoir(self, name: str, step: int, items: Tensor) -> Reservoir:
        if (name, step) not in self._reservoirs:
            size = items[0].nbytes
            if size > self._share:
                raise ConfigError(
                    f"calibration: an input of layer {name!r} has {size} bytes, its share of the "
                    f"budget is {self._share}; raise the budget, sample rows or take fewer layers"
                )
            self._reservoirs[name, step] = Reservoir(self._share // size, self._generator)
        return self._reservoirs[name, step]
