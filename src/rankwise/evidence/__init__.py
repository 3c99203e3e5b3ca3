"""Evidence: what an initialisation must have seen, of the training data or of the original weights."""

from rankwise.evidence.activations import InputCovariance, InputDirections, activations, covariances
from rankwise.evidence.collecting import collect, collect_gradients, gradients
from rankwise.evidence.exact import ExactGradient, exact_gradients
from rankwise.evidence.sketch import SketchedGradient
from rankwise.evidence.weights import weights

__all__ = [
    "ExactGradient",
    "InputCovariance",
    "InputDirections",
    "SketchedGradient",
    "activations",
    "collect",
    "collect_gradients",
    "covariances",
    "exact_gradients",
    "gradients",
    "weights",
]
