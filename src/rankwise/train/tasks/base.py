"""What differs between one thing to train a model for and another. The run around it is the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise as rw
from rankwise.planning import Plan
from rankwise.report.history import points
from rankwise.train.model.generation import Sample
from rankwise.train.recipe import AdapterFields, Recipe

if TYPE_CHECKING:  # datasets and TRL take seconds to import, which planning need not wait for
    from datasets import Dataset

    from rankwise.train.data.dataset import Batch, Data
    from rankwise.train.trainer.progress import ProgressBar
    from rankwise.train.trainer.trainer import AdapterTrainer


Figures = dict[str, tuple[str, str]]  # label → as it was before training (empty where it means nothing), and after


@dataclass(frozen=True)
class Loaded:
    """A model and what a recipe will adapt of it; nothing is changed."""

    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: rw.LoRA
    sites: Plan


@dataclass(frozen=True)
class DataSummary:
    """What a run is about to train on.

    Attributes:
        facts: label → text.
        samples: the first ones, as (text, whether it is trained on) pieces.
        warnings: what is likely not meant.
    """

    facts: Mapping[str, str]
    samples: Sequence[Sequence[tuple[str, bool]]]
    warnings: Sequence[str] = ()


class Task(ABC):
    """One thing to train a model for. Stateless."""

    loss_unit: ClassVar[str]

    @abstractmethod
    def load(self, recipe: Recipe) -> Loaded:
        """The model, and what the recipe will adapt of it."""

    @abstractmethod
    def check(self, loaded: Loaded, data: Data) -> None:
        """Refuse data or layers that this task cannot train on.

        Raises:
            DataError, TargetError: what does not fit.
        """

    @abstractmethod
    def trainer(self, loaded: Loaded, data: Data, bar: ProgressBar) -> tuple[AdapterTrainer, list[str]]:
        """The trainer with its tokenised data, and warnings about samples that cannot be used.

        It comes before the adapter: the start may be computed from its batches.
        """

    @abstractmethod
    def summary(self, loaded: Loaded, data: Data, trainer: AdapterTrainer, batches: Sequence[Batch]) -> DataSummary:
        """What the trainer's tokenised data and first batches hold.

        Raises:
            DataError: answers that never end.
        """

    @abstractmethod
    def sample(self, loaded: Loaded, held_out: Dataset | None) -> Sample | None:
        """A held-out sample as the pretrained and the adapted model answer it; None where there is none to show."""

    @abstractmethod
    def metrics(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """Figures of the run beside its losses."""

    @abstractmethod
    def figures(self, metrics: dict[str, Any]) -> Figures:
        """What of the metrics a reader should see beside the losses."""

    @abstractmethod
    def save(self, loaded: Loaded, adapter: Path) -> None:
        """Write what the adapter's directory needs beside the adapter and the tokenizer."""


_SCORES = {
    "exact": "held-out answers that are exact",
    "matthews": "held-out Matthews correlation",
    "number": "held-out answers with the right number",
}


def score_changes(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores of generated answers, at the first evaluation and at the last."""
    logged = {name: points(history, f"eval_{name}")[1] for name in _SCORES}
    scores = {name: values for name, values in logged.items() if values}
    return {
        f"{name}_{when}": values[at] for name, values in scores.items() for when, at in (("before", 0), ("after", -1))
    }


def score_figures(metrics: dict[str, Any]) -> Figures:
    """The same in words."""

    def shown(name: str, value: float) -> str:
        return f"{value:.3f}" if name == "matthews" else f"{value:.1%}"

    return {
        label: (shown(name, metrics[f"{name}_before"]), shown(name, metrics[f"{name}_after"]))
        for name, label in _SCORES.items()
        if f"{name}_after" in metrics
    }


def spec_of(recipe: Recipe) -> rw.LoRA:
    """The adapter that a recipe asks for."""
    return rw.LoRA.from_dict(recipe.section(AdapterFields))
