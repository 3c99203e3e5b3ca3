"""Full fine-tuning's optimizers, to compare adapters with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rankwise.train.recipe import Recipe

# AdamW's rate for what is no matrix among the targets; optimizers of pairs have the same for what is in no pair.
OTHERS_LR = 2e-4


@dataclass(frozen=True)
class Full:
    """One way to train the weights themselves.

    Attributes:
        learning_rate: where the search for its best begins.
        optimizer: (target weights, what else is trained, recipe) → optimizer.
    """

    learning_rate: float
    optimizer: Callable[[Sequence[Tensor], Sequence[Tensor], Recipe], torch.optim.Optimizer]


class Joint(torch.optim.Optimizer):
    """Several optimizers as one, so that a trainer schedules and steps them together."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each, at the rates that a schedule has set here."""
        loss = None if closure is None else closure()
        groups = iter(self.param_groups)
        for part in self.parts:
            # Anew each time: a state that is loaded, as accelerate does, replaces the groups here.
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.step()
        return loss


def _adamw(parameters: Sequence[Tensor], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return torch.optim.AdamW(list(parameters), lr, betas, weight_decay=recipe.weight_decay)


def adamw(weights: Sequence[Tensor], others: Sequence[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """torch's AdamW on everything."""
    return _adamw([*weights, *others], recipe.peak_learning_rate, recipe)


def muon(weights: Sequence[Tensor], others: Sequence[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """torch's Muon on the target weights, which are matrices; AdamW on what else is trained, as a new head."""
    matrices = torch.optim.Muon(list(weights), recipe.peak_learning_rate, weight_decay=recipe.weight_decay)
    return Joint(matrices, _adamw(others, OTHERS_LR, recipe)) if others else matrices


# Rates: AdamW's a tenth of LoRA's in short runs ("LoRA Without Regret"); Muon's as its author trains with it.
FULL: dict[str, Full] = {"adamw": Full(2e-4, adamw), "muon": Full(0.02, muon)}
