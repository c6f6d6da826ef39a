# SPDX-License-Identifier: Apache-2.0
"""Learned rounding: each weight goes up or down, as trained (AdaRound, Nagel et al., ICML 2020).

The code is ``floor(x / d + z) + h`` with the rectified sigmoid of Eq. 23,
``h = clamp(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)``, ``gamma = -0.1`` and ``zeta = 1.1``. A
regulariser (Eq. 24) drives ``h`` to 0 or 1; :meth:`AdaRound.hard` then decides.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tenfold_core.errors import ConfigError
from tenfold_core.quant.affine import check_finite, clamp_codes

__all__ = ["GAMMA", "ZETA", "AdaRound", "rectified_sigmoid"]

GAMMA, ZETA = -0.1, 1.1
"""Ends of the stretched sigmoid: beyond 0 and 1, so that both are reached at a finite ``V``."""


def rectified_sigmoid(v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the offsets ``clamp(sigmoid(v) * (zeta - gamma) + gamma, 0, 1)``."""
    return torch.clamp(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


class AdaRound(nn.Module):
    """Trainable rounding of one tensor at a fixed scale and zero point.

    Starts at the exact position between the two codes, so :meth:`forward` first returns the
    tensor itself (clipped to its range) and :meth:`hard` the nearest codes, halves upwards.

    Attributes:
        v: The trained logits, one for each weight.
    """

    floor: Tensor
    scale: Tensor
    zero: Tensor
    qmax: Tensor

    def __init__(
        self,
        x: Float[Tensor, "*shape"],
        scale: Float[Tensor, "..."],
        zero: Float[Tensor, "..."],
        qmax: int | Float[Tensor, "..."],
    ) -> None:
        """Start from the tensor; ``scale``, ``zero`` and ``qmax`` broadcast against it.

        Raises:
            InputError: ``x``, ``scale`` or ``zero`` holds NaN or infinities.
        """
        super().__init__()
        for name, value in (("x", x), ("scale", scale), ("zero", zero)):
            check_finite(value, name)
        position = (x / scale + zero).detach()
        floor = torch.floor(position)
        for name, value in (("floor", floor), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, value.detach().clone())
        most = torch.as_tensor(qmax, dtype=floor.dtype, device=floor.device)
        self.register_buffer("qmax", most.clone())
        self.v = nn.Parameter(torch.logit((position - floor - GAMMA) / (ZETA - GAMMA)))

    def offsets(self) -> Float[Tensor, "*shape"]:
        """Return how far each weight lies from the lower code, 0 to 1."""
        return rectified_sigmoid(self.v)

    def forward(self) -> Float[Tensor, "*shape"]:
        """Return the weights with soft rounding, differentiable in ``v``."""
        return self.scale * (self._clamp(self.floor + self.offsets()) - self.zero)

    def hard(self) -> UInt8[Tensor, "*shape"]:
        """Return the codes decided by ``h >= 1/2``."""
        with torch.no_grad():
            return self._clamp(self.floor + (self.offsets() >= 0.5)).to(torch.uint8)

    def regularizer(self, beta: float) -> Float[Tensor, ""]:
        """Return ``sum(1 - |2 h - 1|**beta)``: 0 when every weight has decided.

        A large ``beta`` leaves all but the undecided free to move; it is lowered in training.

        Raises:
            ConfigError: ``beta`` is not positive.
        """
        if not beta > 0:
            raise ConfigError(f"beta: expected a positive number, found {beta!r}")
        return (1 - (2 * self.offsets() - 1).abs().pow(beta)).sum()

    def _clamp(self, codes: Tensor) -> Tensor:
        return clamp_codes(codes, self.qmax)
