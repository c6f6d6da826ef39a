# SPDX-License-Identifier: Apache-2.0
"""The layer that is fine-tuned: QALoRA on the weight, one scale per sampling step on the input.

`W_eff = W + B A` is pre-scaled and then rounded, `Q((W + B A) s)`, and the input is `Q_k(X / s)`
with the scale of the current step k (EfficientDM, arXiv 2310.03270, section 4). Afterwards `B A` is
part of the codes; nothing of it is stored.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from tenfold_core.quant.activations import StepwiseActQuant, TimestepContext
from tenfold_core.quant.affine import (
    LearnableAffine,
    dequantize,
    fake_quant,
    max_code,
    quantize,
    storable,
)
from tenfold_core.quant.lowrank import LowRankDelta
from tenfold_core.quant.smoothing import smooth_weight
from torch import Tensor, nn

from mpq_dm.operators import apply_weight, channel_axis, is_transposed, to_rows
from mpq_dm.plan import LayerPlan

__all__ = ["QuantLayer"]


class QuantLayer(nn.Module):
    """A linear layer or convolution computed with rounded weights and inputs, differentiably.

    Args:
        module: the layer; its weight and bias are used, not copied, and stay fixed.
        plan: bits and first scales.
        context: the sampling step of the current call.
        rank: largest rank of the change of the weight; 0 for none.
        generator: source of LoRA's `A`.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: LayerPlan,
        context: TimestepContext,
        *,
        rank: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.plan = plan
        weight: Tensor = module.weight  # type: ignore[assignment]
        self.register_buffer("rows", to_rows(module, weight.detach()).float(), persistent=False)
        self.register_buffer("smooth", plan.smooth, persistent=False)
        self.weight_quant = LearnableAffine(plan.scale, plan.zero, max_code(plan.bits))
        self.act_quant = StepwiseActQuant(
            plan.act_scale, plan.act_zero, bits=plan.act_bits, context=context
        )
        self.lora: LowRankDelta | None = None
        if rank and generator is not None:
            self.lora = LowRankDelta(self.rows.shape, rank, generator=generator)
        self._fixed: Tensor | None = None
        self.codes: Tensor | None = None
        """Learned codes of the weight, in its shape; None to round to nearest."""

    rows: Tensor
    smooth: Tensor | None

    def __getattr__(self, name: str) -> Any:
        # models and pipelines ask their layers for in_features, weight.dtype and the like
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def smoothed_rows(self) -> Float[Tensor, "out in *kernel"]:
        """Return `(W + B A) s`, before rounding."""
        rows = self.rows if self.lora is None else self.rows + self.lora.delta()
        if self.smooth is None:
            return rows
        # the input channels of a transposed convolution's rows belong to one group each as well
        groups: Any = getattr(self.module, "groups", 1)
        return smooth_weight(rows, self.smooth, groups=groups)

    def quantized_rows(self) -> Float[Tensor, "out in *kernel"]:
        """Return `Q((W + B A) s)`, or what the learned codes stand for."""
        if self.codes is not None:
            scale, zero = storable(self.weight_quant.scale, self.weight_quant.zero)
            return dequantize(self.codes.flatten(1), scale, zero).view_as(self.rows)
        rows = self.smoothed_rows()
        return self.weight_quant(rows.flatten(1)).view_as(rows)

    def scaled_input(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return `X / s`."""
        if self.smooth is None:
            return x
        axis = channel_axis(self.module)
        return x / (self.smooth if axis == -1 else self.smooth.view(-1, *[1] * (x.dim() - 2)))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the layer's output with rounded weights and inputs."""
        rows = self.quantized_rows() if self._fixed is None else self._fixed
        inputs = self.act_quant(self.scaled_input(x))
        return apply_weight(self.module, inputs, rows, self.module.bias)  # type: ignore[arg-type]

    def fix_(self, fixed: bool = True) -> None:
        """Compute the rounded weight once for all further calls; `fixed=False` ends that."""
        with torch.no_grad():
            self._fixed = self.quantized_rows() if fixed else None

    def use_rows_(self, rows: Float[Tensor, "out in *kernel"] | None) -> None:
        """Compute with these rounded weights, whose gradients are kept; None ends that."""
        self._fixed = rows

    @torch.no_grad()
    def finish(self) -> tuple[LayerPlan, UInt8[Tensor, "out in *kernel"]]:
        """Return the plan with the scales as they are now, as a file holds them, and the codes."""
        scale, zero = storable(self.weight_quant.scale, self.weight_quant.zero)
        codes = self.codes
        if codes is None:
            rows = self.smoothed_rows()
            codes = quantize(rows.flatten(1), scale, zero, self.weight_quant.qmax)
        act = self.act_quant
        plan = replace(
            self.plan,
            scale=scale,
            zero=zero,
            act_scale=(act.initial * torch.exp(act.rho)).detach().clone(),
            act_zero=act.offset.detach().round().clamp(0, act.qmax),
        )
        return plan, codes.view_as(self.rows)

    @torch.no_grad()
    def start_from_residual_(self) -> None:
        """Start LoRA from the best low-rank part of what rounding loses (`svd-residual`)."""
        if self.lora is None:
            return
        smoothed = self.smoothed_rows()
        lost = smoothed - fake_quant(
            smoothed.flatten(1), self.weight_quant.scale, self.weight_quant.zero,
            self.weight_quant.qmax,
        ).view_as(smoothed)  # fmt: skip
        if self.smooth is None:
            self.lora.init_from_residual_(lost)
            return
        per_channel = self.smooth.view(1, -1, *[1] * (lost.dim() - 2))
        self.lora.init_from_residual_(lost / per_channel, self.smooth)

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        average = float(self.plan.bits.double().mean())
        turned = ", transposed" if is_transposed(self.module) else ""
        return f"role={self.plan.role}, bits={average:.2f}{turned}"
