"""Directions that look at each entry by itself: SGD's and AdamW's, as pure functions."""

from typing import Any

import torch
from torch import Tensor

from rankwise.shapes import Float

State = dict[str, Any]  # of one tensor or pair: tensors and numbers by name; empty before the first step


def sgd_direction(gradient: Float[Tensor, "*n"], state: State) -> Float[Tensor, "*n"]:
    """The gradient."""
    return gradient


def adam_direction(
    gradient: Float[Tensor, "*n"], state: State, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Float[Tensor, "*n"]:
    """m̂ / (√v̂ + eps) with bias-corrected moments, as torch.optim.AdamW has it; ``state`` is updated in place."""
    if not state:
        state["step"] = 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    # The corrections 1 − βᵗ are numbers: taken out of the division they cost one pass over the tensor, not two.
    correction_mean, correction_size = 1 - betas[0] ** state["step"], (1 - betas[1] ** state["step"]) ** 0.5
    size = square.sqrt().add_(eps * correction_size)
    return torch.div(mean, size, out=size).mul_(correction_size / correction_mean)
