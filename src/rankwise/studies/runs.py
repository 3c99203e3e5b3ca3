"""The training runs of a study: each is done once, and kept, so that a study goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import rankwise as rw
from rankwise.analysis import train_in_random_subspace
from rankwise.errors import SpecError
from rankwise.planning import target_layers
from rankwise.train.recipe import Recipe
from rankwise.train.run import run
from rankwise.train.trainer.trainer import AdapterTrainer
from rankwise.trials.preparing import SILENT, target_weights, with_adapter, with_full_weights
from rankwise.trials.records import Plain, Records, deciding


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes:
        loss: on the held-out samples, at the end.
        parameters: trained numbers.
        seconds: of training.
        adapter: its directory; None where no adapter was trained.
    """

    loss: float
    parameters: int
    seconds: float
    adapter: Path | None


class Runs:
    """Trains recipes, each into its own directory under ``directory``, named by what decides its outcome."""

    def __init__(self, directory: Path, console: Console) -> None:
        self._records = Records(directory)
        self._console = console

    def untrained(self, recipe: Recipe) -> float:
        """The pretrained model's held-out loss."""

        def evaluate(_: Path) -> Trained:
            trainer = run.check(run.load(recipe, SILENT), SILENT).trainer
            return Trained(_held_out_loss(trainer), 0, 0.0, None)

        # What only training would read must not make it another run.
        fixed = {"learning_rate": 1.0, "rank": 1, "alpha": 1.0, "target_modules": "all-linear", "init": "kaiming"}
        return self._once("pretrained", recipe.model_copy(update=fixed), {}, evaluate).loss

    def adapter(self, recipe: Recipe) -> Trained:
        """Train the recipe's adapter."""

        def train(directory: Path) -> Trained:
            prepared = with_adapter(recipe)
            loss, seconds = _fit(prepared.trainer)
            rw.save(prepared.model, directory / "adapter")
            parameters = sum(tensor.numel() for tensor in rw.trainable_parameters(prepared.model))
            return Trained(loss, parameters, seconds, directory / "adapter")

        return self._once("adapter", recipe, {}, train)

    def full(self, recipe: Recipe) -> Trained:
        """Train the target weights themselves."""

        def train(_: Path) -> Trained:
            prepared = with_full_weights(recipe)
            parameters = sum(weight.numel() for weight in target_weights(prepared.loaded))
            loss, seconds = _fit(prepared.trainer)
            return Trained(loss, parameters, seconds, None)

        return self._once("full", recipe, {}, train)

    def random_subspace(self, recipe: Recipe, dimension: int, *, layer_scales: bool) -> Trained:
        """Train ``dimension`` numbers that move the target weights in a random subspace."""

        def train(_: Path) -> Trained:
            prepared = run.check(run.load(recipe, SILENT), SILENT)
            targets = list(_targets(prepared.model, recipe))
            train_in_random_subspace(prepared.model, dimension, targets, layer_scales=layer_scales, seed=recipe.seed)
            loss, seconds = _fit(prepared.trainer)
            return Trained(loss, dimension, seconds, None)

        return self._once("random-subspace", recipe, {"dimension": dimension, "layer_scales": layer_scales}, train)

    def _once(self, kind: str, recipe: Recipe, options: dict[str, Any], train: Callable[[Path], Trained]) -> Trained:
        def outcome(directory: Path) -> Plain:
            self._console.print(_described(kind, recipe, options), end=" ", style="dim", highlight=False)
            began = time.monotonic()
            trained = train(directory)
            self._console.print(f"{trained.loss:.4f} ({time.monotonic() - began:.0f} s)", highlight=False)
            return asdict(trained) | {"adapter": trained.adapter and "adapter"}

        return self._records.once({"kind": kind, **options, **deciding(recipe)}, outcome, _read)


def _read(outcome: Plain, directory: Path) -> Trained:
    adapter = outcome["adapter"] and directory / outcome["adapter"]
    return Trained(float(outcome["loss"]), int(outcome["parameters"]), float(outcome["seconds"]), adapter or None)


def _described(kind: str, recipe: Recipe, options: dict[str, Any]) -> str:
    targets = recipe.target_modules if isinstance(recipe.target_modules, str) else " ".join(recipe.target_modules)
    rank = f"rank {recipe.rank}, {targets}, " if kind == "adapter" else ""
    extra = "".join(f"{name} {value}, " for name, value in options.items())
    return f"{kind}: {rank}{extra}learning rate {recipe.peak_learning_rate:g}, seed {recipe.seed}: held-out loss"


def _targets(model: Any, recipe: Recipe) -> dict[str, Any]:
    return target_layers(model, recipe.target_modules, recipe.exclude_modules)


def _fit(trainer: AdapterTrainer) -> tuple[float, float]:
    """Train without checkpoints; the held-out loss, and the seconds of training."""
    args = trainer.args
    args.eval_on_start, args.eval_strategy, args.save_strategy = False, "no", "no"
    try:
        seconds = float(trainer.train().metrics["train_runtime"])
        return _held_out_loss(trainer), seconds
    finally:
        trainer.release()


def _held_out_loss(trainer: AdapterTrainer) -> float:
    if trainer.eval_dataset is None:
        raise SpecError("a study compares held-out losses: give the recipe eval_data or eval_split")
    return float(trainer.evaluate()["eval_loss"])
