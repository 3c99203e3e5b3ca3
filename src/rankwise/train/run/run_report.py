"""The page at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

import rankwise as rw
from rankwise.adapter import Adapter
from rankwise.report.history import History
from rankwise.report.measure import measure, similarities
from rankwise.report.page import Alignments, Report
from rankwise.train.learning_rate.choice import Choice
from rankwise.train.model.generation import Sample
from rankwise.train.recipe import Recipe
from rankwise.train.run.beside import EarlierRun
from rankwise.train.run.report_parts import adapter_part, low_rank_part_only, texts, versions
from rankwise.train.run.tables import changed, squeeze_text
from rankwise.train.run.verdict import verdict
from rankwise.train.tasks.base import Figures


def run_report(
    title: str,
    *,
    recipe: Recipe,
    spec: rw.LoRA,
    model: PreTrainedModel,
    first: Adapter | None,
    last: Adapter | None,
    directory: Path,
    history: History,
    loss_unit: str,
    layers: int,
    data: Mapping[str, str],
    metrics: dict[str, Any],
    figures: Figures,
    sample: Sample | None,
    choice: Choice | None,
    earlier: EarlierRun | None,
    over_run: Alignments,
) -> Report:
    """What a run that has just ended did.

    Args:
        first, last: the adapter before its first step, and now; None where it changes no weight.
        directory: where it lies.
        layers: how many are adapted.
        data: label → text: what was trained on.
        choice: how the learning rate was chosen; None where the recipe names it.
        earlier: the run that is shown beside it.
        over_run: the alignment as it was measured along the run.
    """
    states = {"the start": first, "the end": last} if first and last else {}
    with rw.disabled(model):
        sites = measure(last, model) if last else []
    return Report(
        title=title,
        adapters=[adapter_part("adapter", directory, spec, sites, over_run.get(max(over_run, default=0)))],
        verdict=[*verdict(recipe, metrics, figures, history, layers), *(earlier.compared(metrics) if earlier else [])],
        headline=_headline(recipe, metrics, figures),
        data=data,
        similarities=similarities(states),
        runs={"this run": history, earlier.name: earlier.history} if earlier else {"run": history},
        loss_unit=loss_unit,
        over_run=over_run,
        samples=[] if sample is None else [texts(sample)],
        configuration=yaml.safe_dump(recipe.model_dump(exclude_defaults=True), sort_keys=False).strip(),
        versions=versions(),
        notes=[*(_notes(recipe, first, last) if first and last else []), *_rate_notes(choice)],
    )


def _notes(recipe: Recipe, first: Adapter, last: Adapter) -> list[str]:
    """What must be known to read the page right."""
    notes = low_rank_part_only(last)
    if any(site.delta.rank < last.sites[name].delta.rank for name, site in first.sites.items() if name in last.sites):
        notes.append("The start is kept in the adapter's pair, so that φ with all of the end's directions is 1 anyway.")
    if recipe.alignment_steps is not None:
        notes.append("Agreement with full fine-tuning's step: on the run's first batches; the maps are of its end.")
    return notes


def _rate_notes(choice: Choice | None) -> list[str]:
    """How the learning rate was chosen."""
    if choice is None:
        return []
    return [str(choice), f"The first of them is {choice.guess:g}, the product of these: {'; '.join(choice.reasons)}."]


def _headline(recipe: Recipe, metrics: dict[str, Any], task_figures: Figures) -> dict[str, str]:
    figures = {"trained parameters": f"{metrics['trainable_parameters']:,}", "steps": str(metrics["steps"])}
    if metrics["eval_loss_before"] is not None:
        figures["held-out loss"] = f"{metrics['eval_loss_before']:.4f} → {metrics['eval_loss_after']:.4f}"
    if "squeeze_error" in metrics:
        figures[f"squeezed to rank {recipe.ship_rank}"] = squeeze_text(metrics)
    shown = {label: changed(change) for label, change in task_figures.items()}
    return figures | shown | {"learning rate": f"{recipe.peak_learning_rate:g}", "seed": str(recipe.seed)}
