"""Analysis: tensors → numbers. No plotting."""

from rankwise.analysis.alignment import Alignment, alignment, first_step, first_step_alignment, first_steps, full_step
from rankwise.analysis.subspace import Amplification, amplification, subspace_similarity

__all__ = [
    "Alignment",
    "Amplification",
    "alignment",
    "amplification",
    "first_step",
    "first_step_alignment",
    "first_steps",
    "full_step",
    "subspace_similarity",
]
