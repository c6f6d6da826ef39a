# SPDX-License-Identifier: Apache-2.0
"""First scale and zero point of every row: its range, or the shrunk range of least error.

The search is that of LAPQ (Nahshan et al., 2021): shrink the range step by step and keep the one
with the least ``sum |x - x_hat|**norm``. A free zero point shrinks the range about its middle,
because 0 need not be a code; an integer one shrinks it about 0, which stays a code. All rows of
a block go through a candidate together, and blocks bound the memory beside ``x`` itself.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant.affine import check_finite, max_code

__all__ = ["Method", "Zero", "init_scale"]

Method = Literal["minmax", "mse"]
"""``minmax``: the whole range. ``mse``: the shrunk range of least error."""

Zero = Literal["free", "int", "symmetric"]
"""``free``: any real number. ``int``: one of the codes. ``symmetric``: ``2**(bits-1)``."""

# Elements of a block, of which the search holds three copies. On a CPU they should fit the cache:
# 1 M took half the time of 16 M (4096 x 1152 on a Xeon). A GPU wants large ones.
_BLOCK_CPU, _BLOCK_DEVICE = 1 << 20, 1 << 24


@torch.no_grad()
def init_scale(
    x: Float[Tensor, "..."],
    bits: int | Int[Tensor, " rows"],
    *,
    method: Method = "minmax",
    zero: Zero = "free",
    norm: float = 2.4,
    steps: int = 80,
    step_size: float = 0.01,
    name: str = "x",
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Return a scale and a zero point for every row of ``x``.

    ``mse`` tries the whole range times ``1 - i * step_size`` for ``i < steps`` and keeps the
    widest of least error, so it is never worse than ``minmax`` in that norm. ``int`` widens the
    range to include 0; ``symmetric`` uses the codes ``-2**(bits-1)`` to ``2**(bits-1) - 1``,
    written as unsigned codes around the zero point ``2**(bits-1)``. A constant row comes back
    exactly in all three.

    Args:
        x: The matrix, or a vector, which counts as one row.
        bits: Width of the codes, or one for each row of a matrix.
        method: How the range is chosen.
        zero: Kind of zero point.
        norm: Exponent of the error (LAPQ: 2.4; 2 is the mean squared error).
        steps: Number of candidates.
        step_size: Share of the range by which a candidate is narrower than the one before.
        name: What errors call ``x``.

    Shapes:
        ``x`` (rows, columns) gives two of (rows, 1); (columns,) gives two of (). Both are float32,
        or float64 if ``x`` is.

    Raises:
        ConfigError: A setting is out of its range.
        InputError: ``x`` holds NaN or infinities, has no column, or neither 1 nor 2 dimensions.
    """
    _check_settings(bits, method, zero, norm, steps, step_size)
    if x.dim() not in (1, 2) or x.shape[-1] == 0:
        raise InputError(
            f"{name}: expected (rows, columns) or (columns,) with at least one column, "
            f"found shape {tuple(x.shape)}; flatten a convolution's weight first"
        )
    rows = x.unsqueeze(0) if x.dim() == 1 else x
    if isinstance(bits, Tensor) and bits.shape != rows.shape[:1]:
        raise ConfigError(f"bits: expected {rows.shape[0]} rows, found {tuple(bits.shape)}")
    check_finite(x, name)
    scale, zeros = _init_rows(rows, bits, method, zero, norm, steps, step_size)
    return (scale.squeeze(), zeros.squeeze()) if x.dim() == 1 else (scale, zeros)


def _init_rows(
    x: Tensor,
    bits: int | Tensor,
    method: Method,
    zero: Zero,
    norm: float,
    steps: int,
    step_size: float,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    low, high = (edge.to(dtype) for edge in torch.aminmax(x, dim=1, keepdim=True))
    constant = low == high
    qmax = torch.as_tensor(max_code(bits), dtype=dtype, device=x.device).expand_as(low)
    scale, middle, zeros = _whole_range(low, high, qmax, zero)
    if method == "mse":
        shrink = 1 - step_size * torch.arange(steps, dtype=dtype, device=x.device)
        scale = scale * _best_shrink(x, scale, middle, zeros, qmax, shrink, norm)
    if zero == "free":
        zeros = zeros - middle / scale
    exact = torch.where(low == 0, torch.ones_like(low), low.abs())
    at = {"free": -low.sign(), "int": (low < 0).to(dtype), "symmetric": zeros}[zero]
    return torch.where(constant, exact, scale), torch.where(constant, at, zeros)


def _whole_range(
    low: Tensor, high: Tensor, qmax: Tensor, zero: Zero
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, middle and the code of the middle, which shrinking leaves where they are."""
    most = torch.maximum(-low, high)
    middle = torch.zeros_like(low)
    if zero == "symmetric":
        centre = (qmax + 1) / 2
        scale = most / (centre - 1)
    elif zero == "int":
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = high / qmax - low / qmax
        centre = None
    else:
        scale = high / qmax - low / qmax
        middle, centre = low / 2 + high / 2, qmax / 2
    scale = scale.clamp(min=torch.finfo(low.dtype).tiny)  # rows of zeros, or of subnormal spread
    if centre is None:
        centre = torch.clamp(torch.round(-low / scale), torch.zeros_like(qmax), qmax)
    return scale, middle, centre


def _best_shrink(
    x: Tensor,
    scale: Tensor,
    middle: Tensor,
    centre: Tensor,
    qmax: Tensor,
    shrink: Tensor,
    norm: float,
) -> Tensor:
    """Return the factor of least error for every row, (rows, 1)."""
    block = _BLOCK_CPU if x.device.type == "cpu" else _BLOCK_DEVICE
    row_block = max(1, block // max(x.shape[1], len(shrink)))  # errors has len(shrink) rows
    best = torch.empty_like(scale)
    for start in range(0, x.shape[0], row_block):
        part = slice(start, start + row_block)
        errors = scale.new_zeros(len(shrink), len(scale[part]))
        for columns in x[part].split(block, dim=1):
            position = (columns - middle[part]) / scale[part]
            _add_errors(errors, position, centre[part], qmax[part], shrink, norm)
        errors *= shrink.pow(norm).unsqueeze(1)
        best[part] = shrink[errors.argmin(0)].unsqueeze(1)
    return best


def _add_errors(
    errors: Tensor, position: Tensor, centre: Tensor, qmax: Tensor, shrink: Tensor, norm: float
) -> None:
    """Add to ``errors[i]`` every row's error under candidate ``i``, in units of its own step."""
    exact, codes = torch.empty_like(position), torch.empty_like(position)
    for i, factor in enumerate(shrink.tolist()):
        torch.add(centre, position, alpha=1 / factor, out=exact)
        torch.round(exact, out=codes)
        # Twice as fast in all as torch.clamp with a tensor; nothing here needs its gradient.
        torch.minimum(codes.clamp_(min=0), qmax, out=codes)
        exact -= codes
        errors[i] += _power(exact, norm).sum(1)


def _power(x: Tensor, norm: float) -> Tensor:
    """Overwrite ``x`` with ``|x|**norm``; a third of the time of ``pow_`` on a CPU."""
    if norm == 2:
        return x.square_()
    return x.abs_().log_().mul_(norm / math.log(2)).exp2_()


def _check_settings(
    bits: int | Tensor, method: str, zero: str, norm: float, steps: int, step_size: float
) -> None:
    max_code(bits)
    if method not in get_args(Method):
        raise ConfigError(f"method: expected 'minmax' or 'mse', found {method!r}")
    if zero not in get_args(Zero):
        raise ConfigError(f"zero: expected 'free', 'int' or 'symmetric', found {zero!r}")
    if zero == "symmetric" and bool((torch.as_tensor(bits) < 2).any()):
        raise ConfigError("bits: symmetric codes need at least 2 bits, found 1; use zero='free'")
    if not norm > 0:
        raise ConfigError(f"norm: expected a positive number, found {norm!r}")
    if steps < 1 or step_size <= 0 or (steps - 1) * step_size >= 1:
        raise ConfigError(
            f"steps, step_size: {steps} steps of {step_size} leave no range; "
            "expected (steps - 1) * step_size < 1"
        )
