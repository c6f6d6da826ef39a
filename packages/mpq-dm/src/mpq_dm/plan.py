# SPDX-License-Identifier: Apache-2.0
"""What becomes of a layer: the bits of its rows, their scales, and the scales of its inputs."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["LayerPlan"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerPlan:
    """How one layer is quantized; made by calibration, refined by fine-tuning, then packed.

    The codes of the weight are those of `rows * smooth` at `scale`, `zero` and `bits`; the codes of
    the input are those of `x / smooth` at the scale and zero point of the sampling step.
    """

    role: str
    bits: Int[Tensor, " out"]
    """Width of each output channel's codes, 1 to 8."""
    scale: Float[Tensor, "out 1"]
    """Step of each output channel, positive."""
    zero: Float[Tensor, "out 1"]
    """Zero point of each output channel, any real number."""
    smooth: Float[Tensor, " channels"] | None
    """Divisor of each input channel, a float16 number; None where it is 1 everywhere."""
    act_bits: int
    act_scale: Float[Tensor, " steps"]
    """Scale of the input at each sampling step, positive."""
    act_zero: Float[Tensor, " steps"]
    """Zero point of the input at each sampling step, a code."""
