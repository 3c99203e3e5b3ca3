"""The table of optimizers: each a set of options that builds a torch optimizer for a model with an adapter."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from rankwise.methods import Method
from rankwise.optim.lora_plus import param_groups
from rankwise.optim.lora_pro import LoraPro


class OptimizerChoice(ABC):
    """An optimizer's options (frozen dataclass fields); calling it builds the optimizer."""

    @abstractmethod
    def __call__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """An optimizer of everything trainable in ``model``, which carries an active adapter."""


@dataclass(frozen=True)
class AdamWChoice(OptimizerChoice):
    """torch's AdamW, one learning rate for A and B."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __call__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        groups = param_groups(model, lr=lr, lr_ratio=1, weight_decay=weight_decay)
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps)


@dataclass(frozen=True)
class LoraPlusChoice(OptimizerChoice):
    """torch's AdamW with lr(B) = lr_ratio · lr(A); ``lr_ratio`` a number or "derived" from each layer's shape."""

    lr_ratio: float | str = 16.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __call__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        groups = param_groups(model, lr=lr, lr_ratio=self.lr_ratio, weight_decay=weight_decay)
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps)


@dataclass(frozen=True)
class LoraProChoice(OptimizerChoice):
    """:class:`~rankwise.optim.lora_pro.LoraPro` in its SGD or AdamW form."""

    form: Literal["sgd", "adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __call__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        return LoraPro.for_model(model, lr, form=self.form, betas=self.betas, eps=self.eps, weight_decay=weight_decay)


OPTIMIZERS: dict[str, Method] = {
    "adamw": Method("rankwise.optim.table:AdamWChoice", "arXiv 1711.05101", "torch's AdamW on the pairs: the default"),
    "lora-plus": Method(
        "rankwise.optim.table:LoraPlusChoice",
        "arXiv 2402.12354",
        "AdamW with a larger learning rate for B than for A",
    ),
    "lora-pro": Method(
        "rankwise.optim.table:LoraProChoice",
        "arXiv 2407.18242",
        "moves the pair so that the weight moves as full fine-tuning would move it",
    ),
}
