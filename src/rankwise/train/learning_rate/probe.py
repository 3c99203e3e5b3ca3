"""A probe of a learning rate: a few steps from the start as it is, judged on batches held back; then all is as before.

The rate is constant over a probe. A short run whose rate falls to zero may prefer twice what suits a longer one; at a
constant rate it prefers the same (``benchmarks/learning_rate.py schedules``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.errors import Diverged


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Afterwards Python, NumPy and torch draw what they would have drawn before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Afterwards the model and the random states are, bit for bit, what they were: trained tensors, buffers, modes.

    Gradients are dropped.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*trained, *model.buffers())]
    # A forward may put another tensor in a buffer's place.
    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    try:
        with same_random_numbers():
            yield
    finally:
        for module, training, buffers in modules:
            module.training = training
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, before in tensors:
                tensor.copy_(before)
        model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Probe:
    """Rate → the mean loss of the batches held back, after a few steps at that rate.

    Attributes:
        model: which carries the adapter at its start.
        steps: the batches of each optimizer step, whose losses are averaged.
        held_back: batches that no step takes.
        loss: (model, batch) → mean loss.
        optimizer: rate → a new optimizer of all that is trained.
        before_step: called with the step's number, from 1, between clipping and the optimizer's step.
        max_grad_norm: to which gradients are clipped; 0: not at all.
    """

    model: nn.Module
    steps: Sequence[Sequence[Any]]
    held_back: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[float], torch.optim.Optimizer]
    before_step: Callable[[int], None] = lambda step: None
    max_grad_norm: float = 0.0

    def __call__(self, rate: float) -> float:
        """The loss held back. Model and random states are as before.

        Raises:
            Diverged: a loss that is not finite.
        """
        with restored(self.model):
            optimizer = self.optimizer(rate)
            self.model.train()
            for number, batches in enumerate(self.steps, 1):
                self._step(optimizer, number, batches)
            self.model.eval()
            with torch.no_grad():
                losses = [_finite(self.loss(self.model, batch), rate) for batch in self.held_back]
        return math.fsum(losses) / len(losses)

    def _step(self, optimizer: torch.optim.Optimizer, number: int, batches: Sequence[Any]) -> None:
        optimizer.zero_grad()
        for batch in batches:
            loss = self.loss(self.model, batch) / len(batches)
            _finite(loss, optimizer.param_groups[0]["lr"])
            loss.backward()  # type: ignore[no-untyped-call]
        if self.max_grad_norm:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        self.before_step(number)
        optimizer.step()


def _finite(loss: Tensor, rate: float) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise Diverged(f"a probe of learning rate {rate:g}: expected a finite loss, found {value}")
    return value
