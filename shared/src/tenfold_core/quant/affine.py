# SPDX-License-Identifier: Apache-2.0
"""Uniform affine codes with a free or an integer zero point, and their trainable form.

A value ``x`` becomes the code ``q = clamp(round(x / d + z), 0, qmax)`` and is read back as
``d * (q - z)``, with ``qmax = 2**bits - 1``. Codes are clamped after everything else, as whole
numbers, so a row never holds more than ``2**bits`` values whatever the scale ``d`` and the zero
point ``z`` are. Scale, zero point and ``qmax`` broadcast against ``x``: one value a row, shaped
``(rows, 1)``, gives every row its own step and its own width in a single pass.

Gradients pass straight through the rounding (Bengio et al., 2013), and the step then has the
gradient of LSQ (Esser et al., ICLR 2020, Eq. 3) without its factor for the number of weights.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tenfold_core.errors import ConfigError, InputError

__all__ = [
    "LearnableAffine",
    "check_finite",
    "clamp_codes",
    "dequantize",
    "fake_quant",
    "max_code",
    "quantize",
    "round_ste",
    "storable",
]


class _RoundSTE(torch.autograd.Function):
    """Rounding with the gradient of the identity.

    ``v + (round(v) - v).detach()`` has the same values but costs two more passes over the tensor
    and turns an infinity into NaN.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def round_ste(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round to the nearest whole number, halves to even, with gradient 1 everywhere."""
    return _RoundSTE.apply(x)


def max_code(bits: int | Int[Tensor, " rows"]) -> int | Float[Tensor, "rows 1"]:
    """Return the largest code ``2**bits - 1``, as a column if ``bits`` has one entry a row.

    Raises:
        ConfigError: A width is not a whole number from 1 to 8.
    """
    if not isinstance(bits, Tensor):
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ConfigError(f"bits: expected a whole number from 1 to 8, found {bits!r}")
        return 2**bits - 1
    if bits.dim() != 1 or bits.is_floating_point() or bits.dtype == torch.bool:
        raise ConfigError(
            f"bits: expected one integer a row, found {bits.dtype} of shape {tuple(bits.shape)}"
        )
    if bits.numel() and not 1 <= int(bits.min()) <= int(bits.max()) <= 8:
        raise ConfigError(
            f"bits: expected 1 to 8 in every row, found {int(bits.min())} to {int(bits.max())}"
        )
    return torch.exp2(bits.float()).sub(1).unsqueeze(1)


def fake_quant(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, "..."],
    zero: Float[Tensor, "..."],
    qmax: int | Float[Tensor, "..."],
) -> Float[Tensor, "*shape"]:
    """Round ``x`` to the values its codes stand for, differentiably.

    With ``v = round(x / scale + zero)`` the result is ``scale * (clamp(v, 0, qmax) - zero)``, and

    ==========  ====================  =====================
    gradient    ``0 <= v <= qmax``    outside, code ``q``
    ==========  ====================  =====================
    of x        1                     0
    of scale    (v - zero) - x/scale  q - zero
    of zero     0                     -scale
    ==========  ====================  =====================

    Computed in the widest type of the arguments: keep the scale in float32, because bfloat16
    cannot tell the codes of 8 bits apart. NaN and infinities are not looked for; see
    :func:`check_finite`.

    Shapes: ``scale``, ``zero`` and ``qmax`` broadcast to the shape of ``x``.

    Example:
        >>> w = torch.tensor([[-1.0, 0.1, 1.2, 2.0]])
        >>> fake_quant(w, torch.tensor(1.0), torch.tensor(1.0), 3)
        tensor([[-1.,  0.,  1.,  2.]])
    """
    wanted = torch.is_grad_enabled() and any(
        isinstance(part, Tensor) and part.requires_grad for part in (x, scale, zero)
    )
    if wanted and not torch.compiler.is_compiling():
        return _FakeQuant.apply(x, scale, zero, qmax)
    return scale * (_codes(x, scale, zero, qmax) - zero)


class _FakeQuant(torch.autograd.Function):
    """The gradients of :func:`fake_quant` written out: half the passes of recording each step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, qmax: int | Tensor) -> Tensor:
        ratio = x / scale
        rounded = (ratio + zero).round_()
        codes = _clamped(rounded, qmax)
        inside = rounded == codes
        level = codes - zero
        ctx.shapes = [(part.shape, part.dtype) for part in (x, scale, zero)]
        ctx.save_for_backward(inside, level - ratio.mul_(inside), scale)
        return scale * level

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyrefly: ignore[bad-override]
        (gradient,) = gradients
        inside, slope, scale = ctx.saved_tensors
        (for_x, x_dtype), (for_scale, scale_dtype), (for_zero, zero_dtype) = ctx.shapes
        passed = gradient * inside
        found: list[Tensor | None] = [None, None, None, None]
        if ctx.needs_input_grad[0]:
            found[0] = passed.sum_to_size(for_x).to(x_dtype)
        if ctx.needs_input_grad[1]:
            found[1] = _sum_of_products(gradient, slope, for_scale).to(scale_dtype)
        if ctx.needs_input_grad[2]:
            lost = passed.sub_(gradient) if not ctx.needs_input_grad[0] else passed - gradient
            found[2] = _sum_of_products(lost, scale, for_zero).to(zero_dtype)
        return tuple(found)


def _sum_of_products(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """Return `a * b` summed to a shape, without a copy where it is one number."""
    if shape.numel() > 1 or a.dtype != b.dtype:
        return (a * b).sum_to_size(shape)
    if b.numel() == 1:
        return (a.sum() * b).reshape(shape)
    return torch.dot(a.reshape(-1), b.expand_as(a).reshape(-1)).reshape(shape)


def quantize(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, "..."],
    zero: Float[Tensor, "..."],
    qmax: int | Float[Tensor, "..."],
) -> UInt8[Tensor, "*shape"]:
    """Return the codes of ``x``; :func:`dequantize` of them is :func:`fake_quant`, bit for bit.

    Shapes: as :func:`fake_quant`.
    """
    with torch.no_grad():
        return _codes(x, scale, zero, qmax).to(torch.uint8)


def dequantize(
    codes: UInt8[Tensor, "*shape"], scale: Float[Tensor, "..."], zero: Float[Tensor, "..."]
) -> Float[Tensor, "*shape"]:
    """Return ``scale * (codes - zero)`` in the type of ``scale``."""
    return scale * (codes.to(scale.dtype) - zero)


def _codes(x: Tensor, scale: Tensor, zero: Tensor, qmax: int | Tensor) -> Tensor:
    return clamp_codes(round_ste(x / scale + zero), qmax)


def clamp_codes(
    codes: Float[Tensor, "*shape"], qmax: int | Float[Tensor, "..."]
) -> Float[Tensor, "*shape"]:
    """Return ``clamp(codes, 0, qmax)`` whose gradient is 1 on the end codes, too.

    ``torch.clamp`` gives 1 or 0 there, depending on the release, and ``torch.minimum`` a half.

    Shapes: ``qmax`` broadcasts to the shape of ``codes``.
    """
    fixed = codes.detach()
    bound = _clamped(fixed, qmax)
    return torch.where(fixed == bound, codes, bound)


def _clamped(codes: Tensor, qmax: int | Tensor) -> Tensor:
    if isinstance(qmax, Tensor):
        return torch.clamp(codes, codes.new_zeros(()), qmax.to(codes.dtype))
    return torch.clamp(codes, 0, qmax)


def check_finite(x: Float[Tensor, "..."], name: str) -> None:
    """Refuse a tensor that holds NaN or infinities; waits for the device.

    Raises:
        InputError: With the tensor's name and how many such values it holds.
    """
    bad = int(x.numel() - torch.isfinite(x).sum())
    if bad:
        raise InputError(
            f"{name}: {bad} of {x.numel()} values are NaN or infinite, expected finite numbers; "
            "the model is damaged or has diverged"
        )


def storable(
    scale: Float[Tensor, "*shape"],
    zero: Float[Tensor, "*shape"],
    *,
    dtype: torch.dtype = torch.float16,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return the nearest scale and zero point that a file of ``dtype`` holds exactly.

    Compute codes with the result, not before: the codes then belong to what is stored. A scale
    below the smallest number of ``dtype`` becomes that number. A zero point beyond the integers
    of ``dtype`` (2048 in float16; a row far from 0 for its spread) is brought back to them by a
    wider step around the same offset. Whole zero points of up to 8 bits stay as they are.

    Returns:
        Both in the type of ``scale``, detached.

    Raises:
        InputError: A scale is not positive, or anything is not finite or too large for ``dtype``.
    """
    scale, zero = scale.detach(), zero.detach()
    _check_parameters(scale, zero)
    info = torch.finfo(dtype)
    most = 2 / info.eps
    offset = scale * zero
    widened = torch.maximum(scale, offset.abs() / most).clamp(min=info.tiny * info.eps)
    if bool((widened > info.max).any()):
        raise InputError(
            f"scale: {float(widened.max()):.3g} is beyond {dtype} (at most {info.max:.5g}); "
            "divide the weights by a constant first"
        )
    stored = widened.to(dtype).to(scale.dtype)
    near = torch.where(zero.abs() > most, offset / stored, zero)
    return stored, near.to(dtype).to(scale.dtype)


def _check_parameters(scale: Tensor, zero: Tensor) -> None:
    check_finite(scale, "scale")
    check_finite(zero, "zero")
    if bool((scale <= 0).any()):
        raise InputError(f"scale: found {float(scale.min()):.3g}, expected positive numbers")


class LearnableAffine(nn.Module):
    """Affine quantizer whose scale, and on request zero point, are trained.

    The scale is ``initial * exp(rho)``: it stays positive, and a learning rate of ``rho`` means
    the same relative change for every tensor.

    Attributes:
        rho: Logarithm of the scale relative to its initial value; 0 at first.
        offset: The trained zero point before rounding, a parameter only if ``learn_zero``.
    """

    initial: Tensor
    qmax: Tensor
    offset: Tensor

    def __init__(
        self,
        scale: Float[Tensor, "..."],
        zero: Float[Tensor, "..."],
        qmax: int | Float[Tensor, "..."],
        *,
        integer_zero: bool = False,
        learn_zero: bool = True,
    ) -> None:
        """Start from given parameters, for example those of :func:`.scales.init_scale`.

        Args:
            scale: Positive steps, broadcasting against what will be quantized.
            zero: Zero points of the same shape.
            qmax: Largest code, a number or one for each scale.
            integer_zero: Round the zero point to one of the codes, so that 0 is exact.
            learn_zero: Train the zero point too.

        Raises:
            InputError: A scale is not positive and finite, or the shapes differ.
        """
        super().__init__()
        _check_parameters(scale, zero)
        if scale.shape != zero.shape:
            raise InputError(
                f"zero: expected the shape of scale, {tuple(scale.shape)}, "
                f"found {tuple(zero.shape)}"
            )
        self.integer_zero = integer_zero
        self.register_buffer("initial", scale.detach().clone())
        most = torch.as_tensor(qmax, dtype=scale.dtype, device=scale.device)
        self.register_buffer("qmax", most.clone())
        self.rho = nn.Parameter(torch.zeros_like(self.initial))
        if learn_zero:
            self.offset = nn.Parameter(zero.detach().clone())
        else:
            self.register_buffer("offset", zero.detach().clone())

    @property
    def scale(self) -> Float[Tensor, "..."]:
        """The current scale, with its gradient to ``rho``."""
        return self.initial * torch.exp(self.rho)

    @property
    def zero(self) -> Float[Tensor, "..."]:
        """The current zero point; one of the codes if it is an integer."""
        return clamp_codes(round_ste(self.offset), self.qmax) if self.integer_zero else self.offset

    def codes(self, x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
        """Return the codes of ``x`` at the current scale and zero point."""
        with torch.no_grad():
            return quantize(x, self.scale, self.zero, self.qmax)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return ``x`` rounded to its codes' values; see :func:`fake_quant`."""
        return fake_quant(x, self.scale, self.zero, self.qmax)

    def extra_repr(self) -> str:
        """Say how many scales there are and of what kind the zero point is."""
        kind = "integer" if self.integer_zero else "free"
        trained = isinstance(self.offset, nn.Parameter)
        return f"shape={tuple(self.initial.shape)}, zero={kind}, learn_zero={trained}"
