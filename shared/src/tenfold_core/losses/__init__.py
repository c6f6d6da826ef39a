# SPDX-License-Identifier: Apache-2.0
"""Distillation losses that hold a student's tokens against a teacher's.

The first argument is the student, the second the teacher, which never receives a gradient. The
caller brings tokens as ``(batch, tokens, channels)``: no loss guesses which axis of a map is which.
"""

from tenfold_core.losses.reduction import Reduction, reduce_terms
from tenfold_core.losses.relation import cosine_distance, relation_kl

__all__ = ["Reduction", "cosine_distance", "reduce_terms", "relation_kl"]
