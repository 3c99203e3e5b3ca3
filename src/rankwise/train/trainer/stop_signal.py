"""SIGTERM, as schedulers send it before they kill, and Ctrl-C: the step is finished and saved, and the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Ends the training after the step in which SIGTERM or Ctrl-C (SIGINT) came, with a checkpoint of it.

    A second Ctrl-C interrupts at once, as Python does.

    Attributes:
        received: the number of the signal that came; 0 before. Of several processes, the highest that one of them got.
        stopping: whether the training has ended because of it.
    """

    def __init__(self, console: Console) -> None:
        self.received = 0
        self.stopping = False
        self._console = console

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take both while the context lasts. Python lets the main thread alone do so; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = number
        again = ", Ctrl-C again stops at once" if number == signal.SIGINT else ""
        self._console.print(f"Finishing the step, then saving{again}", style="yellow")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._received_anywhere(args) and state.global_step < state.max_steps:
            self.stopping = True
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False  # there may be seconds left only; it draws no random numbers of the run

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopping:
            control.should_evaluate = False

    def _received_anywhere(self, args: TrainingArguments) -> bool:
        """A launcher signals its processes one by one; they must stop after the same step."""
        if args.world_size > 1:
            received = torch.tensor(self.received, device=args.device)
            dist.all_reduce(received, dist.ReduceOp.MAX)
            self.received = int(received)
        return bool(self.received)


class StopWhenAsked(StopOnSignal):
    """Listens to no signal itself: whoever does sets ``received``."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the context lasts nothing changes."""
        yield
