"""The training and held-out samples that a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset
from torch import Tensor

from rankwise.errors import DataError
from rankwise.train.data.formats import FORMATS
from rankwise.train.data.records import BUILT_IN, load_records
from rankwise.train.recipe import Recipe

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Data:
    """What a run learns from, and what it is judged on."""

    train: Dataset
    eval: Dataset | None
    format: str

    @property
    def loss(self) -> dict[str, bool]:
        """The fields of `SFTConfig` that take the loss on the answers only."""
        return dict(FORMATS[self.format].loss)


def load_data(recipe: Recipe) -> Data:
    """The training and held-out samples that a recipe asks for, the same ones for the same seed.

    A built-in data set brings its own held-out part, used unless the recipe names another.

    Raises:
        DataError: a file cannot be read, or a record is not of the form of the others.
    """
    name, records = load_records(recipe.data, data_format=recipe.data_format)
    train, held_out = Dataset.from_list(records), None
    if recipe.eval_data is not None:
        held_out = _held_out_part(recipe.eval_data, name)
    elif recipe.eval_split is not None:
        train, held_out = _split(train, recipe.eval_split, recipe)
    elif recipe.data in BUILT_IN:
        held_out = _held_out_part(recipe.data, name)
    train = _at_most(recipe.max_train_samples, train, recipe.seed)
    if held_out is not None:
        held_out = _at_most(recipe.max_eval_samples, held_out, recipe.seed)
    return Data(train, held_out, name)


def _held_out_part(source: str, data_format: str) -> Dataset:
    """Held-out samples are of the form of the training samples."""
    return Dataset.from_list(load_records(source, data_format=data_format, held_out=True)[1])


def _split(samples: Dataset, size: float | int, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Hold out a number or a share of the samples, at least one."""
    count = size if isinstance(size, int) else max(1, round(size * len(samples)))
    if count >= len(samples):
        raise DataError(
            f"{recipe.data}: eval_split asks for {count} samples, the file has {len(samples)}: nothing would be left "
            "to train on. Lower eval_split, or give eval_data."
        )
    parts = samples.train_test_split(test_size=count, seed=recipe.seed)
    return parts["train"], parts["test"]


def _at_most(count: int | None, samples: Dataset, seed: int) -> Dataset:
    """A random choice, so that a file in some order is not known by its beginning only."""
    return samples if count is None or count >= len(samples) else samples.shuffle(seed=seed).select(range(count))
