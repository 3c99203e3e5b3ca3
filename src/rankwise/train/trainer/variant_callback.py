"""What variants do beside the optimizer, inside transformers' `Trainer`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.adapted.adapted import active_specs
from rankwise.variants.base import TrainingHook, Variant


def training_hooks(model: nn.Module, steps: int) -> tuple[TrainingHook, ...]:
    """Those of the active adapters' variants, for a run of so many steps."""
    variants = {spec.variant for spec in active_specs(model).values() if isinstance(spec.variant, Variant)}
    made = [variant.training_hook(model, steps) for variant in variants]
    return tuple(hook for hook in made if hook is not None)


class VariantCallback(TrainerCallback):  # type: ignore[misc]
    """Calls the training hooks of the active adapters' variants (AdaLoRA's allocator); it may stand in any trainer."""

    hooks: tuple[TrainingHook, ...] = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.hooks = training_hooks(model, state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for hook in self.hooks:
            hook.before_step(state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for hook in self.hooks:
            hook.finish(state.global_step)
