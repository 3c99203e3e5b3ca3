"""Analysis: tensors → numbers. No plotting."""

from rankwise.analysis.alignment import (
    Alignment,
    alignment,
    every_first_step,
    first_step,
    first_step_alignment,
    full_step,
)
from rankwise.analysis.change import intruder_dimensions, merge_loss, relative_size
from rankwise.analysis.random_subspace import leave_random_subspace, train_in_random_subspace
from rankwise.analysis.rank_advice import RankAdvice, StepSpectrum, advise_ranks, step_spectrum
from rankwise.analysis.scanning import Finding, Scan, scan
from rankwise.analysis.spectrum import effective_rank, energy_captured, stable_rank
from rankwise.analysis.subspace import Amplification, amplification, grassmann_distance, subspace_similarity

__all__ = [
    "Alignment",
    "Amplification",
    "Finding",
    "RankAdvice",
    "Scan",
    "StepSpectrum",
    "advise_ranks",
    "alignment",
    "amplification",
    "effective_rank",
    "energy_captured",
    "every_first_step",
    "first_step",
    "first_step_alignment",
    "full_step",
    "grassmann_distance",
    "intruder_dimensions",
    "leave_random_subspace",
    "merge_loss",
    "relative_size",
    "scan",
    "stable_rank",
    "step_spectrum",
    "subspace_similarity",
    "train_in_random_subspace",
]
