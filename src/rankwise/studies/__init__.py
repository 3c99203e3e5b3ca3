"""Studies: the experiments of the LoRA paper's section 7, and intrinsic dimension, on any model and data."""

from rankwise.studies.study import STUDIES, Outcome, Study, run_study, write_outcome

__all__ = ["STUDIES", "Outcome", "Study", "run_study", "write_outcome"]
