"""Analysis: tensors → numbers. No plotting."""

from rankwise.analysis.alignment import Alignment, alignment, first_step, first_step_alignment, first_steps, full_step

__all__ = ["Alignment", "alignment", "first_step", "first_step_alignment", "first_steps", "full_step"]
