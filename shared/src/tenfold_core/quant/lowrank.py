# SPDX-License-Identifier: Apache-2.0
"""A low-rank change of a weight, ``B A`` (LoRA, arXiv 2106.09685), for linears and convolutions."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_core.errors import ConfigError, InputError

__all__ = ["LowRankDelta"]


class LowRankDelta(nn.Module):
    """Hold ``A`` and ``B`` of a weight's change; where it is added is the caller's business.

    Linear: ``A (r, in)``, ``B (out, r)``, ``delta = B A``. Convolution: both carry the kernel,
    ``A (r, in, *kernel)``, ``B (out, r, *kernel)``, and every tap has its own product,
    ``delta[:, :, i, j] = B[:, :, i, j] A[:, :, i, j]``. ``A`` starts as Kaiming-uniform with
    ``a = sqrt(5)``, which is U(+-1 / sqrt(fan_in)), ``B`` at zero: the change starts at exactly 0.

    Args:
        weight_shape: ``(out, in, *kernel)``.
        rank: Wanted rank; at most half of ``out`` and of ``in * prod(kernel)`` is used, which
            leaves a weight of a single row or column without a change.
        generator: Source of ``A``.

    Raises:
        ConfigError: The shape has fewer than two axes or an empty one, or ``rank`` is below 1.
    """

    def __init__(
        self, weight_shape: Sequence[int], rank: int, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        shape = tuple(weight_shape)
        if len(shape) < 2 or min(shape) < 1:
            raise ConfigError(f"low rank: expected a weight (out, in, *kernel), got {shape}")
        if rank < 1:
            raise ConfigError(f"rank: got {rank}, expected at least 1")
        num_out, num_in, *kernel = shape
        fan_in = num_in * prod(kernel)
        self.weight_shape = shape
        self.rank = min(rank, num_out // 2, fan_in // 2)
        self.a = nn.Parameter(torch.empty(self.rank, num_in, *kernel, device=generator.device))
        self.b = nn.Parameter(torch.zeros(num_out, self.rank, *kernel, device=generator.device))
        bound = fan_in**-0.5
        with torch.no_grad():
            self.a.uniform_(-bound, bound, generator=generator)

    def delta(self) -> Float[Tensor, "out ..."]:
        """Return the change, of the weight's shape."""
        return torch.einsum("or...,ri...->oi...", self.b, self.a)

    @torch.no_grad()
    def init_from_residual_(
        self,
        residual: Float[Tensor, "out ..."],
        channel_weight: Float[Tensor, " channels"] | None = None,
    ) -> None:
        """Start from the best change of this rank towards ``residual``, such as ``W - Q(W)``.

        ``B A`` is the truncated singular value decomposition of the residual, per tap; the
        singular values are shared evenly. With ``channel_weight`` (say, the size of every input
        channel) the weighted error ``(residual - B A) diag(channel_weight)`` is least instead.

        Raises:
            InputError: Shapes differ, or a channel's weight is not positive.
        """
        if tuple(residual.shape) != self.weight_shape:
            raise InputError(
                f"residual: got shape {tuple(residual.shape)}, expected {self.weight_shape}"
            )
        if channel_weight is None:
            channel_weight = torch.ones(self.weight_shape[1], device=residual.device)
        if len(channel_weight) != self.weight_shape[1] or not bool((channel_weight > 0).all()):
            raise InputError(
                f"channel weight: expected {self.weight_shape[1]} positive values, "
                f"got {len(channel_weight)}"
            )
        taps = residual.detach().float().flatten(2) if residual.dim() > 2 else residual[..., None]
        matrices = taps.movedim(-1, 0) * channel_weight
        left, size, right = torch.linalg.svd(matrices, full_matrices=False)
        kept = min(self.rank, size.shape[-1])
        root = size[:, :kept].sqrt()
        self.b.zero_()
        self.a.zero_()
        b, a = left[..., :kept] * root[:, None], root[..., None] * right[:, :kept] / channel_weight
        self.b[:, :kept] = b.movedim(0, -1).reshape(self.b[:, :kept].shape)
        self.a[:kept] = a.movedim(0, -1).reshape(self.a[:kept].shape)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"weight_shape={self.weight_shape}, rank={self.rank}"
