"""A run, in the order things happen: recipe → plan → checks → start → training → files.

`load` and `prepare` do everything that can fail for the user's reasons and are quick; `execute` spends the time.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

import rankwise as rw
from rankwise.train import preflight
from rankwise.train.adalora_callback import AdaLoraCallback
from rankwise.train.card import save_model_card
from rankwise.train.curve import points, save_loss_curve
from rankwise.train.data import Data, load_data
from rankwise.train.generation import Sample, before_and_after
from rankwise.train.pretrained import load_pretrained
from rankwise.train.progress import ProgressBar, busy
from rankwise.train.recipe import AdapterFields, Recipe, TrainingFields
from rankwise.train.show import plan_table
from rankwise.train.trainer import AdapterTrainer, newest_checkpoint, sft_config

Batch = dict[str, Tensor]

TRAINING, HELD_OUT = "training", "held-out"


@dataclass(frozen=True)
class Loaded:
    """A model and what a recipe will adapt of it; nothing is changed."""

    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sites: Sequence[rw.Site]


@dataclass(frozen=True)
class Prepared:
    """A run that has passed its checks: the adapter is attached, nothing is trained."""

    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trainer: AdapterTrainer
    sites: Sequence[rw.Site]
    batches: Sequence[Batch]
    held_out: Dataset | None
    bar: ProgressBar


@dataclass(frozen=True)
class Result:
    """A finished run and where its files lie."""

    prepared: Prepared
    adapter: Path
    curve: Path
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    sample: Sample | None


def train(recipe: Recipe, console: Console) -> Result:
    """The whole run."""
    loaded = load(recipe, console)
    console.print(plan_table(loaded.sites))
    return execute(prepare(loaded, console), console)


def spec_of(recipe: Recipe) -> rw.LoRA:
    """The adapter that a recipe asks for."""
    return rw.LoRA.from_dict(recipe.section(AdapterFields))


def title_of(recipe: Recipe) -> str:
    """What a run is called on its card and curve."""
    return f"{Path(recipe.model).name} on {Path(recipe.data).stem}"


def load(recipe: Recipe, console: Console) -> Loaded:
    """The model, and which of its layers the recipe adapts. Reads no data."""
    with busy(console, "Loading the model"):
        model, tokenizer = load_pretrained(recipe.model, dtype=recipe.dtype, task=recipe.task)
    return Loaded(recipe, model, tokenizer, rw.plan(model, spec_of(recipe)))


def prepare(loaded: Loaded, console: Console, title: str = "Training") -> Prepared:
    """Check the data, and attach the adapter at its start."""
    recipe, model, tokenizer = loaded.recipe, loaded.model, loaded.tokenizer
    preflight.check_reached(model, loaded.sites)
    bar = ProgressBar(console, title)
    with busy(console, "Reading and tokenising the data"):
        data = load_data(recipe)
        preflight.check_form(data, recipe.task, tokenizer)
        given = {what: preflight.numbered(samples) for what, samples in _parts(data).items()}
        trainer = _trainer(recipe, model, tokenizer, given, data.loss, bar)
        tokenised = {TRAINING: trainer.train_dataset, HELD_OUT: trainer.eval_dataset}
    for what, samples in given.items():
        for warning in preflight.check_labels(tokenised[what], samples, what, tokenizer, recipe.max_length):
            console.print(f"[yellow]{warning}")
    with busy(console, "Computing the adapter's start"):
        batches = list(_start_batches(trainer, recipe))
        rw.attach(model, spec_of(recipe), batches=batches)
    return Prepared(recipe, model, tokenizer, trainer, loaded.sites, batches, data.eval, bar)


def execute(prepared: Prepared, console: Console) -> Result:
    """Train, then write the adapter, its card, the loss curve and the numbers."""
    recipe, trainer = prepared.recipe, prepared.trainer
    _train(prepared)
    out = Path(recipe.output_dir)
    adapter = out / "adapter"
    rw.save(prepared.model, adapter)
    prepared.tokenizer.save_pretrained(adapter)
    history = trainer.state.log_history
    sample = _held_out_sample(prepared)
    metrics = _metrics(prepared, history)
    curve = save_loss_curve({"run": history}, out / "loss.png", title_of(recipe))
    save_model_card(adapter, title=title_of(recipe), recipe=recipe, metrics=metrics, curve=curve, sample=sample)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return Result(prepared, adapter, curve, history, metrics, sample)


def _parts(data: Data) -> dict[str, Dataset]:
    return {TRAINING: data.train} | ({} if data.eval is None else {HELD_OUT: data.eval})


def _trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: dict[str, Dataset],
    loss: dict[str, bool],
    bar: ProgressBar,
) -> AdapterTrainer:
    """The trainer comes before the adapter: it tokenises the data that the start is computed from."""
    held_out = samples.get(HELD_OUT)
    args = sft_config(
        recipe.section(TrainingFields) | loss,
        max_length=recipe.max_length,
        seed=recipe.seed,
        has_eval=held_out is not None,
    )
    trainer = AdapterTrainer(
        model=model,
        args=args,
        train_dataset=samples[TRAINING],
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[bar, AdaLoraCallback()],
        lr_ratio=recipe.lr_ratio,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train(prepared: Prepared) -> None:
    """Train, and end with an evaluation of the adapter that is saved."""
    trainer = prepared.trainer
    try:
        trainer.train(resume_from_checkpoint=_checkpoint(prepared.recipe))
        evaluated = points(trainer.state.log_history, "eval_loss")[0]
        if trainer.eval_dataset is not None and evaluated[-1] != trainer.state.global_step:
            trainer.evaluate()
    finally:
        prepared.bar.stop()
        trainer.release()


def _start_batches(trainer: AdapterTrainer, recipe: Recipe) -> Iterator[Batch]:
    """The first batches of the run itself, on the model's device."""
    count = recipe.init_batches * recipe.gradient_accumulation_steps
    return islice(iter(trainer.get_train_dataloader()), count)


def _checkpoint(recipe: Recipe) -> str | None:
    """Where to resume from, if anywhere."""
    choice = recipe.resume_from_checkpoint
    if choice is True:
        return newest_checkpoint(recipe.output_dir)
    return choice or None


def _held_out_sample(prepared: Prepared) -> Sample | None:
    """The first held-out prompt, answered before and after; none where there are no prompts."""
    if prepared.held_out is None or "prompt" not in prepared.held_out.column_names:
        return None
    row = prepared.held_out[0]
    sample = before_and_after(prepared.model, prepared.tokenizer, row["prompt"])
    return replace(sample, reference=row["completion"]) if isinstance(row["completion"], str) else sample


def _metrics(prepared: Prepared, history: list[dict[str, Any]]) -> dict[str, Any]:
    trainer = prepared.trainer
    _, training = points(history, "loss")
    _, held_out = points(history, "eval_loss")
    return {
        "train_loss_first": training[0],
        "train_loss_last": training[-1],
        "eval_loss_before": held_out[0] if held_out else None,
        "eval_loss_after": held_out[-1] if held_out else None,
        "steps": trainer.state.global_step,
        "train_seconds": points(history, "train_runtime")[1][-1],
        "train_samples": len(trainer.train_dataset),
        "eval_samples": 0 if trainer.eval_dataset is None else len(trainer.eval_dataset),
        "trainable_parameters": sum(site.parameters for site in prepared.sites),
        "versions": {name: version(name) for name in ("rankwise", "torch", "transformers", "trl")},
        "python": platform.python_version(),
        "device": str(prepared.model.device),
    }
