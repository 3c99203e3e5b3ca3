"""Arms on one model: made ready, trained step by step together, stopped where they are to be."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import rankwise as rw
from rankwise.errors import RunStopped
from rankwise.sweep.arms import Arm
from rankwise.sweep.course import Course, Forward, Judged, step_together
from rankwise.sweep.joining import check_joined
from rankwise.sweep.memory import Memory
from rankwise.sweep.pruning import Pruner
from rankwise.sweep.resuming import Stopped, checkpoint_at, common_step, is_through, record_stop, trim
from rankwise.sweep.shared_model import Seat, Trunk
from rankwise.train.data.dataset import Data
from rankwise.train.model.busy import busy
from rankwise.train.run import run
from rankwise.train.run.run import Prepared
from rankwise.train.tasks.base import Loaded, spec_of
from rankwise.train.trainer.stop_signal import StopOnSignal
from rankwise.train.trainer.trainer import AdapterTrainer
from rankwise.trials.held_out import halves
from rankwise.trials.preparing import SILENT

EVALUATIONS = 8  # of a run, where the recipe does not say


class Training:
    """Arms on one model."""

    def __init__(self, loaded: Loaded, arms: Sequence[Arm], data: Data, console: Console) -> None:
        self._loaded, self._arms, self._console = loaded, arms, console
        self._trunk = Trunk(loaded.model)
        self._data = data
        self._signal = StopOnSignal(console)

    def train(self, prune: Pruner, rows: int | None) -> None:
        """Train every arm that is not through, from the step that all of them have reached.

        Args:
            rows: of a forward; None: as many as fit.

        Raises:
            RunStopped: SIGTERM or Ctrl-C came; every arm is saved.
        """
        with busy(self._console, "Preparing the arms"):
            courses = self._prepared()
        if not courses:
            return
        memory = self._memory(courses)
        batch = self._loaded.recipe.per_device_train_batch_size
        together = memory.together if rows is None else max(1, rows // batch)
        self._console.print(memory.described(together), highlight=False)
        for note in check_joined(courses, self._trunk, together):
            self._console.print(note, style="yellow", highlight=False)
        try:
            with self._signal.listening():
                self._drive(courses, prune, together)
        finally:
            for course in courses:
                course.leave()
        if any(course.stop.stopping for course in courses):
            raise RunStopped(
                f"{self._arms[0].directory.parent}: {signal.Signals(self._signal.received).name} came, so the sweep "
                "stopped and saved its arms. Start it again to go on from there.",
                self._signal.received,
            )

    def _prepared(self) -> list[Course]:
        """The runs of the arms that are not through, at their starts or at the step that all have reached."""
        step = common_step(self._arms)
        left = [arm for arm in self._arms if not is_through(arm, step)]
        seats = [Seat(self._loaded.model, f"arm-{number}") for number, _ in enumerate(left)]
        checked = []
        # All trainers are made before the first adapter changes the model, as each would find it alone.
        for arm, seat in zip(left, seats, strict=True):
            with seat.turn():
                checked.append(self._checked(arm, step))
        started = []
        for seat, prepared in zip(seats, checked, strict=True):
            with seat.turn():
                started.append(run.start(prepared, SILENT, seat.adapter))
                seat.sit()
        runs = zip(left, seats, started, strict=True)
        return [Course(arm, seat, prepared, self._trunk) for arm, seat, prepared in runs]

    def _checked(self, arm: Arm, step: int) -> Prepared:
        """An arm's run: evaluated on half of the held-out samples on its way, on the other half at its end."""
        resume = str(checkpoint_at(arm, step)) if step else None
        recipe = arm.recipe.model_copy(update={"resume_from_checkpoint": resume, "save_total_limit": None})
        model = self._loaded.model
        spec = replace(spec_of(recipe), modules_to_save=self._loaded.spec.modules_to_save)
        sites = rw.plan(model, spec, method=recipe.init_method, memory_budget=recipe.memory_budget)
        prepared = run.check_resuming(
            replace(self._loaded, recipe=recipe, spec=spec, sites=sites), SILENT, data=self._data
        )
        trainer = prepared.trainer
        trainer.eval_dataset, test = halves(trainer.eval_dataset)
        trainer.args.eval_strategy = "steps"
        trainer.args.eval_steps = recipe.eval_steps or 1 / EVALUATIONS
        trainer.add_callback(_TestAtEnd(trainer, test))
        return prepared

    def _memory(self, courses: Sequence[Course]) -> Memory:
        trial = courses[0].prepared.trial
        assert trial is not None
        arms = [4 * sum(p.numel() * p.element_size() for p in course.seat.parameters) for course in courses]
        trained = {id(parameter) for course in courses for parameter in course.seat.parameters}
        base = sum(p.numel() * p.element_size() for p in self._loaded.model.parameters() if id(p) not in trained)
        return Memory(base, arms, trial.activations, trial.available)

    def _drive(self, courses: Sequence[Course], prune: Pruner, together: int) -> None:
        """Let the arms go on, a step at a time, until all of them are at their ends."""
        for course in courses:
            course.go()
        while waiting := [course for course in courses if course.request]:
            for course in waiting:
                course.stop.received = self._signal.received  # for all at the same step
            kind = type(waiting[0].request)
            assert all(type(course.request) is kind for course in waiting), "arms must come to the same places"
            if kind is Forward:
                self._step(waiting, together)
            elif kind is Judged:
                self._judge(waiting, prune)
            else:
                self._saved(waiting)

    def _step(self, waiting: Sequence[Course], together: int) -> None:
        joining = [course for course in waiting if course.joins]
        for first in range(0, len(joining), together):
            step_together(joining[first : first + together], self._trunk)
        for course in waiting:
            if not course.joins:
                course.go()

    def _judge(self, waiting: Sequence[Course], prune: Pruner) -> None:
        losses = {course.arm.name: request.loss for course in waiting if isinstance(request := course.request, Judged)}
        last = waiting[0].prepared.trainer.state.max_steps
        step, best = waiting[0].step, min(losses, key=losses.__getitem__)
        self._console.print(
            f"Step {step} of {last}: {len(losses)} arms, least validation loss {losses[best]:.4f} ({best})",
            highlight=False,
        )
        reasons = prune(losses, step / last, len(self._arms))
        for course in waiting:
            reason = reasons.get(course.arm.name)
            if reason is not None:
                record_stop(course.arm, Stopped(step, reason))
                self._console.print(f"{course.arm.name}: stopped after step {step}: {reason}", highlight=False)
            course.go(reason is not None)

    def _saved(self, waiting: Sequence[Course]) -> None:
        limit = self._loaded.recipe.save_total_limit
        if limit is not None:
            trim([course.arm for course in waiting], limit)
        for course in waiting:
            course.go()


class _TestAtEnd(TrainerCallback):  # type: ignore[misc]
    """Evaluates an arm that came to its end on the samples that nothing was chosen by."""

    def __init__(self, trainer: AdapterTrainer, test: Any) -> None:
        self._trainer, self._test = trainer, test

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps:
            return
        trainer = self._trainer
        validation, trainer.eval_dataset = trainer.eval_dataset, self._test  # as an argument it is tokenised again
        try:
            trainer.evaluate(metric_key_prefix="test")
        finally:
            trainer.eval_dataset = validation
