"""Evidence: what an initialisation must have seen, of the training data or of the original weights."""

from rankwise.evidence.activations import (
    InputCovariance,
    InputDirections,
    activations,
    covariances,
    input_covariances,
    input_directions,
)
from rankwise.evidence.exact import ExactGradient, exact_gradients
from rankwise.evidence.gradients import gradients
from rankwise.evidence.sketch import SketchedGradient
from rankwise.evidence.weights import stored_weights, weights

__all__ = [
    "ExactGradient",
    "InputCovariance",
    "InputDirections",
    "SketchedGradient",
    "activations",
    "covariances",
    "exact_gradients",
    "gradients",
    "input_covariances",
    "input_directions",
    "stored_weights",
    "weights",
]
