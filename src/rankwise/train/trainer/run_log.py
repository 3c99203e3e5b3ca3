"""What a run logs, step by step, for those who watch it from elsewhere: a file of lines, and the speed and memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.disk import write_file, writing

LOG = "log.jsonl"


class Throughput(TrainerCallback):  # type: ignore[misc]
    """Tokens a second over the steps since the last look, evaluations and saving left out, and the memory's peak."""

    def __init__(self) -> None:
        self._tokens = self._seconds = self._began = 0.0

    def saw(self, inputs: Mapping[str, Any]) -> None:
        """Count a batch's tokens, those that only pad it left out."""
        mask = inputs.get("attention_mask")
        self._tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds += time.monotonic() - self._began

    def take(self) -> dict[str, float]:
        """``tokens_per_second`` since the last call, of this process, and ``peak_memory_gib`` so far."""
        speed = {"tokens_per_second": self._tokens / self._seconds} if self._seconds else {}
        self._tokens = self._seconds = 0.0
        return {**speed, "peak_memory_gib": peak_memory() / 2**30}


def peak_memory() -> int:
    """Bytes: of the accelerator where there is one, else the most that this process ever held."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


class RunLog(TrainerCallback):  # type: ignore[misc]
    """Keeps ``log.jsonl``, a line of JSON for everything that is logged, and prints it where no bar can be drawn.

    A resumed run's file begins with what its checkpoint had logged, so that no step is in it twice.
    """

    def __init__(self, directory: Path, console: Console) -> None:
        self._path = directory / LOG
        self._console = console

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            write_file(self._path, "".join(map(_line, state.log_history)).encode())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        row = state.log_history[-1]
        with writing(self._path), self._path.open("a", encoding="utf-8") as stream:
            stream.write(_line(row))
        if not self._console.is_terminal and (shown := in_words(row)):
            self._console.print(f"step {row['step']}/{state.max_steps}  {shown}", highlight=False, soft_wrap=True)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


_WORDS = {
    "loss": "loss {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "eval_accuracy": "held-out accuracy {:.1%}",
    "grad_norm": "gradient norm {:.3g}",
    "learning_rate": "learning rate {:.3g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "peak_memory_gib": "{:.1f} GiB",
}


def in_words(row: Mapping[str, Any]) -> str:
    """What is said of a logged row.

    >>> in_words({"step": 10, "loss": 1.5, "tokens_per_second": 1234.5})
    'loss 1.5000  1,234 tokens/s'
    """
    return "  ".join(text.format(float(row[key])) for key, text in _WORDS.items() if key in row)
