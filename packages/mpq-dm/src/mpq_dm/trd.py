# SPDX-License-Identifier: Apache-2.0
"""TRD, time-smoothed relation distillation (MPQ-DM, section "Time-Smoothed Relation Distillation").

The feature is what enters the denoiser's output layers. Features of T consecutive sampling steps
are averaged, positions become unit vectors, their cosines rows of a softmax, and the student's rows
are held to the teacher's by their divergence, summed over rows and samples.
"""

from typing import Any

import torch
from jaxtyping import Float
from tenfold_core.errors import ConfigError
from tenfold_core.losses import relation_kl
from torch import Tensor, nn

__all__ = ["FeatureTap", "RelationWindow", "as_tokens"]

_BLOCK_LOGITS = 1 << 24
_PLACES = ("conv_norm_out", "norm_out", "conv_out", "proj_out")


def as_tokens(feature: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch tokens channels"]:
    """Return a feature map's positions as tokens; tokens stay as they are."""
    return feature if feature.dim() == 3 else feature.flatten(2).mT


class FeatureTap:
    """Keep what enters a denoiser's output layers: the features of its last block.

    Args:
        model: a UNet or a transformer of diffusers.

    Raises:
        ConfigError: none of the known output layers is there.
    """

    def __init__(self, model: nn.Module) -> None:
        self.feature: Tensor | None = None
        layer = next((m for m in (getattr(model, n, None) for n in _PLACES) if m is not None), None)
        if layer is None:
            raise ConfigError(
                f"{type(model).__name__} has none of {', '.join(_PLACES)}, so there is no feature "
                "for the relation loss; use trd_weight=0"
            )
        self._handle = layer.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.feature = args[0] if args else next(iter(kwargs.values()))

    def take(self) -> Float[Tensor, "batch tokens channels"]:
        """Return the feature of the last call as tokens, and forget it."""
        if self.feature is None:
            raise ConfigError("relation loss: the output layers were not called by the model")
        feature, self.feature = self.feature, None
        return as_tokens(feature)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()


class RelationWindow:
    """Average the features of T sampling steps and compare them at the window's end.

    Parameters change after every step, so only the student's feature of the current step carries a
    gradient (`grad="last"`); earlier ones of the window are constants, the teacher's always.

    Args:
        size: T.
        tau: temperature of the relations.
        grad: last, or none: the published program detaches the student's feature as well, which
            makes the loss a constant.
        rows: positions drawn at random, unbiased; by default all.
        generator: source of the draw.
    """

    def __init__(
        self,
        size: int,
        *,
        tau: float = 1.0,
        grad: str = "last",
        rows: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.size, self.tau, self.grad = size, tau, grad
        self.rows, self.generator = rows, generator
        self._student: list[Tensor] = []
        self._teacher: list[Tensor] = []

    def reset(self) -> None:
        """Forget an unfinished window, as at the start of a trajectory."""
        self._student.clear()
        self._teacher.clear()

    def add(
        self,
        student: Float[Tensor, "batch tokens channels"],
        teacher: Float[Tensor, "batch tokens channels"],
    ) -> Float[Tensor, ""] | None:
        """Take in a step's features; return the loss at the end of a window, else None."""
        self._teacher.append(teacher.detach())
        if len(self._teacher) < self.size:
            self._student.append(student.detach())
            return None
        current = student if self.grad == "last" else student.detach()
        smoothed = torch.stack((*self._student, current)).mean(0)
        target = torch.stack(self._teacher).mean(0)
        self.reset()
        return self._relation(smoothed, target)

    def _relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        batch, tokens, _ = student.shape
        rows = self.rows if self.rows is not None and self.rows < tokens else None
        kept = rows or tokens
        # a map of moderate size is held whole; a larger one is made in blocks of rows
        small = batch * kept * tokens <= _BLOCK_LOGITS
        return relation_kl(
            student, teacher, tau=self.tau, reduction="sum", rows=rows,
            generator=self.generator if rows else None,
            chunk=None if small else max(1, _BLOCK_LOGITS // (batch * tokens)),
        )  # fmt: skip
