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
    from rankwise.train.recipe import Recipe
    from rankwise.train.trainer.trainer import AdapterTrainer

WIDE = "wide"  # the adapter before it was squeezed, in the run's directory


def last_wide_step(recipe: Recipe, steps: int) -> int:
    """The step after which the adapter is squeezed; without `ship_rank` the run's last."""
    return steps - (recipe.ship_steps if recipe.ship_rank is not None else 0)


def check_steps(recipe: Recipe, steps: int) -> None:
    """Refuse a run of so few steps that what is to happen between two of them does not.

    Raises:
        RecipeError: naming the field.
    """
    wide = last_wide_step(recipe, steps)
    if wide < 1:
        raise RecipeError(
            f"`ship_steps`: expected fewer than the run's {steps} steps, whose last they are, found {recipe.ship_steps}"
        )
    if recipe.restart_every is not None and recipe.restart_every >= wide:
        raise RecipeError(
            f"`restart_every`: expected fewer than the {wide} steps that the run's pairs are trained for, found "
            f"{recipe.restart_every}, so that they would never start anew"
        )


class ReshapingCallback(TrainerCallback):  # type: ignore[misc]
    """Restarts the pairs of a trainer's model, and cuts them to the rank that is shipped."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self._trainer, self._recipe = trainer, trainer.recipe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            raise RecipeError(f"`restart_every`, `ship_rank`: expected one process, found {args.world_size}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if Adapted.find(self._trainer.model) is None:  # full fine-tuning, to compare with
            return
        every, step = self._recipe.restart_every, state.global_step
        ship_step = last_wide_step(self._recipe, state.max_steps)
        flags = copy(vars(control))  # an evaluation resets them
        if self._recipe.ship_rank is not None and step == ship_step:
            self._ship(self._recipe.ship_rank)
        elif every is not None and step % every == 0 and step < ship_step:
            self._restart(step)
        vars(control).update(flags)

    def _restart(self, step: int) -> None:
        trainer, recipe = self._trainer, self._recipe
        with torch.random.fork_rng():
            restart(
                trainer.model,
                trainer.batches_to_come(recipe.init_batches * recipe.gradient_accumulation_steps),
                trainer.batch_loss,
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
