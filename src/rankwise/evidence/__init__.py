"""Evidence: what an initialisation must have seen of the training data."""

from rankwise.evidence.gradients import ExactGradient, exact_gradients, gradients

__all__ = ["ExactGradient", "exact_gradients", "gradients"]
