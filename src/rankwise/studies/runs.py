"""The training runs of a study: each is done once, and kept, so that a study goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

import rankwise as rw
from rankwise.analysis import train_in_random_subspace
from rankwise.errors import BrokenFile, SpecError
from rankwise.files import check_directory_name, sha256, write_file
from rankwise.planning import target_layers
from rankwise.train.recipe import Recipe
from rankwise.train.run import adapter_start, run
from rankwise.train.trainer.trainer import AdapterTrainer


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
        check_directory_name(directory)
        self.directory = directory
        self._console = console
        self._silent = Console(quiet=True)

    def untrained(self, recipe: Recipe) -> float:
        """The pretrained model's held-out loss."""

        def evaluate(_: Path) -> Trained:
            trainer = run.check(run.load(recipe, self._silent), self._silent).trainer
            return Trained(_held_out_loss(trainer), 0, 0.0, None)

        # What only training would read must not make it another run.
        fixed = {"learning_rate": 1.0, "rank": 1, "alpha": 1.0, "target_modules": "all-linear", "init": "kaiming"}
        return self._once("pretrained", recipe.model_copy(update=fixed), {}, evaluate).loss

    def adapter(self, recipe: Recipe) -> Trained:
        """Train the recipe's adapter."""

        def train(directory: Path) -> Trained:
            prepared = run.check(run.load(recipe, self._silent), self._silent)
            adapter_start.attach(prepared.loaded, prepared.batches, self._silent)
            loss, seconds = _fit(prepared.trainer)
            rw.save(prepared.model, directory / "adapter")
            parameters = sum(tensor.numel() for tensor in rw.trainable_parameters(prepared.model))
            return Trained(loss, parameters, seconds, directory / "adapter")

        return self._once("adapter", recipe, {}, train)

    def full(self, recipe: Recipe) -> Trained:
        """Train the target weights themselves."""

        def train(_: Path) -> Trained:
            prepared = run.check(run.load(recipe, self._silent), self._silent)
            prepared.model.requires_grad_(False)
            weights = [layer.get_parameter("weight") for layer in _targets(prepared.model, recipe).values()]
            for weight in weights:
                weight.requires_grad_(True)
            loss, seconds = _fit(prepared.trainer)
            return Trained(loss, sum(weight.numel() for weight in weights), seconds, None)

        return self._once("full", recipe, {}, train)

    def random_subspace(self, recipe: Recipe, dimension: int, *, layer_scales: bool) -> Trained:
        """Train ``dimension`` numbers that move the target weights in a random subspace."""

        def train(_: Path) -> Trained:
            prepared = run.check(run.load(recipe, self._silent), self._silent)
            targets = list(_targets(prepared.model, recipe))
            train_in_random_subspace(prepared.model, dimension, targets, layer_scales=layer_scales, seed=recipe.seed)
            loss, seconds = _fit(prepared.trainer)
            return Trained(loss, dimension, seconds, None)

        return self._once("random-subspace", recipe, {"dimension": dimension, "layer_scales": layer_scales}, train)

    def _once(self, kind: str, recipe: Recipe, options: dict[str, Any], train: Callable[[Path], Trained]) -> Trained:
        """The outcome on file, or that of ``train`` now. Several processes may share the directory."""
        fields = recipe.model_dump(mode="json", exclude={"output_dir"}, exclude_defaults=True)
        decided_by = {"kind": kind, **options, **fields, **_on_disk(recipe), "rankwise": version("rankwise")}
        key = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]
        directory = self.directory / "runs" / key
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "outcome.json"
        with FileLock(directory / ".lock"):
            if not path.is_file():
                self._console.print(f"[dim]{_described(kind, recipe, options)}[/]", end=" ", highlight=False)
                began = time.monotonic()
                trained = train(directory)
                content = asdict(trained) | {"adapter": trained.adapter and "adapter", "run": decided_by}
                write_file(path, (json.dumps(content, indent=2) + "\n").encode())
                self._console.print(f"{trained.loss:.4f} ({time.monotonic() - began:.0f} s)", highlight=False)
        return _read(path)


def _on_disk(recipe: Recipe) -> dict[str, str]:
    """What the recipe's paths hold now: a file's content, a model directory's files with size and time."""
    contents = {}
    for field in ("model", "data", "eval_data"):
        path = Path(getattr(recipe, field) or "")
        if path.is_file():
            contents[f"{field} is"] = sha256(path)
        elif getattr(recipe, field) and path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            contents[f"{field} is"] = " ".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)
    return contents


def _read(path: Path) -> Trained:
    try:
        outcome = json.loads(path.read_text(encoding="utf-8"))
        adapter = outcome["adapter"] and path.parent / outcome["adapter"]
        return Trained(float(outcome["loss"]), int(outcome["parameters"]), float(outcome["seconds"]), adapter or None)
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenFile(
            f"{path}: expected a run's outcome, found: {error!r}; delete its directory to run it anew"
        ) from None


def _described(kind: str, recipe: Recipe, options: dict[str, Any]) -> str:
    targets = recipe.target_modules if isinstance(recipe.target_modules, str) else " ".join(recipe.target_modules)
    rank = f"rank {recipe.rank}, {targets}, " if kind == "adapter" else ""
    extra = "".join(f"{name} {value}, " for name, value in options.items())
    return f"{kind}: {rank}{extra}learning rate {recipe.learning_rate:g}, seed {recipe.seed}: held-out loss"


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
