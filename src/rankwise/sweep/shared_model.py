"""One model, several runs: what each run sees of it as its own, and a forward pass of its trunk for all of them.

A run takes its turn on the model: its adapter is the active one, and the gradients, the model's forward (TRL and
accelerate put theirs on the instance) and the random numbers are its own. So everything that a trainer does with its
model, it does as if there were no other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

import rankwise as rw
from rankwise.adapted.adapted import Adapted

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class RandomNumbers:
    """The states of Python's, NumPy's and torch's generators."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Sequence[Tensor]

    @classmethod
    def now(cls) -> RandomNumbers:
        """As they are."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Set them."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def drawn_since(self) -> bool:
        """Whether torch has drawn a number since."""
        now = RandomNumbers.now()
        states = zip([self.torch, *self.cuda], [now.torch, *now.cuda], strict=True)
        return not all(torch.equal(before, after) for before, after in states)


@dataclass
class Seat:
    """One run's place at the model.

    Attributes:
        adapter: its name on the model.
        parameters: what it trains; nothing until its adapter is attached.
        gradients: of them, while others have the model.
        forward: that a trainer put on the model for this run; None: none did.
        training: whether the model is in training mode for it; TRL tells its figures of evaluations apart by that.
        random: the states that its next random numbers are drawn from.
        accumulation: where its trainer stands between two optimizer steps, which accelerate keeps for the process.
    """

    model: PreTrainedModel
    adapter: str
    parameters: list[nn.Parameter] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    forward: Any = None
    training: bool = False
    random: RandomNumbers = field(default_factory=RandomNumbers.now)
    accumulation: dict[str, Any] = field(default_factory=lambda: dict(vars(GradientState())))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The model is this run's for a while."""
        others, accumulation = RandomNumbers.now(), dict(vars(GradientState()))
        with _swapped_forward(self):
            adapted = Adapted.find(self.model)
            if adapted is not None and self.adapter in adapted.specs:
                rw.activate(self.model, self.adapter)
            self.put_gradients()
            set_mode(self.model, self.training)
            self.random.restore()
            vars(GradientState()).update(self.accumulation)
            try:
                yield
            finally:
                self.random, self.accumulation = RandomNumbers.now(), dict(vars(GradientState()))
                self.take_gradients()
                self.training = self.model.training
                others.restore()
                vars(GradientState()).update(accumulation)

    def sit(self) -> None:
        """Take what is trainable now for one's own: the adapter has just been attached."""
        self.parameters = rw.trainable_parameters(self.model)

    def put_gradients(self) -> None:
        """Hang the run's gradients on its parameters."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=False):
            parameter.grad = gradient

    def take_gradients(self) -> None:
        """Take them off, so that nobody else clips or drops them."""
        self.gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None


def set_mode(model: nn.Module, training: bool) -> None:
    """Training mode or not; a model of many adapters has thousands of modules, which are not gone over for nothing."""
    if model.training is not training:
        model.train(training)


@contextmanager
def _swapped_forward(seat: Seat) -> Iterator[None]:
    """While the context lasts, the model has the forward that was put on it for this run."""
    others = _put_forward(seat.model, seat.forward)
    try:
        yield
    finally:
        seat.forward = _put_forward(seat.model, others)


def _put_forward(module: nn.Module, forward: Any) -> Any:
    """Give a module a forward of its own, or its class's with None. Returns the one that it had."""
    before = vars(module).pop("forward", None)
    if forward is not None:
        vars(module)["forward"] = forward
    return before


class Trunk:
    """What of a model lies before its head: the part that is run for several runs' batches at once.

    The head, and so the loss, is each run's own: it is by far the largest thing in memory of a small model, and
    only one run's is there at a time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._module: nn.Module = model.base_model

    def forward(self, seats: Sequence[Seat], batches: Sequence[Batch]) -> Tensor:
        """The last hidden states of all the batches' rows, [rows, longest], each row with its run's adapter."""
        set_mode(self._model, True)
        names = [seat.adapter for seat, batch in zip(seats, batches, strict=True) for _ in batch["input_ids"]]
        with rw.route(self._model, names):
            output = self._module(**joined(batches, self._pad), use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @property
    def _pad(self) -> Mapping[str, int]:
        return {"input_ids": self._model.config.get_text_config().pad_token_id or 0}

    @contextmanager
    def giving(self, hidden: Tensor) -> Iterator[None]:
        """For a while the trunk has these hidden states for any input: its own, computed before with others'."""
        output = BaseModelOutputWithPast(last_hidden_state=hidden)
        before = _put_forward(self._module, lambda *_, **__: output)
        try:
            yield
        finally:
            _put_forward(self._module, before)


def joined(batches: Sequence[Batch], padding: Mapping[str, int]) -> dict[str, Tensor]:
    """The batches' rows below each other, padded on the right to the longest, without their labels.

    What is padded is masked, so the other columns are what they were.
    """
    length = max(batch["input_ids"].shape[1] for batch in batches)
    return {
        name: torch.cat(
            [functional.pad(b[name], (0, length - b[name].shape[1]), value=padding.get(name, 0)) for b in batches]
        )
        for name in batches[0]
        if name != "labels"
    }


def is_joinable(batch: Batch) -> bool:
    """Whether it is of rows of tokens with a mask, and nothing else."""
    tokens = [value for name, value in batch.items() if name != "labels"]
    ids = batch["input_ids"]
    return "attention_mask" in batch and all(isinstance(v, Tensor) and v.shape == ids.shape for v in tokens)


def row_ranges(batches: Sequence[Batch]) -> Iterator[slice]:
    """Where each batch's rows lie among all."""
    first = 0
    for batch in batches:
        rows = len(batch["input_ids"])
        yield slice(first, first + rows)
        first += rows
