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
    gradient: Float[Tensor, "*n"],
    state: State,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    prefix: str = "",
) -> Float[Tensor, "*n"]:
    """m̂ / (√v̂ + eps) with bias-corrected moments, as torch.optim.AdamW has it; ``state`` is updated in place.

    Args:
        prefix: of the names in ``state``, where it holds the moments of several gradients.
    """
    step, first, second = (f"{prefix}{name}" for name in ("step", "exp_avg", "exp_avg_sq"))
    if step not in state:
        state |= {step: 0, first: torch.zeros_like(gradient), second: torch.zeros_like(gradient)}
    state[step] += 1
    mean, square = state[first], state[second]
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    # The corrections 1 − βᵗ are numbers: taken out of the division they cost one pass over the tensor, not two.
    correction_mean, correction_size = 1 - betas[0] ** state[step], (1 - betas[1] ** state[step]) ** 0.5
    size = square.sqrt().add_(eps * correction_size)
    return torch.div(mean, size, out=size).mul_(correction_size / correction_mean)


def momentum(gradient: Float[Tensor, "*n"], state: State, name: str, beta: float) -> Float[Tensor, "*n"]:
    """Nesterov's look-ahead of M ← βM + (1 − β)g, which is βM + (1 − β)g once more; M is ``state[name]``.

    Its size is not corrected for the start at zero: whoever takes its sign need not care.
    """
    mean: Tensor = state.setdefault(name, torch.zeros_like(gradient))
    mean.lerp_(gradient, 1 - beta)
    return mean.lerp(gradient, 1 - beta)
