"""Moving averages of gradients, kept by name in a pair's state."""

from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]  # tensors and numbers only; empty before the first step


def momentum(gradient: Tensor, state: State, name: str, beta: float) -> Tensor:
    """Nesterov's look-ahead of M ← βM + (1 − β)g, which is βM + (1 − β)g once more.

    Its size is not corrected for the start at zero: whoever takes its sign need not care.
    """
    mean: Tensor = state.setdefault(name, torch.zeros_like(gradient))
    mean.lerp_(gradient, 1 - beta)
    return mean.lerp(gradient, 1 - beta)


def adam(gradient: Tensor, state: State, name: str, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's direction m̂ / (√v̂ + eps); ``state["step"]`` counts from 1."""
    mean: Tensor = state.setdefault(f"{name}_mean", torch.zeros_like(gradient))
    square: Tensor = state.setdefault(f"{name}_square", torch.zeros_like(gradient))
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    step: int = state["step"]
    size = (square / (1 - betas[1] ** step)).sqrt()
    return mean / (1 - betas[0] ** step) / (size + eps)
