"""An optimizer as a row of the table has it: options as plain values, and a call that builds it for a model."""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from rankwise.optim.pair_optimizer import PairOptimizer


class OptimizerChoice(ABC):
    """An optimizer's options (frozen dataclass fields); calling it builds the optimizer."""

    @abstractmethod
    def __call__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        """An optimizer of everything trainable in ``model``, which carries an active adapter."""


class GroupsChoice(OptimizerChoice):
    """A choice that is parameter groups for any torch optimizer; AdamW unless someone else steps them."""

    @abstractmethod
    def groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Every trainable tensor of ``model``, once."""

    def __call__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.groups(model, lr, weight_decay), lr=lr)


@dataclass(frozen=True)
class PairChoice(OptimizerChoice):
    """A pair optimizer for everything trainable; :func:`choice_of` adds the optimizer's own options.

    Attributes:
        others_lr: the learning rate of what is in no pair; None: that of the pairs.
    """

    optimizer: ClassVar[type[PairOptimizer]]
    others_lr: float | None = None

    def __call__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> PairOptimizer:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return self.optimizer.for_model(model, lr, weight_decay=weight_decay, **options)


def choice_of(optimizer: type[PairOptimizer]) -> type[PairChoice]:
    """The choice whose options are the optimizer's own: the keywords of its constructor, with their defaults.

    >>> from rankwise.optim import LoraPro
    >>> choice_of(LoraPro)(form="sgd")
    LoraProChoice(others_lr=None, form='sgd', betas=(0.9, 0.999), eps=1e-08)
    """
    shared = ("self", "pairs", "lr", "weight_decay", "others")
    keywords = inspect.signature(optimizer.__init__).parameters.values()
    options = [
        (keyword.name, keyword.annotation, keyword.default) for keyword in keywords if keyword.name not in shared
    ]
    namespace = {"optimizer": optimizer, "__doc__": optimizer.__doc__, "__module__": optimizer.__module__}
    name = f"{optimizer.__name__}Choice"
    return make_dataclass(name, options, bases=(PairChoice,), frozen=True, namespace=namespace)
