"""Held-out samples in two halves: one to choose by, one to report."""

from __future__ import annotations

from datasets import Dataset

from rankwise.errors import RecipeError
from rankwise.train.data.dataset import Data


def halves(held_out: Dataset) -> tuple[Dataset, Dataset]:
    """The validation and the test samples, in turn."""
    validation, test = (held_out.select(range(first, len(held_out), 2)) for first in (0, 1))
    return validation, test


def check_held_out(data: Data, command: str) -> None:
    """Refuse data that cannot be split into a validation and a test part.

    Raises:
        RecipeError: fewer than two held-out samples.
    """
    samples = 0 if data.eval is None else len(data.eval)
    if samples < 2:
        raise RecipeError(
            f"{command}: chooses on one half of the held-out samples and reports the other: expected two at least, "
            f"found {samples}. Give the recipe eval_data or eval_split"
        )
