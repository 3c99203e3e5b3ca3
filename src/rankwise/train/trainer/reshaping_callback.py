"""`restart_every` and `ship_rank`: what happens to the pairs between two steps, inside transformers' `Trainer`.

It happens before a checkpoint of that step is written, so that a run that goes on from there does not repeat it, and
depends on the step alone, so that one that goes on from before does.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.errors import RecipeError
from rankwise.reshaping import narrow, restart

if TYPE_CHECKING:
    from rankwise.train.trainer.trainer import AdapterTrainer

WIDE = "wide"  # the adapter before it was squeezed, in the run's directory


class ReshapingCallback(TrainerCallback):  # type: ignore[misc]
    """Restarts the pairs of a trainer's model, and cuts them to the rank that is shipped."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self._trainer, self._recipe = trainer, trainer.recipe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            raise RecipeError(f"`restart_every`, `ship_rank`: expected one process, found {args.world_size}")
        if self._ship_step(state) < 1:
            raise RecipeError(
                f"`ship_steps`: expected fewer than the run's {state.max_steps} steps, whose last they are, found "
                f"{self._recipe.ship_steps}"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if Adapted.find(self._trainer.model) is None:  # full fine-tuning, to compare with
            return
        every, step = self._recipe.restart_every, state.global_step
        flags = copy(vars(control))  # an evaluation resets them
        if self._recipe.ship_rank is not None and step == self._ship_step(state):
            self._ship(self._recipe.ship_rank)
        elif every is not None and step % every == 0 and step < self._ship_step(state):
            self._restart(step)
        vars(control).update(flags)

    def _ship_step(self, state: TrainerState) -> int:
        """The last step of the wide adapter; without `ship_rank` the run's last."""
        return int(state.max_steps - (self._recipe.ship_steps if self._recipe.ship_rank is not None else 0))

    def _restart(self, step: int) -> None:
        trainer, recipe = self._trainer, self._recipe
        with torch.random.fork_rng():
            restart(
                trainer.model,
                trainer.batches_to_come(recipe.init_batches * recipe.gradient_accumulation_steps),
                seed=recipe.seed + step,
                kept_rank=recipe.restart_rank,
                method=recipe.init_method,
                memory_budget=recipe.memory_budget,
            )
        self._forget_moments()

    def _ship(self, rank: int) -> None:
        trainer = self._trainer
        if trainer.args.should_save and trainer.args.save_strategy != "no":
            rw.save(trainer.model, Path(trainer.args.output_dir) / WIDE)
        self._evaluate("wide")
        squeezed = narrow(trainer.model, rank)
        trainer.state.log_history.append({"squeeze_error": squeezed.error, "step": trainer.state.global_step})
        self._forget_moments()
        self._evaluate("squeezed")

    def _evaluate(self, name: str) -> None:
        if self._trainer.eval_dataset is not None:
            self._trainer.evaluate(metric_key_prefix=name)

    def _forget_moments(self) -> None:
        """Those of the pairs: they are in the coordinates of pairs that are gone."""
        optimizer = self._trainer.optimizer
        assert optimizer is not None
        for pair in rw.pairs(self._trainer.model):
            for parameter in pair.parameters:
                optimizer.state.pop(parameter, None)
