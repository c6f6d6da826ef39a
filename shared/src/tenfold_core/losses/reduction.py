# SPDX-License-Identifier: Apache-2.0
"""One convention for masks and reductions, so that a weight means the same in every loss."""

from typing import Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from tenfold_core.errors import ConfigError, InputError

__all__ = ["Reduction", "reduce_terms"]

Reduction = Literal["none", "sum", "batchmean", "rows", "mean"]


def reduce_terms(
    terms: Float[Tensor, " batch *rows"],
    reduction: Reduction,
    *,
    mask: Bool[Tensor, " batch *#rows"] | None = None,
    elements: int = 1,
) -> Float[Tensor, "..."]:
    """Reduce the terms of a loss, one term per row.

    ====================  =====================================================================
    ``none``              the terms, zero where the mask is false
    ``sum``               their sum
    ``batchmean``         the sum over the number of samples in the batch
    ``rows``              the sum over the number of rows that the mask keeps
    ``mean``              the same, also over the ``elements`` each term summed up: what
                          :func:`torch.nn.functional.kl_div` calls ``mean``
    ====================  =====================================================================

    A batch whose rows are all masked gives 0.

    Args:
        terms: One number per row, for instance a row's divergence.
        reduction: As in the table.
        mask: Rows that count; of the terms' shape, or with 1 where it does not vary.
        elements: How many elements each term is a sum of.

    Raises:
        ConfigError: The reduction is not in the table, or ``elements`` is not positive.
        InputError: The mask is not boolean or does not fit the terms.

    Example:
        >>> reduce_terms(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), "batchmean")
        tensor(8.)
    """
    if reduction not in get_args(Reduction):
        known = ", ".join(get_args(Reduction))
        raise ConfigError(f"reduction is {reduction!r}, expected one of {known}")
    if elements < 1:
        raise ConfigError(f"elements is {elements}, expected at least 1")
    if mask is not None:
        mask = _fitting(mask, terms)
        terms = terms.masked_fill(~mask, 0)
    if reduction == "none":
        return terms
    total = terms.sum()
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / max(terms.shape[0], 1)
    kept = mask.sum().clamp(min=1) if mask is not None else max(terms.numel(), 1)
    return total / kept / (elements if reduction == "mean" else 1)


def _fitting(mask: Tensor, terms: Tensor) -> Tensor:
    shape, wanted = tuple(mask.shape), tuple(terms.shape)
    fits = len(shape) == len(wanted) and all(
        found in (1, size) for found, size in zip(shape, wanted, strict=True)
    )
    if not fits or mask.dtype.is_floating_point or mask.dtype.is_complex or mask.dtype.itemsize > 1:
        raise InputError(
            f"mask has shape {shape} and dtype {mask.dtype}, expected booleans of shape {wanted}; "
            "True marks a row that counts"
        )
    return mask.expand(wanted)
