"""Several runs, each in its own trainer, that wait for each other at every step.

An arm's run is a greenlet: a call stack of its own that gives up control in the middle of its training loop and is
taken up again there. So each arm's loop is transformers' own, with its data order, schedule, clipping, log, evaluations
and checkpoints, and only the forward and backward pass through the trunk are made for many arms at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.errors import Diverged, RecipeError, RunStopped
from rankwise.sweep.arms import Arm
from rankwise.sweep.resuming import Stopped, record_stop
from rankwise.sweep.shared_model import Batch, Seat, Trunk, row_ranges
from rankwise.train.run import run
from rankwise.train.run.run import Prepared
from rankwise.train.trainer.stop_signal import StopWhenAsked
from rankwise.trials.preparing import SILENT

try:
    from greenlet import getcurrent, greenlet
except ImportError:
    raise RecipeError(
        "a sweep needs the package greenlet, which is not here. Run: pip install 'rankwise[sweep]'"
    ) from None


@dataclass(frozen=True)
class Forward:
    """An arm needs the trunk's output for a batch."""

    batch: Batch


@dataclass(frozen=True)
class Backward:
    """It has gone back through its head, and needs the gradients of what lies before."""

    gradient: Tensor | None


@dataclass(frozen=True)
class Judged:
    """It was evaluated, and asks whether it is to stop."""

    step: int
    loss: float


@dataclass(frozen=True)
class Saved:
    """It has written a checkpoint."""

    step: int


Request = Forward | Backward | Judged | Saved


def _ask(request: Request) -> Any:
    """Give up control until there is an answer; called in an arm's greenlet."""
    return getcurrent().parent.switch(request)


class Course:
    """One arm on its way through its run.

    Attributes:
        joins: whether its rows may be in a forward with others'.
        request: what it waits for; None: its run is over.
        stop: told when a signal has come.
    """

    def __init__(self, arm: Arm, seat: Seat, prepared: Prepared, trunk: Trunk) -> None:
        self.arm, self.seat, self.prepared = arm, seat, prepared
        self.joins = True
        self.request: Request | None = None
        self.stop = StopWhenAsked(SILENT)
        self._trunk = trunk
        self._greenlet = greenlet(self._run)
        prepared.trainer.computing = self._compute
        prepared.trainer.add_callback(_Waiting())

    @property
    def rows(self) -> int:
        """How many rows its next forward has."""
        assert isinstance(self.request, Forward)
        return len(self.request.batch["input_ids"])

    @property
    def step(self) -> int:
        """The optimizer steps that it has done."""
        return int(self.prepared.trainer.state.global_step)

    def go(self, answer: Any = None) -> None:
        """Go on, with an answer to the last request, until the next one or to the end."""
        with self.seat.turn():
            request = self._greenlet.switch(answer)
        self.request = None if self._greenlet.dead else request

    def leave(self) -> None:
        """End it where it stands, if it has not ended: what it holds, its directory's lock before all, is let go."""
        with self.seat.turn():
            self._greenlet.throw()

    def _run(self, _: Any) -> None:
        """All of the run, in its greenlet: training, then its files."""
        try:
            with suppress(RunStopped):  # the sweep says so, once for all
                run.execute(self.prepared, SILENT, self.stop)
        except Diverged as error:
            record_stop(self.arm, Stopped(self.step, str(error), diverged=True))

    def _compute(self, batch: Mapping[str, Any], compute: Callable[[], Tensor]) -> Tensor:
        """The loss and gradients of a batch, the part of the trunk together with other arms'."""
        batch = self.prepared.trainer._prepare_inputs(batch)
        hidden: Tensor | None = _ask(Forward(batch))
        if hidden is None:
            return compute()
        with self._trunk.giving(hidden):
            loss = compute()
        _ask(Backward(hidden.grad))
        return loss


class _Waiting(TrainerCallback):  # type: ignore[misc]
    """Waits for the other arms after evaluations and checkpoints, and stops where it is told to."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        if "eval_loss" not in metrics or not 0 < state.global_step < state.max_steps:
            return
        if _ask(Judged(state.global_step, metrics["eval_loss"])):
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _ask(Saved(state.global_step))


def step_together(courses: Sequence[Course], trunk: Trunk) -> None:
    """A forward and a backward pass for arms that wait for one, and for each the rest of its step."""
    seats, batches = [course.seat for course in courses], [_batch(course) for course in courses]
    output = trunk.forward(seats, batches)
    gradient = torch.zeros_like(output)
    for course, rows, batch in zip(courses, row_ranges(batches), batches, strict=True):
        length = batch["input_ids"].shape[1]
        course.go(output[rows, :length].detach().requires_grad_())
        if isinstance(course.request, Backward) and course.request.gradient is not None:
            gradient[rows, :length] = course.request.gradient
    _backward([course.seat for course in courses if course.request], output, gradient)
    for course in courses:
        if isinstance(course.request, Backward):
            course.go()


def _batch(course: Course) -> Batch:
    assert isinstance(course.request, Forward)
    return course.request.batch


def _backward(seats: Sequence[Seat], output: Tensor, gradient: Tensor) -> None:
    """Add the gradients of the trunk's output to those of the seats' parameters."""
    for seat in seats:
        seat.put_gradients()
        for parameter in seat.parameters:
            parameter.requires_grad_(True)  # another's turn has frozen it
    output.backward(gradient)  # type: ignore[no-untyped-call]
    for seat in seats:
        seat.take_gradients()
        for parameter in seat.parameters:
            parameter.requires_grad_(False)
