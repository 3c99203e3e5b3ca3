"""Along a run: how far the adapter's next step agrees with full fine-tuning's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.analysis import Alignment, every_first_step
from rankwise.train.data.dataset import Batch

Loss = Callable[[nn.Module, Batch], Tensor]


class AlignmentCallback(TrainerCallback):  # type: ignore[misc]
    """Measures before the first step and after every ``steps``-th, always on the same batches.

    Attributes:
        measured: step → optimizer → site → alignment.
    """

    def __init__(self, batches: Sequence[Batch], steps: int, loss: Loss) -> None:
        self.measured: dict[int, dict[str, dict[str, Alignment]]] = {}
        self._batches, self._steps, self._loss = batches, steps, loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._measure(state.global_step, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._steps == 0:
            self._measure(state.global_step, kwargs["model"])

    def _measure(self, step: int, model: Any) -> None:
        self.measured[step] = every_first_step(model, self._batches, loss=self._loss)
