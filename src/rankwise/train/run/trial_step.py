"""One step before the run: the loss is a number, every adapter gets a gradient, and what it all takes of memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import NoGradient, TrainingError

_ADAM = 2  # numbers that it keeps for each trained one


@dataclass(frozen=True)
class TrialStep:
    """What one step showed.

    Attributes:
        loss: of the batch.
        idle: sites whose adapter got no gradient (experts that no token of the batch chose, say).
        weights: bytes of the model with its adapter.
        training: bytes of the gradients and Adam's moments.
        activations: bytes that the forward pass keeps for the backward.
        available: bytes of the device, or of the machine.
    """

    loss: float
    idle: list[str]
    weights: int
    training: int
    activations: int
    available: int

    @property
    def needed(self) -> int:
        """Bytes of it all: what is allocated for a moment inside an operation comes on top."""
        return self.weights + self.training + self.activations


def try_step(
    model: PreTrainedModel, batch: Mapping[str, Tensor], loss_of: Callable[[nn.Module, Any], Tensor]
) -> TrialStep:
    """A forward and a backward pass on a batch as in training; then gradients and random state are as before.

    Args:
        loss_of: (model, batch) → its loss.

    Raises:
        TrainingError: the loss or a gradient is not finite.
        NoGradient: no adapter gets a gradient that is not zero.
    """
    trained = rw.trainable_parameters(model)
    kept = _Kept(model)
    with _as_in_training(model), torch.autograd.graph.saved_tensors_hooks(kept.count, lambda tensor: tensor):
        loss = loss_of(model, batch)
        _check_loss(float(loss.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        idle = _idle(model)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    moving = sum(tensor.numel() * tensor.element_size() for tensor in trained) * (1 + _ADAM)
    return TrialStep(float(loss.detach()), idle, weights, moving, kept.total, _memory(loss.device))


@contextmanager
def _as_in_training(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=_kind(device)):
        try:
            model.train()
            yield
        finally:
            model.train(training)
            model.zero_grad(set_to_none=True)


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


class _Kept:
    """Bytes kept for the backward pass, each storage once and the weights not counted."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.total = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}

    def count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _check_loss(loss: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the first batch: expected a finite loss, found {loss}, before any step. Nothing was trained: check the "
            "base model (a corrupt download, float16 that overflows: try dtype: float32) and the data's first samples"
        )


def _idle(model: PreTrainedModel) -> list[str]:
    """Sites without a gradient.

    Raises:
        TrainingError: one that is not finite. NoGradient: no site has one.
    """
    adapted = Adapted.of(model)
    idle, layers = [], adapted.adapter_layers(adapted.adapter_name(None))
    for name, layer in layers.items():
        gradients = [tensor.grad for tensor in layer.parameters() if tensor.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise TrainingError(
                f"{name}: expected finite gradients of the first batch, found NaN or infinity, before any step. "
                "Nothing was trained: try dtype: float32, or another init"
            )
        if not any(bool(gradient.any()) for gradient in gradients):
            idle.append(name)
    if len(idle) == len(layers):
        raise NoGradient(
            f"{idle[0]} and the {len(idle) - 1} other adapted layers: expected gradients of the first batch, found "
            "nothing but zeros, so nothing would be trained. Choose target_modules that the loss depends on"
        )
    return idle


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
