"""AdaLoRA inside transformers' `Trainer`: the allocator runs by itself."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.optim.rank_allocator import RankAllocator, adalora_layers

log = logging.getLogger("rankwise")


class AdaLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Scores, prunes and adds the orthogonality penalty's gradient; does nothing on a model without AdaLoRA.

    It may stand in any trainer. The penalty is not part of the logged loss, nor of what is clipped.
    """

    allocator: RankAllocator | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.allocator = RankAllocator(model, state.max_steps) if adalora_layers(model) else None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.allocator is not None:
            self.allocator.add_penalty_gradient()
            self.allocator.step(state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.allocator is not None and not self.allocator.finished:
            log.warning(
                "AdaLoRA: the run ended at step %d, before its pruning did; cut to a total rank of %d now",
                state.global_step,
                self.allocator.target,
            )
            self.allocator.finish()
