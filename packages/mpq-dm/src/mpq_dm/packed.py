# SPDX-License-Identifier: Apache-2.0
"""The layer that is saved and run: packed codes of the weight, scales of the input by step.

Inputs become codes `q = clamp(round(x m + z_k), 0, 2**bits - 1)` with `m[j] = 1 / (s_j d_k)` at the
sampling step k, so pre-scaling by `s` costs nothing. The product is that of integers, or of the
floats these stand for: int8 (weights unpacked once), packed (unpacked in every call) and dequant
(float weights made once) give one result, up to the rounding of float sums in the last.

Modules without an integer kernel (three dimensions, transposed, padding that is not of zeros or is
'same') use floats in every mode. A weight of 16 bits is in half precision and has no codes, nor
has its input.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int16, Int32, UInt8
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant.activations import TimestepContext
from tenfold_core.quant.integer import (
    IntWeight,
    activation_codes,
    int_conv1d,
    int_conv2d,
    int_linear,
)
from tenfold_core.quant.packing import PackedWeight, packed_layout, row_nbytes
from tenfold_core.quant.smoothing import activation_multiplier, smooth_weight
from tenfold_core.quant.state import bits_of, float_of
from torch import Tensor, nn

from mpq_dm.codes import per_sample, unpack_bits
from mpq_dm.entry import HALF, LayerEntry
from mpq_dm.operators import (
    CONVOLUTIONS,
    LINEAR,
    TRANSPOSED,
    apply_weight,
    channel_axis,
    from_rows,
    to_rows,
)
from mpq_dm.plan import LayerPlan

__all__ = ["MODES", "PackedLayer", "packed_layers", "set_mode"]

MODES = ("int8", "packed", "dequant")
_MAX_INNER = 65_536  # of a row: sums of int8 products stay in int32
_STORED = {"uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32,
           "float16": torch.int16}  # fmt: skip


class PackedLayer(nn.Module):
    """A linear layer or convolution made of codes; see `from_plan`, `from_half` and `empty`.

    Buffers hold exactly what a file does, floats viewed as integers so that nothing casts them.

    Attributes:
        entry: what the config says of the layer.
        shape: shape of the weight as rows, `(out, in / groups, *kernel)`.
        mode: how the product is computed, one of `MODES`.
        integer: whether the layer has an integer kernel.
    """

    qweight: Tensor
    scale: Int16[Tensor, " out"]
    zero: Int16[Tensor, " out"]
    row_order: Tensor | None
    smooth: Int16[Tensor, " channels"] | None
    act_scale: Int32[Tensor, " steps"]
    act_zero: Int16[Tensor, " steps"]
    bias: nn.Parameter | None
    operator: nn.Module
    context: TimestepContext | None

    def __init__(self, module: nn.Module, entry: LayerEntry, num_steps: int) -> None:
        super().__init__()
        weight: Tensor = module.weight  # type: ignore[assignment]
        # neither is a part of the layer: no tensors of theirs are saved with it
        self.__dict__ |= {"operator": _operator(module), "context": None}
        names: Any = self.operator.__constants__  # in_features, kernel_size and the like
        for name in names:
            setattr(self, name, getattr(self.operator, name))
        self.entry = entry
        self.shape = tuple(to_rows(self.operator, weight.detach().to("meta")).shape)
        self.integer = not entry.is_half and _has_integer_kernel(self.operator, self.shape)
        self.mode = MODES[0]
        self._module_dtype = weight.dtype
        self._forget()
        self.register_parameter("bias", module.bias)  # type: ignore[arg-type]
        for name in ("row_order", "smooth"):
            self.register_buffer(name, None)
        for name, (dtype, size) in self._layout(num_steps).items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device="meta"))

    def _layout(self, num_steps: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if self.entry.is_half:
            if self.entry.groups != ((HALF, self.shape[0]),):
                raise InputError(f"groups: found {self.entry.groups}, expected {self.shape[0]} "
                                 "rows")  # fmt: skip
            return {"qweight": (torch.int16, self.shape)}
        channels = self.shape[1] * self._groups if self.entry.smooth else 0
        stored = packed_layout(self.shape, self.entry.groups, smooth=channels)
        layout = {name: (_STORED[dtype.name], size) for name, (dtype, size) in stored.items()}
        steps = {"act_scale": torch.int32, "act_zero": torch.int16}
        return layout | {name: (dtype, (num_steps,)) for name, dtype in steps.items()}

    @classmethod
    def empty(cls, module: nn.Module, entry: Mapping[str, Any], num_steps: int) -> "PackedLayer":
        """Return the layer that an entry of a config describes, its tensors on the meta device.

        Args:
            module: the layer to replace, whose weight is only asked for its shape.
            entry: `role`, `act_bits`, `groups` (pairs of bits and rows) and `smooth`.
            num_steps: calibrated sampling steps.

        Raises:
            InputError: the entry contradicts itself or the module.
        """
        return cls(module, LayerEntry.from_dict(entry), num_steps)

    @classmethod
    def from_plan(
        cls,
        module: nn.Module,
        plan: LayerPlan,
        codes: UInt8[Tensor, "out in *kernel"],
        context: TimestepContext,
    ) -> "PackedLayer":
        """Pack the codes of a layer.

        Args:
            module: the layer to replace; its bias is used, not copied.
            plan: bits and scales, float16 numbers where a file stores these.
            codes: codes of `rows * smooth`.
            context: the sampling step of the current call, shared by all layers of a model.

        Raises:
            InputError: a code does not fit its width, or a value does not fit its type.
        """
        packed = PackedWeight.from_codes(codes, plan.bits, plan.scale, plan.zero)
        smooth = None if plan.smooth is None else bits_of(_half(plan.smooth, "smooth"))
        entry = LayerEntry(
            role=plan.role,
            act_bits=plan.act_bits,
            groups=packed.groups,
            smooth=smooth is not None,
        )
        layer = cls(module, entry, context.num_steps)
        if packed.shape != layer.shape:
            raise InputError(f"codes: found shape {packed.shape}, expected {layer.shape}")
        act_zero = plan.act_zero.detach().float()
        if not torch.equal(act_zero, act_zero.round()):
            raise InputError("act_zero: found fractions, expected codes; round them first")
        order = packed.row_order
        tensors = {
            "qweight": torch.from_numpy(packed.qweight),
            "scale": bits_of(torch.from_numpy(packed.scale)),
            "zero": bits_of(torch.from_numpy(packed.zero)),
            "row_order": None if order is None else torch.from_numpy(order),
            "smooth": smooth,
            "act_scale": bits_of(plan.act_scale.detach().float().clone()),
            "act_zero": act_zero.to(torch.int16),
        }
        layer._fill(tensors, _device(module))
        layer.bind_(context)
        layer.check("plan")
        return layer

    @classmethod
    def from_half(cls, module: nn.Module, role: str) -> "PackedLayer":
        """Keep a layer's weight in half precision, without codes.

        Raises:
            InputError: a weight is not finite, or beyond float16.
        """
        weight: Tensor = module.weight  # type: ignore[assignment]
        rows = to_rows(module, weight.detach()).to(torch.float16, copy=True).contiguous()
        if bad := int((~rows.isfinite()).sum()):
            raise InputError(f"weight: {bad} values are not finite in float16; keep it as it is")
        entry = LayerEntry(role=role, act_bits=HALF, groups=((HALF, len(rows)),), smooth=False)
        layer = cls(module, entry, 0)
        layer._fill({"qweight": bits_of(rows)}, _device(module))
        return layer

    def _fill(self, tensors: Mapping[str, Tensor | None], device: torch.device) -> None:
        for name, empty in list(self.named_buffers()):
            value = tensors[name]
            if value is None or value.shape != empty.shape or value.dtype != empty.dtype:
                found = "none" if value is None else f"{value.dtype} {tuple(value.shape)}"
                raise InputError(
                    f"{name}: found {found}, expected {empty.dtype} {tuple(empty.shape)}"
                )
            setattr(self, name, value.to(device))

    @property
    def dtype(self) -> torch.dtype:
        """The float type of the model around the layer."""
        return self._module_dtype if self.bias is None else self.bias.dtype

    @property
    def weight(self) -> Float[Tensor, "..."]:
        """The weight W in place of the module's: of its shape, without the pre-scaling."""
        rows = self.quantized_rows()
        if self.smooth is not None:
            rows = smooth_weight(rows, 1 / _float(self.smooth), groups=self._groups)
        return from_rows(self.operator, rows).to(self.dtype)

    @property
    def _groups(self) -> int:
        return getattr(self.operator, "groups", 1)  # type: ignore[return-value]

    def bind_(self, context: TimestepContext) -> None:
        """Follow the sampling steps of a context, which all layers of a model share."""
        self.__dict__["context"] = context

    def packed_weight(self) -> PackedWeight:
        """Return the codes as arrays on the CPU, which share memory with the buffers there.

        Raises:
            InputError: the weight is in half precision.
        """
        if self.entry.is_half:
            raise InputError(f"weight: found {HALF} bits, expected codes")
        order = self.row_order
        return PackedWeight(
            qweight=_array(self.qweight),
            groups=self.entry.groups,
            row_order=None if order is None else _array(order),
            scale=_array(float_of(self.scale, torch.float16)),
            zero=_array(float_of(self.zero, torch.float16)),
            shape=self.shape,
        )

    def check(self, name: str) -> None:
        """Verify every value that a file may have wrong.

        Args:
            name: of the layer; errors begin with the name of the tensor.

        Raises:
            InputError: with what was expected and what was found.
        """
        if self.entry.is_half:
            _require(name, "qweight", float_of(self.qweight, torch.float16))
            return
        self.packed_weight().check(name)
        if self.smooth is not None:
            _require(name, "smooth", _float(self.smooth), positive=True)
        _require(name, "act_scale", float_of(self.act_scale, torch.float32), positive=True)
        most = 2**self.entry.act_bits - 1
        wrong = (self.act_zero < 0) | (self.act_zero > most)
        if bool(wrong.any()):
            step = int(wrong.nonzero()[0])
            raise InputError(
                f"{name}.act_zero: expected a code of {self.entry.act_bits} bits, 0 to {most}, "
                f"found {int(self.act_zero[step])} at {step}"
            )

    def set_mode_(self, mode: str) -> None:
        """Choose how the product is computed, and make what that needs.

        Raises:
            ConfigError: no such mode.
        """
        if mode not in MODES:
            raise ConfigError(f"mode is {mode!r}, expected {', '.join(MODES)}")
        self.mode = mode
        self.prepare_()

    @torch.no_grad()
    def prepare_(self, device: torch.device | None = None) -> None:
        """Make what calls on a device need; the first call does it if nobody did."""
        self._forget()
        device = device or self.qweight.device
        if device.type == "meta":
            return
        self._ready_on = device
        if self.entry.is_half:
            return
        self._act_scale = float_of(self.act_scale, torch.float32).to(device)
        self._act_zero = self.act_zero.float().to(device)
        self._smooth = None if self.smooth is None else _float(self.smooth).to(device)
        if self.integer and self.mode != "dequant":
            self._int_weight = self._as_int_weight().to(device)
        elif self.mode != "packed":
            self._float_rows = self.quantized_rows().to(device)

    def _forget(self) -> None:
        self._ready_on: torch.device | None = None
        self._int_weight: IntWeight | None = None
        self._float_rows: Tensor | None = None
        self._smooth: Tensor | None = None
        self._steps: dict[int | None, tuple[Tensor, Tensor, Tensor]] = {}

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the layer's output in the type of its input."""
        if self.entry.is_half:
            rows = float_of(self.qweight, torch.float16).to(x.device, x.dtype)
            return apply_weight(self.operator, x, rows, self.bias)
        if x.dim() == len(self.shape) - 1 > 1:  # a convolution without a batch
            return self(x[None])[0]
        codes, scale, zero = self.codes(x)
        if self._int_weight is not None:
            return self._product(self._int_weight, codes, scale, zero).to(x.dtype)
        rows = self.quantized_rows().to(x.device) if self._float_rows is None else self._float_rows
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            inputs = scale * (codes.float() - zero)
            return apply_weight(self.operator, inputs, rows, bias).to(x.dtype)

    @torch.no_grad()
    def codes(self, x: Float[Tensor, "..."]) -> tuple[UInt8[Tensor, "..."], Tensor, Tensor]:
        """Return the codes of an input at the current step, their scale and zero point.

        Both broadcast against the codes: one value, or one per sample.
        """
        context = self.context
        if context is None:
            raise InputError("timestep: the layer follows no sampling steps; attach it to a model")
        if self._ready_on != x.device:
            self.prepare_(x.device)
        multiplier, scale, zero = self._inputs_at(context, x)
        spread = (-1, *[1] * (x.dim() - 1))
        codes = activation_codes(
            x, multiplier, zero, 2**self.entry.act_bits - 1,
            channel_axis=channel_axis(self.operator),
        )  # fmt: skip
        return codes, scale.reshape(spread), zero.reshape(spread)

    def _inputs_at(self, context: TimestepContext, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return multiplier, scale and zero point; what they are at a step is remembered."""
        step = context.step
        if step in self._steps:
            return self._steps[step]
        scale = context.interpolate(self._act_scale, log=True)
        zero = context.interpolate(self._act_zero).round().clamp(0, 2**self.entry.act_bits - 1)
        if scale.shape[0] > 1:
            scale, zero = per_sample(scale, x), per_sample(zero, x)
        if self._smooth is None:
            multiplier = 1 / scale
            if len(multiplier) > 1:
                multiplier = multiplier.reshape(-1, *[1] * (x.dim() - 1))
        else:
            multiplier = activation_multiplier(self._smooth, scale)
        found = multiplier, scale, zero
        if step is not None:
            self._steps[step] = found
        return found

    def _product(self, weight: IntWeight, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if self.mode == "packed":
            made = self._codes_of_weight().to(codes.device)
            weight = weight.with_codes(made, _float(self.zero).to(codes.device))
        settings: dict[str, Any] = {"scale": scale, "zero": zero, "bias": self.bias}
        if len(self.shape) == 2:
            return int_linear(codes, weight, **settings)
        for name in ("stride", "padding", "dilation"):
            settings[name] = getattr(self.operator, name)
        if len(self.shape) == 4:
            return int_conv2d(codes, weight, **settings)
        for name in ("stride", "padding", "dilation"):
            settings[name] = settings[name][0]
        return int_conv1d(codes, weight, **settings)

    def _as_int_weight(self) -> IntWeight:
        """Return the weight ready for products, but without the codes if they stay packed."""
        codes = self._codes_of_weight()
        scale, zero = _float(self.scale), _float(self.zero)
        weight = IntWeight.from_codes(codes, scale=scale, zero=zero, groups=self._groups)
        if self.mode == "packed":
            return replace(weight, operand=weight.operand.new_empty(0))
        return weight

    def quantized_rows(self) -> Float[Tensor, "out in *kernel"]:
        """Return the pre-scaled weight that is stored, `Q(W s)`, in float32."""
        if self.entry.is_half:
            return float_of(self.qweight, torch.float16).float()
        rows = self._codes_of_weight().flatten(1).float()
        rows = (rows - _float(self.zero)[:, None]) * _float(self.scale)[:, None]
        return rows.view(self.shape)

    def _codes_of_weight(self) -> UInt8[Tensor, "out in *kernel"]:
        if self.qweight.device.type == "cpu" and not torch.compiler.is_compiling():
            return torch.from_numpy(self.packed_weight().codes())  # a third of the time
        rows, columns = self.shape[0], prod(self.shape[1:])
        parts, byte = [], 0
        for bits, count in self.entry.groups:
            size = row_nbytes(columns, bits)
            stored = self.qweight[byte : byte + count * size].view(count, size)
            parts.append(unpack_bits(stored, bits, columns))
            byte += count * size
        if self.row_order is None:
            return parts[0].view(self.shape)
        codes = parts[0].new_empty(rows, columns)
        return codes.index_copy(0, self.row_order.long(), torch.cat(parts)).view(self.shape)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "PackedLayer":
        super()._apply(fn, recurse)
        if self._ready_on is not None and self._ready_on != self.qweight.device:
            self.prepare_()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        bits = "+".join(f"{count}x{width}" for width, count in self.entry.groups)
        inputs = f"act_bits={self.entry.act_bits}, role={self.entry.role}"
        return f"{self.shape}, bits={bits}, {inputs}, mode={self.mode}"


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """Yield name and layer of every packed layer of a model."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            yield name, module


def set_mode(model: nn.Module, mode: str) -> None:
    """Switch all packed layers of a model to one of `MODES`; changes the model.

    Raises:
        ConfigError: no such mode, or the model has no packed layer.
    """
    layers = [layer for _, layer in packed_layers(model)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no packed layers; quantize it first")
    for layer in layers:
        layer.set_mode_(mode)


def _device(module: nn.Module) -> torch.device:
    return module.weight.device  # type: ignore[return-value, union-attr]


def _operator(module: nn.Module) -> nn.Module:
    """Return a module of the same settings without tensors."""
    kinds = (*LINEAR, *CONVOLUTIONS, *TRANSPOSED)
    kind: Any = next((kind for kind in kinds if isinstance(module, kind)), None)
    if kind is None:
        raise InputError(f"{type(module).__name__}: expected a linear layer or a convolution")
    if kind in LINEAR:
        names = ("in_features", "out_features")
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                 "groups", "padding_mode")  # fmt: skip
        names += ("output_padding",) if kind in TRANSPOSED else ()
    settings = {name: getattr(module, name) for name in names}
    operator = kind(bias=False, device="meta", **settings)
    operator.weight = None
    return operator


def _has_integer_kernel(operator: Any, shape: tuple[int, ...]) -> bool:
    if prod(shape[1:]) > _MAX_INNER or isinstance(operator, (nn.Conv3d, *TRANSPOSED)):
        return False
    if isinstance(operator, LINEAR):
        return True
    return operator.padding_mode == "zeros" and not isinstance(operator.padding, str)


def _require(name: str, key: str, values: Tensor, *, positive: bool = False) -> None:
    good = values.isfinite() & (values > 0) if positive else values.isfinite()
    if not bool(good.all()):
        place = int((~good.flatten()).nonzero()[0])
        raise InputError(
            f"{name}.{key}: expected a finite number{' > 0' if positive else ''}, found "
            f"{float(values.flatten()[place])} at {place}"
        )


def _half(values: Tensor, key: str) -> Tensor:
    half = values.detach().to(torch.float16, copy=True)
    if not torch.equal(half.to(values.dtype), values.detach()):
        raise InputError(f"{key}: found numbers that float16 has not; round them first")
    return half.contiguous()


def _float(bits: Int16[Tensor, " n"]) -> Float[Tensor, " n"]:
    return float_of(bits, torch.float16).float()


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
