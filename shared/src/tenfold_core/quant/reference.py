# SPDX-License-Identifier: Apache-2.0
"""The slow, obviously right twins of :mod:`.affine`, :mod:`.scales` and :mod:`.packing`.

Same names and settings, but one number at a time, in float64, arrays in and arrays out. Tests
hold the fast versions to these.
"""

from typing import Any

import numpy as np

__all__ = [
    "dequantize",
    "fake_quant",
    "init_scale",
    "pack_rows",
    "quantize",
    "unpack_rows",
]


def quantize(x: Any, scale: Any, zero: Any, qmax: Any) -> np.ndarray:
    """Return ``clamp(round(x / scale + zero), 0, qmax)`` with halves rounded to even."""
    x, scale, zero, qmax = _broadcast(x, scale, zero, qmax)
    codes = np.zeros(x.shape, np.uint8)
    for index in np.ndindex(x.shape):
        code = round(x[index] / scale[index] + zero[index])
        codes[index] = min(max(code, 0), int(qmax[index]))
    return codes


def dequantize(codes: Any, scale: Any, zero: Any) -> np.ndarray:
    """Return ``scale * (codes - zero)``."""
    codes, scale, zero = _broadcast(codes, scale, zero)
    values = np.zeros(codes.shape)
    for index in np.ndindex(codes.shape):
        values[index] = scale[index] * (codes[index] - zero[index])
    return values


def fake_quant(x: Any, scale: Any, zero: Any, qmax: Any) -> np.ndarray:
    """Return the values that the codes of ``x`` stand for."""
    return dequantize(quantize(x, scale, zero, qmax), scale, zero)


def init_scale(
    x: Any,
    bits: Any,
    *,
    method: str = "minmax",
    zero: str = "free",
    norm: float = 2.4,
    steps: int = 80,
    step_size: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and zero point, (rows, 1) each, by trying every candidate of every row."""
    x = np.asarray(x, dtype=np.float64)
    widths = np.broadcast_to(np.asarray(bits), (x.shape[0],))
    found = []
    for row, width in zip(x, widths.tolist(), strict=True):
        best = _candidate(row, width, zero, 1.0)
        least = _error(row, best, width, norm)
        for step in range(1, steps if method == "mse" else 1):
            trial = _candidate(row, width, zero, 1.0 - step * step_size)
            error = _error(row, trial, width, norm)
            if error < least:
                best, least = trial, error
        found.append(best)
    scales, zeros = zip(*found, strict=True)
    return np.array(scales)[:, None], np.array(zeros)[:, None]


def _candidate(row: np.ndarray, bits: int, zero: str, shrink: float) -> tuple[float, float]:
    """Return scale and zero point of one row whose range is narrowed to a share of itself."""
    low, high, qmax = float(row.min()), float(row.max()), 2**bits - 1
    if low == high:
        at = {"free": -np.sign(low), "int": float(low < 0), "symmetric": 2.0 ** (bits - 1)}
        return abs(low) or 1.0, at[zero]
    if zero == "symmetric":
        return shrink * max(-low, high) / (2 ** (bits - 1) - 1), 2.0 ** (bits - 1)
    if zero == "int":
        low, high = shrink * min(low, 0.0), shrink * max(high, 0.0)
        scale = (high - low) / qmax
        return scale, float(min(max(round(-low / scale), 0), qmax))
    middle, half = (low + high) / 2, shrink * (high - low) / 2
    scale = 2 * half / qmax
    return scale, -(middle - half) / scale


def _error(row: np.ndarray, parameters: tuple[float, float], bits: int, norm: float) -> float:
    total = 0.0
    for value in row.tolist():
        scale, zero = parameters
        code = min(max(round(value / scale + zero), 0), 2**bits - 1)
        total += abs(value - scale * (code - zero)) ** norm
    return total


def pack_rows(codes: Any, bits: int) -> np.ndarray:
    """Return the bit streams of a matrix of codes, written bit by bit."""
    codes = np.asarray(codes)
    rows, columns = codes.shape
    packed = np.zeros((rows, (columns * bits + 7) // 8), np.uint8)
    for row, column, bit in np.ndindex(rows, columns, bits):
        position = column * bits + bit
        packed[row, position // 8] |= (int(codes[row, column]) >> bit & 1) << position % 8
    return packed


def unpack_rows(data: Any, bits: int, columns: int) -> np.ndarray:
    """Return the codes of bit streams, read bit by bit."""
    data = np.asarray(data)
    codes = np.zeros((data.shape[0], columns), np.uint8)
    for row, column, bit in np.ndindex(data.shape[0], columns, bits):
        position = column * bits + bit
        codes[row, column] |= (int(data[row, position // 8]) >> position % 8 & 1) << bit
    return codes


def _broadcast(*values: Any) -> list[np.ndarray]:
    return list(np.broadcast_arrays(*(np.asarray(value, dtype=np.float64) for value in values)))
