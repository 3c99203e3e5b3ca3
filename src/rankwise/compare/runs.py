"""The runs of a comparison: each trained once and kept, judged on validation and test samples, within a budget."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.compare.arms import Arm
from rankwise.errors import Diverged
from rankwise.report.history import History, points
from rankwise.train.data.dataset import Data, load_data
from rankwise.train.recipe import Recipe
from rankwise.train.run.run import Prepared
from rankwise.trials.full import FULL
from rankwise.trials.held_out import halves
from rankwise.trials.on_ray import Cluster
from rankwise.trials.preparing import SILENT, target_weights, whole_parameters, with_adapter, with_full_weights
from rankwise.trials.records import Plain, Records, deciding


@dataclass(frozen=True)
class Score:
    """How a trained model does on some held-out samples; accuracy where the task has one."""

    loss: float
    accuracy: float | None = None


DIVERGED = Score(math.inf)


@dataclass(frozen=True)
class Trial:
    """What came of one run.

    Attributes:
        validation: on the samples that rates are chosen on.
        test: on those that are reported.
        parameters: trained numbers.
        steps: of the optimizer.
        seconds: of these steps, without loading, starting and evaluating.
        elapsed: seconds of it all.
        history: the losses that were logged on the way.
        machine: what it ran on.
    """

    validation: Score
    test: Score
    parameters: int = 0
    steps: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0
    history: History = ()
    machine: str = ""

    @classmethod
    def read(cls, outcome: Plain, _: Path) -> Trial:
        """From its record."""
        scores = {part: Score(**outcome[part]) for part in ("validation", "test")}
        return cls(**{name: outcome[name] for name in cls.__dataclass_fields__} | scores)


class BudgetSpent(Exception):
    """No run may be started any more."""


class Budget:
    """Minutes within which runs are started; None: no end."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self._clock = minutes, clock
        self._began = clock()

    def check(self) -> None:
        """Raise BudgetSpent where it is."""
        if self.minutes is not None and self._clock() - self._began >= 60 * self.minutes:
            raise BudgetSpent


class Trials:
    """Trains arms; a run that is on file is read, also when the budget is spent."""

    def __init__(self, directory: Path, recipe: Recipe, data: Data, budget: Budget, console: Console) -> None:
        self._records, self._data, self._budget, self._console = Records(directory), data, budget, console
        # The samples are the same whatever an arm's seed: they are drawn by the recipe's.
        self._samples = {"samples of seed": recipe.seed}

    def run(self, arm: Arm) -> Trial:
        """What came of an arm; one that diverges is infinitely bad.

        Raises:
            BudgetSpent: it would have to be trained.
        """
        decided_by = {"kind": "compare", "full": arm.full, **self._samples, **deciding(arm.recipe)}
        try:
            return self._records.once(decided_by, lambda _: self._announced(arm), Trial.read)
        except Diverged:
            return Trial(DIVERGED, DIVERGED)

    def _announced(self, arm: Arm) -> Plain:
        self._budget.check()
        self._console.print(_described(arm), end=" ", style="dim", highlight=False)
        try:
            trial = self.train(arm)
        except Diverged:
            self._console.print("diverged", highlight=False)
            raise
        self._console.print(f"{trial.validation.loss:.4f} ({trial.elapsed:.0f} s)", highlight=False)
        return asdict(trial)

    def train(self, arm: Arm) -> Trial:
        """Train now."""
        began = time.monotonic()
        if arm.full is None:
            prepared = with_adapter(arm.recipe, self._data)
        else:
            prepared = with_full_weights(arm.recipe, self._data)
            weights, others = target_weights(prepared.loaded), whole_parameters(prepared.loaded)
            prepared.trainer.optimizer = FULL[arm.full].optimizer(weights, others, arm.recipe)
        return replace(_trained(prepared), elapsed=time.monotonic() - began)


class RemoteTrials(Trials):
    """Trains arms on a cluster's machines, which find model and data where the recipe says. Records stay here."""

    def __init__(self, cluster: Cluster, directory: Path, recipe: Recipe, data: Data, *rest: Any) -> None:
        super().__init__(directory, recipe, data, *rest)
        self._cluster, self._recipe = cluster, recipe

    def train(self, arm: Arm) -> Trial:
        """Train now, on some machine."""
        return self._cluster.start(_train, self._recipe, arm)()


def _train(recipe: Recipe, arm: Arm) -> Trial:
    """What a worker does."""
    with TemporaryDirectory() as directory:
        place = arm.recipe.model_copy(update={"output_dir": directory})
        here = replace(arm, recipe=place)
        return Trials(Path(directory), recipe, load_data(recipe), Budget(None), SILENT).train(here)


def _described(arm: Arm) -> str:
    recipe = arm.recipe
    steps = "" if recipe.max_steps == -1 else f"{recipe.max_steps} steps, "
    return f"{arm.name}: {steps}learning rate {recipe.peak_learning_rate:g}, seed {recipe.seed}: validation loss"


class _StepClock(TrainerCallback):  # type: ignore[misc]
    """Adds up what the optimizer steps take, without the evaluations between them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def _trained(prepared: Prepared) -> Trial:
    """Train without checkpoints, with evaluations on the validation samples as the recipe says, or four times."""
    trainer, clock = prepared.trainer, _StepClock()
    validation, test = halves(trainer.eval_dataset)
    args = trainer.args
    args.eval_on_start, args.eval_strategy, args.save_strategy = False, "steps", "no"
    args.eval_steps = prepared.recipe.eval_steps or 0.25
    trainer.add_callback(clock)
    try:
        trainer.eval_dataset = validation
        trainer.train()
        state = trainer.state
        if points(state.log_history, "eval_loss")[0][-1:] != [state.global_step]:
            trainer.evaluate()
        history = _losses(state.log_history)
        chosen_by = next(row for row in reversed(state.log_history) if "eval_loss" in row)
        trainer.eval_dataset = test  # as an argument of `evaluate` TRL would tokenise it again
        scores = _score(chosen_by), _score(trainer.evaluate())
    finally:
        trainer.release()
    parameters = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    return Trial(*scores, parameters, state.global_step, clock.seconds, history=history, machine=machine())


def _losses(log: History) -> list[dict[str, Any]]:
    losses = [{key: row[key] for key in ("step", "loss", "eval_loss") if key in row} for row in log]
    return [row for row in losses if len(row) > 1]


def _score(metrics: Mapping[str, Any]) -> Score:
    loss = float(metrics["eval_loss"])
    if not math.isfinite(loss):
        raise Diverged(f"expected a finite held-out loss after the last step, found {loss}")
    return Score(loss, metrics.get("eval_accuracy"))


def machine() -> str:
    """What a run's seconds depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {torch.get_num_threads()} threads"
