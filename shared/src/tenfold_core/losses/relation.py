# SPDX-License-Identifier: Apache-2.0
"""Losses on relations between tokens: who is similar to whom, not what each token is.

A row of ``R = f f^T`` holds one token's cosines to all others; its softmax is a distribution that
the student's should match. The maps grow with the square of the tokens, so there is a form that
never holds more than a block of rows: with ``s`` the logits, a row's divergence has the gradient
``(softmax(s_student) - softmax(s_teacher)) / tau``, which a second pass over the blocks computes
again instead of keeping it.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tenfold_core.errors import ConfigError, InputError
from tenfold_core.losses.reduction import Reduction, reduce_terms

__all__ = ["cosine_distance", "relation_kl"]

_SHORTEST = 1e-8  # a shorter token has no direction: unit length would only amplify its noise


def relation_kl(
    student: Float[Tensor, "batch tokens student_channels"],
    teacher: Float[Tensor, "batch tokens teacher_channels"],
    *,
    student_keys: Float[Tensor, "groups keys student_channels"] | None = None,
    teacher_keys: Float[Tensor, "groups keys teacher_channels"] | None = None,
    memory: Float[Tensor, "keys student_channels"] | None = None,
    tau: float = 1.0,
    normalize: bool = True,
    reduction: Reduction = "sum",
    mask: Bool[Tensor, "batch tokens"] | None = None,
    chunk: int | None = None,
    rows: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "..."]:
    """Hold the student's relations between tokens against the teacher's.

    Per row ``i``: ``KL(softmax(R_teacher[i] / tau) || softmax(R_student[i] / tau))``, with
    ``R[i, j] = <f_i, f_j>`` over unit tokens ``f``. Computed in at least float32, also under
    autocast. A token of no length has relations of 0 and receives no gradient.

    What the rows are compared with:

    - nothing given: the tokens of their own sample;
    - ``student_keys`` and ``teacher_keys``: every group of keys, each with a softmax of its own.
      ``student_keys=student, teacher_keys=teacher`` is every ordered pair of samples;
    - ``memory``: one bank of constant keys for both sides.

    Args:
        student: Tokens that receive the gradient.
        teacher: As many tokens, of any width; constant.
        student_keys: Keys of the student; they receive a gradient too.
        teacher_keys: As many groups and keys for the teacher; constant.
        memory: Keys of both sides; constant, so the two widths must agree.
        tau: Temperature of both sides.
        normalize: Bring tokens and keys to unit length.
        reduction: See :func:`~tenfold_core.losses.reduce_terms`; a term is one row and one group
            (``none`` gives ``(batch, tokens, groups)``), its elements are the keys.
        mask: Tokens that take part: as rows and, without keys or memory, as keys.
        chunk: Rows a block. A block holds ``batch * chunk * tokens`` logits, or
            ``chunk * groups * keys`` with keys; None holds all rows at once.
        rows: Draw so many token positions without replacement. ``sum`` and ``batchmean`` are
            scaled by ``tokens / rows``, so that their expectation is the loss of all rows.
        generator: Where the draw comes from; required with ``rows``.

    Raises:
        ConfigError: A setting is out of range, or two of them exclude each other.
        InputError: Shapes, dtypes or devices do not fit.

    Example:
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        >>> relation_kl(student, teacher, reduction="rows")
        tensor(0.1109)
    """
    _check_settings(tau, chunk, rows, generator, reduction)
    _check_tokens(student, teacher, student_keys, teacher_keys, memory, mask)
    own = student_keys is None and memory is None
    if memory is not None:
        student_keys = teacher_keys = memory.detach()[None]
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        unit_s = _unit(student.to(dtype), normalize)
        unit_t = _unit(teacher.detach().to(dtype), normalize)
        keys_s = unit_s if student_keys is None else _unit(student_keys.to(dtype), normalize)
        keys_t = unit_t
        if teacher_keys is not None:
            keys_t = _unit(teacher_keys.detach().to(dtype), normalize)
        keys_mask, row_mask = (mask if own else None), mask
        tokens, scale = student.shape[1], 1.0
        if rows is not None and generator is not None and rows < tokens:
            index = torch.randperm(tokens, generator=generator, device=generator.device)[:rows]
            index = index.to(student.device)
            unit_s, unit_t = unit_s[:, index], unit_t[:, index]
            row_mask = None if mask is None else mask[:, index]
            scale = tokens / rows if reduction in ("sum", "batchmean") else 1.0
        batch, kept = unit_s.shape[:2]
        if not own:  # every row meets every group
            unit_s, unit_t = unit_s.flatten(0, 1)[None], unit_t.flatten(0, 1)[None]
        if chunk is None:
            terms = _divergence(unit_s, keys_s, unit_t, keys_t, keys_mask, tau)
        else:
            arguments = (unit_s, keys_s, unit_t, keys_t, keys_mask, tau, chunk)
            terms = _BlockwiseDivergence.apply(*arguments)
        terms = terms[..., None] if own else terms.view(-1, batch, kept).permute(1, 2, 0)
        row_mask = None if row_mask is None else row_mask[..., None]
        return scale * reduce_terms(terms, reduction, mask=row_mask, elements=keys_s.shape[1])


def cosine_distance(
    student: Float[Tensor, " batch *other"],
    teacher: Float[Tensor, " batch *other"],
    *,
    dim: int = -1,
    reduction: Reduction = "rows",
    mask: Bool[Tensor, " batch *rest"] | None = None,
) -> Float[Tensor, "..."]:
    """Return ``1 - cos`` between the two sides' vectors, 0 where they point the same way.

    A vector of no length has the cosine 0 with every other.

    Args:
        student: Vectors that receive the gradient.
        teacher: Vectors of the same shape; constant.
        dim: The axis that holds a vector's channels; not the batch.
        reduction: See :func:`~tenfold_core.losses.reduce_terms`; a term is one vector.
        mask: Vectors that count; the shape without ``dim``.

    Raises:
        ConfigError: ``dim`` names no axis of channels.
        InputError: Shapes, dtypes or devices do not fit.

    Example:
        >>> cosine_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.)
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; "
            "cosine_distance compares them vector by vector"
        )
    _check_side("teacher", teacher, student)
    if not -student.ndim <= dim < student.ndim or dim % student.ndim == 0:
        raise ConfigError(
            f"dim is {dim}, expected an axis of channels after the batch in {student.ndim} axes"
        )
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, torch.float32)
        product = _unit(student.to(dtype), True, dim) * _unit(teacher.detach().to(dtype), True, dim)
        return reduce_terms(1 - product.sum(dim), reduction, mask=mask)


class _BlockwiseDivergence(torch.autograd.Function):
    """Divergence of every row, a block at a time; backward computes the blocks again."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_s: Tensor,
        keys_s: Tensor,
        rows_t: Tensor,
        keys_t: Tensor,
        mask: Tensor | None,
        tau: float,
        chunk: int,
    ) -> Tensor:
        ctx.save_for_backward(rows_s, keys_s, rows_t, keys_t, mask)
        ctx.tau, ctx.chunk = tau, chunk
        parts = [
            _divergence(rows_s[:, block], keys_s, rows_t[:, block], keys_t, mask, tau)
            for block in _blocks(rows_s.shape[1], chunk)
        ]
        return torch.cat(parts, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        rows_s, keys_s, rows_t, keys_t, mask = ctx.saved_tensors
        wants_rows, wants_keys, *_ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows_s) if wants_rows else None
        grad_keys = torch.zeros_like(keys_s) if wants_keys else None
        with torch.autocast(rows_s.device.type, enabled=False):
            for block in _blocks(rows_s.shape[1], ctx.chunk):
                pull = _log_rows(rows_s[:, block], keys_s, mask, ctx.tau).exp_()
                pull -= _log_rows(rows_t[:, block], keys_t, mask, ctx.tau).exp_()
                pull *= grad[:, block, None] / ctx.tau
                if grad_rows is not None:
                    grad_rows[:, block] = _to_rows(pull, keys_s, rows_s.shape[0])
                if grad_keys is not None:
                    grad_keys += pull.mT @ rows_s[:, block]
        return grad_rows, grad_keys, None, None, None, None, None


def _divergence(
    rows_s: Tensor,
    keys_s: Tensor,
    rows_t: Tensor,
    keys_t: Tensor,
    mask: Tensor | None,
    tau: float,
) -> Tensor:
    log_s, log_t = _log_rows(rows_s, keys_s, mask, tau), _log_rows(rows_t, keys_t, mask, tau)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def _log_rows(rows: Tensor, keys: Tensor, mask: Tensor | None, tau: float) -> Tensor:
    """Return (groups, rows, keys) log-probabilities; one set of rows serves all groups."""
    logits = rows @ keys.mT / tau
    if mask is not None:  # finite, so that the difference of two masked logits is 0 and not NaN
        logits = logits.masked_fill(~mask[:, None], torch.finfo(logits.dtype).min / 2)
    return logits.log_softmax(-1)


def _to_rows(pull: Tensor, keys: Tensor, sets: int) -> Tensor:
    """Carry a block's gradient to its rows, summed over the groups that share them."""
    if sets == keys.shape[0]:
        return pull @ keys
    return (pull.transpose(0, 1).flatten(1) @ keys.flatten(0, 1))[None]


def _blocks(size: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, size, chunk)]


def _unit(tokens: Tensor, normalize: bool, dim: int = -1) -> Tensor:
    if not normalize:
        return tokens
    length = torch.linalg.vector_norm(tokens, dim=dim, keepdim=True)
    return torch.where(length > _SHORTEST, tokens / length.clamp(min=_SHORTEST), 0)


def _check_settings(
    tau: float,
    chunk: int | None,
    rows: int | None,
    generator: torch.Generator | None,
    reduction: Reduction,
) -> None:
    if not (math.isfinite(tau) and tau > 0):
        raise ConfigError(f"tau is {tau}, expected a positive finite temperature")
    for name, value in (("chunk", chunk), ("rows", rows)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1, or None for all rows")
    if rows is not None and generator is None:
        raise ConfigError(f"rows is {rows} without a generator; pass generator=torch.Generator()")
    if rows is not None and reduction == "none":
        raise ConfigError("reduction 'none' cannot place sampled rows; use another or rows=None")


def _check_tokens(
    student: Tensor,
    teacher: Tensor,
    student_keys: Tensor | None,
    teacher_keys: Tensor | None,
    memory: Tensor | None,
    mask: Tensor | None,
) -> None:
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise InputError(
            f"student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; expected "
            "(batch, tokens, channels) with the same batch and tokens"
        )
    if not student.numel() or not teacher.numel():
        raise InputError(f"student has shape {tuple(student.shape)}: there is nothing to relate")
    _check_side("teacher", teacher, student)
    if (student_keys is None) != (teacher_keys is None):
        raise ConfigError("student_keys and teacher_keys come together or not at all")
    if memory is not None and student_keys is not None:
        raise ConfigError("memory and student_keys exclude each other: both are keys")
    if memory is not None:
        _check_keys("memory", memory[None] if memory.ndim == 2 else memory, student)
        _check_keys("memory", memory[None], teacher)
    if student_keys is not None and teacher_keys is not None:
        _check_keys("student_keys", student_keys, student)
        _check_keys("teacher_keys", teacher_keys, teacher)
        if student_keys.shape[:2] != teacher_keys.shape[:2]:
            raise InputError(
                f"student_keys has shape {tuple(student_keys.shape)}, teacher_keys "
                f"{tuple(teacher_keys.shape)}; expected the same groups and keys"
            )
    if mask is not None and (mask.shape != student.shape[:2] or mask.dtype != torch.bool):
        raise InputError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}, expected booleans of "
            f"shape {tuple(student.shape[:2])} (batch, tokens)"
        )


def _check_keys(name: str, keys: Tensor, tokens: Tensor) -> None:
    if keys.ndim != 3 or not keys.numel() or keys.shape[-1] != tokens.shape[-1]:
        raise InputError(
            f"{name} has shape {tuple(keys.shape)}, expected (groups, keys, {tokens.shape[-1]}) "
            "with at least one key, as wide as the tokens they are compared with"
        )
    _check_side(name, keys, tokens)


def _check_side(name: str, side: Tensor, student: Tensor) -> None:
    if not side.is_floating_point() or not student.is_floating_point():
        raise InputError(f"{name} is {side.dtype}, student {student.dtype}; expected floats")
    if side.device != student.device:
        raise InputError(f"{name} is on {side.device}, student on {student.device}; move one")
