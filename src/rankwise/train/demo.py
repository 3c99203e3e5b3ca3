"""`rankwise demo`: LoRA-GA beside plain LoRA on a real model and real text, each at its own good learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import rankwise as rw
from rankwise.report.curve import save_loss_curve
from rankwise.train.model.busy import busy
from rankwise.train.model.merged import save_merged
from rankwise.train.recipe import Recipe
from rankwise.train.run.run import Result, execute, load, prepare
from rankwise.train.run.tables import sample_table

# What both runs share: sized so that both fit into a few minutes on two cores.
_COMMON = {
    "model": "smollm2-135m",
    "data": "kjv",
    "max_train_samples": 2000,
    "max_eval_samples": 32,
    "max_length": 192,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 30,
    "eval_steps": 15,
    "save_steps": 30,
    "logging_steps": 3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
}

# Each learning rate is the best of a grid of powers of two by held-out loss, measured with
# `python benchmarks/demo_learning_rates.py` into benchmarks/results/demo_learning_rates.json (one seed); the rates on
# either side did worse.
METHODS: dict[str, dict[str, object]] = {
    "LoRA": {"init": "kaiming", "learning_rate": 2e-3},
    "LoRA-GA": {"init": "lora-ga", "scaling": "rslora", "learning_rate": 6.25e-5},
}


@dataclass(frozen=True)
class Outcome:
    """One method's run, and how well its first step followed full fine-tuning's."""

    result: Result
    alignment: float


def recipe(method: str, output_dir: Path, **changes: object) -> Recipe:
    """The demo's recipe for one of `METHODS`."""
    return Recipe.model_validate({**_COMMON, **METHODS[method], "output_dir": str(output_dir), **changes})


def run_demo(out: Path, console: Console) -> None:
    """Train both, then say what came of it."""
    console.print(
        Panel(
            "A small language model (SmolLM2, 135 million parameters) learns to rewrite modern English verses into "
            "King James English. It is trained twice, with plain LoRA and with LoRA-GA; whole books that neither "
            "sees in training are kept back to judge them."
        )
    )
    outcomes = {method: _run(method, out, console) for method in METHODS}
    curve = save_loss_curve(
        {method: outcome.result.history for method, outcome in outcomes.items()},
        out / "loss.png",
        "Rewriting verses into King James English, SmolLM2-135M",
    )
    best = outcomes["LoRA-GA"].result
    merged = out / "merged"
    with busy(console, "Folding the adapter into the model"):
        save_merged(best.adapter, None, merged)
    console.print(_comparison(outcomes))
    if best.sample is not None:
        console.print(Panel(sample_table(best.sample), title="A verse from a book it never saw (LoRA-GA)"))
    console.print(_files(best.adapter, merged, curve, best.page))


def _run(method: str, out: Path, console: Console) -> Outcome:
    console.rule(method)
    prepared = prepare(load(recipe(method, out / method.lower()), console), console, title=method)
    with busy(console, "Comparing the first step with full fine-tuning's"):
        cosines = rw.analysis.first_step_alignment(prepared.model, prepared.batches[:4], optimizer="adamw")
    return Outcome(execute(prepared, console), fmean(cosines.values()))


def _comparison(outcomes: dict[str, Outcome]) -> Table:
    table = Table(title="What came of it", title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("")
    for method in outcomes:
        table.add_column(method, justify="right")
    metrics = [outcome.result.metrics for outcome in outcomes.values()]
    table.add_row("loss on unseen books, before", *(f"{m['eval_loss_before']:.3f}" for m in metrics))
    table.add_row("loss on unseen books, after", *(Text(f"{m['eval_loss_after']:.3f}", "bold") for m in metrics))
    table.add_row("first step: agreement with full fine-tuning", *(f"{o.alignment:.0%}" for o in outcomes.values()))
    table.add_row("learning rate", *(f"{o.result.prepared.recipe.peak_learning_rate:g}" for o in outcomes.values()))
    table.add_row("trained parameters", *(f"{m['trainable_parameters']:,}" for m in metrics))
    table.add_row("training time", *(f"{m['train_seconds']:.0f} s" for m in metrics))
    return table


_CAPTION = (
    "Loss: lower is better. Agreement: 100 % when the adapter's first step moves the model exactly as training all "
    "of its weights would, 0 % when unrelated. Each method runs at its own best learning rate."
)


def _files(adapter: Path, merged: Path, curve: Path, page: Path) -> Table:
    table = Table(title="Where it lies", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("adapter (LoRA-GA)", str(adapter))
    table.add_row("merged model", str(merged))
    table.add_row("loss curves", str(curve))
    table.add_row("report (LoRA-GA)", f"{page} (opens in a browser)")
    table.add_row("try it", f'rankwise generate {adapter} --prompt "..."')
    return table
