"""The training and held-out samples that a recipe asks for."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from rankwise.errors import DataError
from rankwise.train.data.files import Placed
from rankwise.train.data.records import has_held_out, read_records
from rankwise.train.recipe import Recipe

Batch = Mapping[str, Tensor]

# Forms that a task looks for before others: data of preferences often bring the chosen messages along.
_LOOKED_FOR = {"preference": ("preference", "unpaired-preference"), "grpo": ("prompt",)}


@dataclass(frozen=True)
class Data:
    """What a run learns from, and what it is judged on.

    Attributes:
        train, eval: samples as they are tokenised, each with the ``place`` where it stands; conversations as JSON.
        format: the form that they came in.
        unread: fields of theirs that this form does not look at.
    """

    train: Dataset
    eval: Dataset | None
    format: str
    unread: tuple[str, ...] = ()


def load_data(recipe: Recipe) -> Data:
    """The training and held-out samples that a recipe asks for, the same ones for the same seed.

    A built-in data set brings its own held-out part, used unless the recipe names another.

    Raises:
        DataError: a file cannot be read, or a record is not of the form of the others.
    """
    records = read_records(recipe.data, data_format=recipe.data_format, first=_LOOKED_FOR.get(recipe.task, ()))
    train, held_out = _dataset(records.rows), None
    if recipe.eval_data is not None:
        held_out = _held_out_part(recipe.eval_data, records.format)
    elif recipe.eval_split is not None:
        train, held_out = _split(train, recipe.eval_split, recipe)
    elif isinstance(recipe.data, str) and has_held_out(recipe.data):
        held_out = _held_out_part(recipe.data, records.format)
    train = _at_most(recipe.max_train_samples, train, recipe.seed)
    if held_out is not None:
        held_out = _at_most(recipe.max_eval_samples, held_out, recipe.seed)
    return Data(train, held_out, records.format, records.unread)


def _held_out_part(source: str | list[str], data_format: str) -> Dataset:
    """Held-out samples are of the form of the training samples."""
    return _dataset(read_records(source, data_format=data_format, held_out=True).rows)


def _dataset(rows: Iterator[Placed]) -> Dataset:
    """Records on disk, of which memory holds the pages that are looked at, however many there are."""
    encoded = ({name: _plain(value) for name, value in row.items()} | {"place": place} for place, row in rows)
    first = next(encoded)
    numbers = {name for name, value in first.items() if isinstance(value, int) or name == "given"}
    features = Features({name: Value("int64" if name in numbers else "large_string") for name in first})
    path = Path(_scratch().name) / f"{uuid4().hex}.arrow"
    with ArrowWriter(path=str(path), features=features) as writer:
        writer.write(first)
        for row in encoded:
            writer.write(row)
        writer.finalize()
    return Dataset.from_file(str(path))


def _plain(value: Any) -> str | int | None:
    """A value as a column holds it exactly: messages, tools and their arguments have other fields in every sample."""
    return value if value is None or isinstance(value, str | int) else json.dumps(value, ensure_ascii=False)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="rankwise-data-")


def _split(samples: Dataset, size: float | int, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Hold out a number or a share of the samples, at least one."""
    count = size if isinstance(size, int) else max(1, round(size * len(samples)))
    if count >= len(samples):
        raise DataError(
            f"{recipe.data_name}: eval_split asks for {count} samples, the data has {len(samples)}: nothing would be "
            "left to train on. Lower eval_split, or give eval_data."
        )
    parts = samples.train_test_split(test_size=count, seed=recipe.seed)
    return parts["train"], parts["test"]


def _at_most(count: int | None, samples: Dataset, seed: int) -> Dataset:
    """A random choice, so that a file in some order is not known by its beginning only."""
    return samples if count is None or count >= len(samples) else samples.shuffle(seed=seed).select(range(count))
