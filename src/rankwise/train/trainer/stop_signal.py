"""SIGTERM, as schedulers send it before they kill: the step is finished and saved, and the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnSigterm(TrainerCallback):  # type: ignore[misc]
    """Ends the training after the step in which a SIGTERM came, with a checkpoint of it."""

    def __init__(self) -> None:
        self.stopping = False
        self._received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM while the context lasts. Python lets the main thread alone do so; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _receive(self, *_: Any) -> None:
        self._received = True

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
        if args.world_size == 1:
            return self._received
        received = torch.tensor(int(self._received), device=args.device)
        dist.all_reduce(received, dist.ReduceOp.MAX)
        return bool(received)
