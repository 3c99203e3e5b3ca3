"""Analysis: tensors → numbers. No plotting."""

from rankwise.analysis.alignment import Alignment, alignment, first_step, first_step_alignment, first_steps, full_step
from rankwise.analysis.rank_advice import RankAdvice, StepSpectrum, advise_ranks, step_spectrum
from rankwise.analysis.subspace import Amplification, amplification, subspace_similarity

__all__ = [
    "Alignment",
    "Amplification",
    "RankAdvice",
    "StepSpectrum",
    "advise_ranks",
    "alignment",
    "amplification",
    "first_step",
    "first_step_alignment",
    "first_steps",
    "full_step",
    "step_spectrum",
    "subspace_similarity",
]
