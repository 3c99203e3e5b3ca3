"""A run, in the order things happen: recipe → plan → checks → start → training → files.

`load` and `prepare` do everything that can fail for the user's reasons and are quick; `execute` spends the time.
"""

from __future__ import annotations

import json
import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import rankwise as rw
from rankwise.adapted.adapted import Adapted
from rankwise.adapter import Adapter
from rankwise.disk import whole_directory, write_file
from rankwise.errors import RunStopped
from rankwise.files import check_directory_name
from rankwise.format.save_load import portable
from rankwise.report.curve import save_loss_curve
from rankwise.report.history import points
from rankwise.report.page import write_report
from rankwise.train.data.dataset import Batch, Data, load_data
from rankwise.train.data.trained_on import is_chat, save_form
from rankwise.train.learning_rate import choice as learning_rate
from rankwise.train.learning_rate.choice import Choice, Search
from rankwise.train.model.busy import busy
from rankwise.train.model.generation import Sample
from rankwise.train.recipe import Recipe
from rankwise.train.run import adapter_start, lock, resume
from rankwise.train.run.beside import EarlierRun, earlier_run
from rankwise.train.run.card import save_model_card
from rankwise.train.run.loading import load as load
from rankwise.train.run.loading import show_plan as show_plan
from rankwise.train.run.loading import task_of as task_of
from rankwise.train.run.run_report import run_report
from rankwise.train.run.tables import advice_table, advice_text, trial_step_warnings
from rankwise.train.run.trial_step import TrialStep, try_step
from rankwise.train.tasks.base import DataSummary, Loaded
from rankwise.train.trainer.alignment_callback import AlignmentCallback
from rankwise.train.trainer.progress import ProgressBar, without_dataset_bars
from rankwise.train.trainer.reshaping_callback import check_steps
from rankwise.train.trainer.run_log import RunLog
from rankwise.train.trainer.stop_signal import StopOnSignal
from rankwise.train.trainer.trainer import RESULTS, AdapterTrainer
from rankwise.variants.base import FoldableLayer


@dataclass(frozen=True)
class Prepared:
    """A run that has passed its checks, and the checkpoint that it goes on from. Nothing is trained.

    Attributes:
        search: of a learning rate that is still to be chosen.
        choice: how the rate was chosen, where it was.
        earlier: the run that its page shows beside it.
        chats: whether the samples are conversations.
    """

    loaded: Loaded
    trainer: AdapterTrainer
    batches: Sequence[Batch]
    held_out: Dataset | None
    bar: ProgressBar
    summary: DataSummary
    alignment: AlignmentCallback | None = None
    trial: TrialStep | None = None
    checkpoint: Path | None = None
    search: Search | None = None
    choice: Choice | None = None
    earlier: EarlierRun | None = None
    chats: bool = False

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.loaded.recipe

    @property
    def model(self) -> PreTrainedModel:
        """The model with its adapter."""
        return self.loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.loaded.tokenizer


@dataclass(frozen=True)
class Result:
    """A finished run and where its files lie."""

    prepared: Prepared
    adapter: Path
    curve: Path
    page: Path
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    sample: Sample | None


def train(recipe: Recipe, console: Console) -> Result:
    """The whole run."""
    loaded = load(recipe, console)
    show_plan(loaded, console)
    return execute(prepare(loaded, console), console)


def title_of(recipe: Recipe) -> str:
    """What a run is called on its card and curve."""
    return f"{Path(recipe.model).name} on {recipe.data_name}"


def prepare(loaded: Loaded, console: Console, title: str = "Training") -> Prepared:
    """Check the data, and attach the adapter at its start."""
    return start(check_resuming(loaded, console, title), console)


def check_resuming(loaded: Loaded, console: Console, title: str = "Training", *, data: Data | None = None) -> Prepared:
    """Like :func:`check`, and that the run goes on exactly from its checkpoint, if it goes on from one."""
    # What refuses to go on should not wait for the data.
    checkpoint = resume.choose(loaded.recipe, console)
    if checkpoint is not None:
        loaded = replace(loaded, recipe=resume.with_rate_of(checkpoint, loaded.recipe))
    prepared = check(loaded, console, title, data=data)
    lock.check_free(loaded.recipe.output_dir)
    if checkpoint is not None:
        resume.check_exact(checkpoint, prepared.trainer.facts, console, anyway=loaded.recipe.resume_anyway)
    return replace(prepared, checkpoint=checkpoint)


def start(prepared: Prepared, console: Console, name: str = "default") -> Prepared:
    """Attach the adapter at its start, under a name, and try one step."""
    loaded = prepared.loaded
    if loaded.recipe.gradient_checkpointing:
        prepared.trainer.enable_activation_checkpointing()  # what fits in training must fit here
    adapter_start.attach(loaded, prepared.batches, prepared.trainer.batch_loss, console, name)
    with busy(console, "Trying one step"):
        trial = try_step(loaded.model, prepared.batches[0], prepared.trainer.batch_loss)
    for warning in trial_step_warnings(trial):
        console.print(warning, style="yellow", highlight=False)
    prepared = replace(prepared, trial=trial)
    if loaded.recipe.learning_rate != "auto":
        return prepared
    search = learning_rate.search(prepared.trainer, loaded.sites)
    console.print(str(search), highlight=False)
    return replace(prepared, search=search)


def check(loaded: Loaded, console: Console, title: str = "Training", *, data: Data | None = None) -> Prepared:
    """Check the data. No adapter is attached yet.

    Args:
        data: the samples, where they are not the recipe's own.
    """
    recipe, task = loaded.recipe, task_of(loaded.recipe)
    check_directory_name(Path(recipe.output_dir))
    bar = ProgressBar(console, title)
    with busy(console, "Reading and tokenising the data"), without_dataset_bars():
        data = load_data(recipe) if data is None else data
        task.check(loaded, data)
        trainer, warnings = task.trainer(loaded, data, bar)
        if recipe.reshapes:
            check_steps(recipe, trainer.run_steps)
        batches = adapter_start.first_batches(trainer, recipe)
        summary = task.summary(loaded, data, trainer, batches)
        alignment = None
        if recipe.alignment_steps is not None:
            alignment = AlignmentCallback(batches, recipe.alignment_steps, trainer.batch_loss)
            trainer.add_callback(alignment)
    for warning in (*warnings, *summary.warnings):
        console.print(warning, style="yellow")
    earlier = None if recipe.beside is None else earlier_run(recipe.beside)
    return Prepared(
        loaded, trainer, batches, data.eval, bar, summary, alignment, earlier=earlier, chats=is_chat(data.train[0])
    )


def advise(loaded: Loaded, parameters: int | None, console: Console) -> None:
    """Show what each rank captures of full fine-tuning's first step, and write the best ranks within a budget."""
    prepared = check(loaded, console)
    loss = prepared.trainer.batch_loss
    shares, advice = adapter_start.advise(loaded, prepared.batches, loss, parameters, console)
    path = Path(loaded.recipe.output_dir) / "rank_pattern.yaml"
    adapter_start.write_rank_pattern(advice, path)
    console.print(advice_table(shares))
    console.print(advice_text(advice, path), highlight=False)


@contextmanager
def saving_adapter(prepared: Prepared, name: str) -> Iterator[Path]:
    """Save the adapter as it is now, with what belongs to it, as a directory of the run that appears as a whole.

    Raises:
        WriteError: the system refuses. An adapter that was there is as it was.
    """
    with whole_directory(Path(prepared.recipe.output_dir) / name) as directory:
        rw.save(prepared.model, directory)
        prepared.tokenizer.save_pretrained(directory)
        task_of(prepared.recipe).save(prepared.loaded, directory)
        save_form(directory, chats=prepared.chats)
        yield directory


def execute(prepared: Prepared, console: Console, stop: StopOnSignal | None = None) -> Result:
    """Train, then write the adapter, its card, the loss curve, the numbers and the page that shows them.

    Args:
        stop: when to; None: when a signal comes.

    Raises:
        RunLocked: another process writes to the run's directory. RunStopped: SIGTERM or Ctrl-C came; the run is saved.
    """
    writes = prepared.trainer.is_world_process_zero()
    prepared.trainer.accelerator.wait_for_everyone()  # before the checkpoints that another still looks at are moved
    with lock.only_writer(prepared.recipe.output_dir, console) if writes else nullcontext():
        if writes:
            resume.tidy(prepared.recipe.output_dir, prepared.checkpoint, console)
        prepared = _at_chosen_rate(prepared, console)
        first = _change(prepared.model)
        _train(prepared, stop or StopOnSignal(console), console)
        return _written(prepared, first, console)


def _at_chosen_rate(prepared: Prepared, console: Console) -> Prepared:
    """The run at the rate that probes choose, or with the record of how it chose the one that it goes on with."""
    recipe = prepared.recipe
    if prepared.search is None:
        resumed = prepared.checkpoint is not None
        choice = learning_rate.recorded(recipe.output_dir, recipe.peak_learning_rate) if resumed else None
        return replace(prepared, choice=choice)
    with busy(console, "Choosing the learning rate"):
        choice = prepared.search.choose()
    console.print(str(choice), highlight=False)
    learning_rate.save(choice, recipe.output_dir)
    recipe = recipe.model_copy(update={"learning_rate": choice.rate, "rate_probe_steps": None})
    prepared.trainer.take_recipe(recipe)
    return replace(prepared, loaded=replace(prepared.loaded, recipe=recipe), search=None, choice=choice)


def _written(prepared: Prepared, first: Adapter | None, console: Console) -> Result:
    """The files of a trained run; ``first`` is its adapter before the first step."""
    recipe, trainer, task = prepared.recipe, prepared.trainer, task_of(prepared.recipe)
    out = Path(recipe.output_dir)
    history = trainer.state.log_history
    sample = task.sample(prepared.loaded, prepared.held_out)
    metrics = _metrics(prepared, history) | _squeeze_metrics(history) | task.metrics(history)
    result = Result(prepared, out / "adapter", out / "loss.png", out / "report.html", history, metrics, sample)
    if trainer.is_world_process_zero():
        save_loss_curve({"run": history}, result.curve, title_of(recipe), task.loss_unit)
        with saving_adapter(prepared, result.adapter.name) as directory:
            save_model_card(
                directory,
                adapter=result.adapter,
                title=title_of(recipe),
                recipe=recipe,
                metrics=metrics,
                figures=task.figures(metrics),
                curve=result.curve,
                sample=sample,
            )
        with busy(console, "Measuring the adapter"):
            _write_page(result, first)
        # Last: it says that the run is through.
        write_file(out / RESULTS, (json.dumps(metrics, indent=2) + "\n").encode())
    return result


def _change(model: PreTrainedModel) -> Adapter | None:
    """The adapter's change of the weights as it is now; None of one that acts behind its layers."""
    adapted = Adapted.of(model)
    layers = adapted.adapter_layers(adapted.adapter_name(None)).values()
    return portable(model) if all(isinstance(layer, FoldableLayer) for layer in layers) else None


def _write_page(result: Result, first: Adapter | None) -> None:
    prepared, recipe, task = result.prepared, result.prepared.recipe, task_of(result.prepared.recipe)
    report = run_report(
        title_of(recipe),
        recipe=recipe,
        spec=prepared.loaded.spec,
        model=prepared.model,
        first=first,
        last=_change(prepared.model),
        directory=result.adapter,
        history=result.history,
        loss_unit=task.loss_unit,
        layers=len(prepared.loaded.sites),
        data=prepared.summary.facts,
        earlier=prepared.earlier,
        metrics=result.metrics,
        figures=task.figures(result.metrics),
        sample=result.sample,
        choice=prepared.choice,
        over_run={} if prepared.alignment is None else prepared.alignment.measured,
    )
    write_report(report, result.page)


def _train(prepared: Prepared, stop: StopOnSignal, console: Console) -> None:
    """Train, and end with an evaluation of the adapter that is saved."""
    trainer = prepared.trainer
    trainer.add_callback(stop)
    trainer.add_callback(RunLog(Path(prepared.recipe.output_dir), console))
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if prepared.checkpoint is None else str(prepared.checkpoint))
        if stop.stopping:
            raise RunStopped(
                f"{prepared.recipe.output_dir}: {signal.Signals(stop.received).name} came, so the run stopped after "
                f"step {trainer.state.global_step} of {trainer.state.max_steps} and saved it. Start it again with "
                "resume_from_checkpoint: true to go on from there.",
                stop.received,
            )
        evaluated = points(trainer.state.log_history, "eval_loss")[0]
        if trainer.eval_dataset is not None and evaluated[-1] != trainer.state.global_step:
            trainer.evaluate()
    finally:
        prepared.bar.stop()
        trainer.release()


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
        "learning_rate": prepared.recipe.peak_learning_rate,
        "learning_rate_choice": None if prepared.choice is None else prepared.choice.to_dict(),
        "train_seconds": points(history, "train_runtime")[1][-1],
        "train_samples": len(trainer.train_dataset),
        "eval_samples": 0 if trainer.eval_dataset is None else len(trainer.eval_dataset),
        "trainable_parameters": sum(tensor.numel() for tensor in rw.trainable_parameters(prepared.model)),
        "versions": {name: version(name) for name in ("rankwise", "torch", "transformers", "trl")},
        "python": platform.python_version(),
        "device": str(prepared.model.device),
        "processes": trainer.args.world_size,
    }


def _squeeze_metrics(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run with `ship_rank`: the error of squeezing in the weights, and the held-out loss before and after it."""
    keys = {"squeeze_error": "squeeze_error", "wide_loss": "eval_loss_wide", "squeezed_loss": "eval_loss_squeezed"}
    logged = {name: points(history, key)[1] for key, name in keys.items()}
    return {name: values[-1] for name, values in logged.items() if values}
