"""A saved adapter on batches of real data as training would see them, and its alignment there."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

import rankwise as rw
from rankwise.analysis import every_first_step
from rankwise.train.data.dataset import Batch
from rankwise.train.data.labels import read_labels
from rankwise.train.model.merged import base_of
from rankwise.train.recipe import parse
from rankwise.train.run import adapter_start, run
from rankwise.train.run.report_parts import Measured
from rankwise.train.run.run import Prepared


def adapter_alignment(directory: Path, base: str | None, data: str, count: int, console: Console) -> Measured:
    """How far a saved adapter's next step agrees with full fine-tuning's, on the first batches of some data."""
    prepared, batches = with_batches(directory, base, data, count, console)
    with adapter_start.with_bar(batches, "Comparing with full fine-tuning's step", console) as watched:
        return every_first_step(prepared.model, watched)


def with_batches(
    directory: Path, base: str | None, data: str, count: int, console: Console
) -> tuple[Prepared, list[Batch]]:
    """A saved adapter on its base, and batches of 4 samples of 128 tokens of some data, as training would see them."""
    task = "causal-lm" if read_labels(directory) is None else "classification"
    recipe = parse(
        {
            "model": base or base_of(directory),
            "data": data,
            "task": task,
            "max_train_samples": 4 * count,
            "max_length": 128,
            "per_device_train_batch_size": 4,
            "init_batches": count,
        }
    )
    prepared = run.check(run.load(recipe, console), console)
    batches = list(prepared.batches)
    prepared.trainer.release()
    rw.load(prepared.model, directory, trainable=True)
    return prepared, batches
