# SPDX-License-Identifier: Apache-2.0
"""The losses one number at a time, in Python floats; for tests and small questions only.

Same names as the fast forms, without their settings for memory. Nothing here has a gradient.
"""

import math

from torch import Tensor

__all__ = ["cosine_distance", "reduce_terms", "relation_kl"]


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    memory: Tensor | None = None,
    tau: float = 1.0,
    normalize: bool = True,
    reduction: str = "sum",
    mask: Tensor | None = None,
) -> float | list[list[list[float]]]:
    """Return :func:`tenfold_core.losses.relation_kl` by loops over samples, rows and groups."""
    if memory is not None:
        student_keys = teacher_keys = memory[None]
    rows_s, rows_t = _units(student, normalize), _units(teacher, normalize)
    own = student_keys is None or teacher_keys is None
    groups_s = rows_s if own else _units(student_keys, normalize)
    groups_t = rows_t if own else _units(teacher_keys, normalize)
    terms, keep = [], []
    for sample in range(len(rows_s)):
        terms.append([])
        keep.append([])
        for row in range(len(rows_s[sample])):
            terms[-1].append([])
            keep[-1].append(mask is None or bool(mask[sample, row]))
            for group in [sample] if own else range(len(groups_s)):
                keys = [
                    key
                    for key in range(len(groups_s[group]))
                    if not own or mask is None or bool(mask[sample, key])
                ]
                found = [_dot(rows_s[sample][row], groups_s[group][key]) / tau for key in keys]
                wanted = [_dot(rows_t[sample][row], groups_t[group][key]) / tau for key in keys]
                terms[-1][-1].append(_kl(_softmax(wanted), _softmax(found)))
    return reduce_terms(terms, reduction, keep, elements=len(groups_s[0]))


def cosine_distance(
    student: Tensor, teacher: Tensor, *, reduction: str = "rows", mask: Tensor | None = None
) -> float | list[list[list[float]]]:
    """Return :func:`tenfold_core.losses.cosine_distance` of (batch, tokens, channels)."""
    rows_s, rows_t = _units(student, True), _units(teacher, True)
    terms = [
        [[1 - _dot(s, t)] for s, t in zip(*sample, strict=True)]
        for sample in zip(rows_s, rows_t, strict=True)
    ]
    keep = [
        [mask is None or bool(mask[sample, row]) for row in range(len(terms[sample]))]
        for sample in range(len(terms))
    ]
    return reduce_terms(terms, reduction, keep)


def reduce_terms(
    terms: list[list[list[float]]], reduction: str, keep: list[list[bool]], *, elements: int = 1
) -> float | list[list[list[float]]]:
    """Return :func:`tenfold_core.losses.reduce_terms` of terms by batch, row and group."""
    if reduction == "none":
        return [
            [[term if kept else 0.0 for term in row] for row, kept in zip(*sample, strict=True)]
            for sample in zip(terms, keep, strict=True)
        ]
    total, count = 0.0, 0
    for sample in range(len(terms)):
        for row in range(len(terms[sample])):
            if keep[sample][row]:
                total += sum(terms[sample][row])
                count += len(terms[sample][row])
    count = max(count, 1)
    divisor = {"sum": 1, "batchmean": len(terms), "rows": count, "mean": count * elements}
    return total / divisor[reduction]


def _units(tokens: Tensor | None, normalize: bool) -> list[list[list[float]]]:
    if tokens is None:
        return []
    samples = tokens.detach().double().tolist()
    if not normalize:
        return samples
    return [[_unit(token) for token in sample] for sample in samples]


def _unit(token: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in token))
    return [value / length if length > 1e-8 else 0.0 for value in token]


def _dot(left: list[float], right: list[float]) -> float:
    return sum((a * b for a, b in zip(left, right, strict=True)), 0.0)


def _softmax(logits: list[float]) -> list[float]:
    top = max(logits, default=0.0)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


def _kl(wanted: list[float], found: list[float]) -> float:
    return sum((p * math.log(p / q) for p, q in zip(wanted, found, strict=True) if p > 0), 0.0)
