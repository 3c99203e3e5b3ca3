"""Tables for the terminal."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

import rankwise as rw
from rankwise.grids import GRIDS

if TYPE_CHECKING:
    from rankwise.analysis.rank_advice import RankAdvice
    from rankwise.planning import Plan
    from rankwise.quantising import QuantisedMerge
    from rankwise.train.model.generation import Sample
    from rankwise.train.model.merged import Merged
    from rankwise.train.run.trial_step import TrialStep
    from rankwise.train.tasks.base import DataSummary, Figures

ADVISED_RANKS = (1, 2, 4, 8, 16, 32)


def plan_table(sites: Plan) -> Table:
    """The plan; layers that differ only in their number share a line."""
    total = f"{sites.parameters:,}"
    table = Table(title="What is adapted", title_justify="left", show_footer=True)
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 1, 0, 0), False
    table.add_column("layers", footer="total", overflow="fold")
    table.add_column("count", justify="right", footer=str(len(sites)))
    table.add_column("kind")
    table.add_column("out × in", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("scale", justify="right")
    table.add_column("parameters", justify="right", footer=total)
    groups: defaultdict[tuple[str, str, tuple[int, int], int, float], list[rw.Site]] = defaultdict(list)
    for site in sites:
        groups[_without_numbers(site.name), site.kind, site.shape, site.rank, site.scale].append(site)
    for (name, kind, (out, into), rank, scale), members in groups.items():
        parameters = sum(sites.variant.parameters(site) for site in members)
        table.add_row(name, str(len(members)), kind, f"{out} × {into}", str(rank), f"{scale:.4g}", f"{parameters:,}")
    return table


def advice_table(shares: Mapping[str, Sequence[float]]) -> Table:
    """Share of full fine-tuning's first step that each rank captures, the mean over layers alike."""
    shown = [rank for rank in ADVISED_RANKS if rank <= min(map(len, shares.values()))]
    table = Table(title="Share of full fine-tuning's first step that a LoRA-GA start of each rank captures")
    table.title_justify, table.box, table.padding, table.pad_edge = "left", box.SIMPLE_HEAD, (0, 1, 0, 0), False
    table.add_column("layers", overflow="fold")
    for rank in shown:
        table.add_column(str(rank), justify="right", no_wrap=True)
    groups: defaultdict[str, list[Sequence[float]]] = defaultdict(list)
    for name, values in shares.items():
        groups[_without_numbers(name)].append(values)
    for name, members in groups.items():
        columns = [[values[rank - 1] for values in members] for rank in shown]
        table.add_row(name, *(f"{sum(column) / len(column):.0%}" for column in columns))
    return table


def advice_text(advice: RankAdvice, path: Path) -> str:
    """What sharing the ranks out would gain, and where the ranks lie."""
    ranks = sorted(advice.ranks.values())
    return (
        f"{advice.parameters:,} parameters shared out over the layers (ranks {ranks[0]} to {ranks[-1]}, median "
        f"{ranks[len(ranks) // 2]}) capture {advice.captured:.1%} of the gradients' energy; rank {advice.equal_rank} "
        f"everywhere {advice.captured_by_equal_rank:.1%}.\nThe ranks are in {path}: copy them into the recipe."
    )


def data_table(data: DataSummary, trial: TrialStep | None) -> Table:
    """What a run trains on, and what its first step showed."""
    table = _facts("What it trains on")
    for label, text in data.facts.items():
        table.add_row(label, text)
    if trial is not None:
        table.add_row("one step", f"loss {trial.loss:.4f}, every gradient finite")
        table.add_row(
            "memory",
            f"{trial.needed / _GIB:.2f} GiB of {trial.available / _GIB:.0f}: weights {trial.weights / _GIB:.2f}, "
            f"gradients and Adam's moments {trial.training / _GIB:.2f}, activations {trial.activations / _GIB:.2f}",
        )
    return table


def samples_table(data: DataSummary) -> Table:
    """The first samples as the model sees them: what it is trained to write is bold and green."""
    title = Text.assemble("First samples; ", ("what is trained", "bold green"), " stands out")
    table = Table(title=title, title_justify="left", show_header=False)
    table.box = box.SIMPLE
    for number, pieces in enumerate(data.samples, 1):
        text = Text()
        for piece, trained in pieces:
            text.append(_shortened(piece), "bold green" if trained else "dim")
        table.add_row(str(number), text)
    return table


def _shortened(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} […] {text[-most // 2 :]}"


def trial_step_warnings(trial: TrialStep) -> list[str]:
    """What a first step showed that may not be meant."""
    warnings = []
    if trial.idle:
        warnings.append(
            f"{len(trial.idle)} adapted layers got no gradient from the first batch (the first is {trial.idle[0]}): "
            "experts that no token chose, or layers that the loss does not depend on"
        )
    if trial.needed > 0.9 * trial.available:
        warnings.append(
            f"a step takes about {trial.needed / _GIB:.1f} GiB, the device has {trial.available / _GIB:.1f}: lower "
            "per_device_train_batch_size or max_length, or set gradient_checkpointing: true"
        )
    return warnings


_GIB = 2**30


def changed(change: tuple[str, str]) -> str:
    """A figure before and after, or as it is."""
    return " → ".join(filter(None, change))


def summary(metrics: dict[str, Any], figures: Figures, adapter: Path, page: Path) -> Table:
    """How a run ended and where its files lie."""
    table = _facts("Done")
    if metrics["eval_loss_before"] is not None:
        table.add_row("held-out loss", f"{metrics['eval_loss_before']:.4f} → {metrics['eval_loss_after']:.4f}")
    if "squeeze_error" in metrics:
        table.add_row("squeezed", squeeze_text(metrics))
    for label, change in figures.items():
        table.add_row(label, changed(change))
    if metrics["train_loss_first"] != metrics["train_loss_last"]:  # else it was logged once only
        table.add_row("training loss", f"{metrics['train_loss_first']:.4f} → {metrics['train_loss_last']:.4f}")
    table.add_row("steps", f"{metrics['steps']} in {metrics['train_seconds']:.0f} s")
    table.add_row("adapter", str(adapter))
    table.add_row("report", f"{page} (opens in a browser)")
    return table


def squeeze_text(metrics: Mapping[str, Any]) -> str:
    """What squeezing cost, in the weights and in held-out loss, and what the steps after it made of that."""
    lost = f"{metrics['squeeze_error']:.1%} of the change lost"
    if "eval_loss_wide" not in metrics:
        return lost
    losses = (metrics[f"eval_loss_{when}"] for when in ("wide", "squeezed", "after"))
    return f"{lost}; held-out loss {' → '.join(f'{loss:.4f}' for loss in losses)}"


def sample_table(sample: Sample) -> Table:
    """A prompt and its answers."""
    table = _facts("")
    table.add_row("prompt", sample.prompt.strip())
    table.add_row("before", sample.before)
    table.add_row("after", sample.after)
    if sample.reference is not None:
        table.add_row("reference", sample.reference.strip())
    return table


def merge_table(merged: Merged, out: Path) -> Table:
    """What was folded, and what rounding to the weights' precision cost."""
    report, table = merged.weights, _facts("Merged")
    table.add_row("layers", str(len(report.sites)))
    lost = report.sites[report.worst].lost
    table.add_row("lost to rounding", f"{report.lost:.2%} of the change; {lost:.2%} at the worst layer, {report.worst}")
    table.add_row("outputs moved", f"{merged.logit_gap:.1e} of the largest logit, on a few lines of text")
    table.add_row("model", str(out))
    return table


def quantised_table(merged: QuantisedMerge, divergence: float, out: Path) -> Table:
    """What was folded, what storing it in few bits costs, and how it is loaded."""
    sites, table = merged.sites, _facts("Merged")
    errors = sorted(site.error for site in sites.values())
    worst = max(sites, key=lambda path: sites[path].error)
    table.add_row("layers", f"{len(sites)}, for {GRIDS[merged.to].summary}")
    if merged.others.sites:
        table.add_row("in their own precision", ", ".join(merged.others.sites))
    table.add_row(
        "weights off by", f"{errors[len(errors) // 2]:.2%} at the median layer, {errors[-1]:.2%} at the worst, {worst}"
    )
    if lost := sorted(site.output_error for site in sites.values() if site.output_error is not None):
        table.add_row(
            "layers' outputs off by", f"{lost[len(lost) // 2]:.2%} at the median, {lost[-1]:.2%} at the worst"
        )
    table.add_row("divergence", f"{divergence:.2g} nats a token, on a few lines of text")
    table.add_row("model", str(out))
    return table


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
