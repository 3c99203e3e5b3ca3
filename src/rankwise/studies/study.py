"""The table of studies, and one study from recipe to page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from rankwise.errors import RecipeError
from rankwise.methods import nearest
from rankwise.report import figures as report_figures
from rankwise.report.figures import Panel
from rankwise.report.measure import by_module
from rankwise.report.page import page, write_page
from rankwise.sites import Site
from rankwise.studies import figures
from rankwise.studies.amplification import amplification_by_rank
from rankwise.studies.intrinsic_dimension import intrinsic_dimension
from rankwise.studies.ranks import ranks
from rankwise.studies.runs import Runs
from rankwise.studies.subspace import subspace
from rankwise.studies.weight_types import weight_types
from rankwise.train.recipe import Recipe
from rankwise.train.run import run
from rankwise.train.tasks.base import Loaded


@dataclass(frozen=True)
class Request:
    """What a study works on."""

    recipe: Recipe
    loaded: Loaded
    runs: Runs
    seeds: int

    @property
    def unit(self) -> str:
        """Of the losses."""
        return run.task_of(self.recipe).loss_unit


@dataclass(frozen=True)
class Outcome:
    """What came of a study: its numbers as plain data, and its page's panels."""

    results: dict[str, Any]
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        summary: the question it asks.
        paper: where it comes from.
        repeats: whether it runs more than one seed.
    """

    summary: str
    paper: str
    conduct: Callable[[Request], Outcome]
    repeats: bool = True


def _weight_types(request: Request) -> Outcome:
    # The budget is shared out over all linear layers' kinds, whatever the recipe targets.
    everything = request.recipe.model_copy(update={"target_modules": "all-linear"})
    sites: Sequence[Site] = run.task_of(everything).load(everything).sites
    arms = weight_types(request.recipe, sites, request.runs, request.seeds)
    title = "One budget of parameters, spent on different matrices"
    panels = [
        figures.arms_panel("weight-types", title, arms, request.unit),
        figures.rates_panel("weight-types-rates", arms, request.unit),
    ]
    return Outcome({"arms": {name: asdict(arm) for name, arm in arms.items()}}, panels)


def _ranks(request: Request) -> Outcome:
    arms = _rank_arms(request)
    panels = [
        figures.arms_panel("ranks", "Rank", arms, request.unit),
        figures.rates_panel("ranks-rates", arms, request.unit),
    ]
    return Outcome({"arms": {name: asdict(arm) for name, arm in arms.items()}}, panels)


def _rank_arms(request: Request) -> dict[str, Any]:
    largest = min(min(site.shape) for site in request.loaded.sites)
    return ranks(request.recipe, largest, request.runs, request.seeds)


def _subspace(request: Request) -> Outcome:
    if request.seeds < 2:
        raise RecipeError(f"study subspace: compares two seeds: expected seeds of 2 or more, found {request.seeds}")
    outcome = subspace(request.recipe, _rank_arms(request), request.runs)
    panels = [report_figures.similarity(name, getattr(outcome, name)) for name in ("ranks", "seeds")]
    return Outcome(asdict(outcome), panels)


def _amplification(request: Request) -> Outcome:
    arms = _rank_arms(request)
    measured = amplification_by_rank(request.recipe, arms, request.loaded.model, request.runs)
    panels, results = [], {}
    for rank, sites in measured.items():
        panel = report_figures.amplification_table(sites)
        panels.append(Panel(f"Rank {rank}: {panel.title}", panel.reading, table=panel.table))
        results[rank] = {
            module: [
                asdict(amplification) | {"factor": amplification.factor}
                for amplification in (report_figures.against_base(site).amplification for site in members)
                if amplification is not None
            ]
            for module, members in by_module(sites)
        }
    return Outcome({"by_rank": results}, panels)


def _intrinsic_dimension(request: Request) -> Outcome:
    if request.recipe.quantization != "none":
        raise RecipeError("study intrinsic-dimension: trains the weights themselves: expected quantization: none")
    outcome = intrinsic_dimension(request.recipe, len(request.loaded.sites), request.runs)
    return Outcome(asdict(outcome), [figures.intrinsic_panel(outcome, request.unit)])


_LORA, _INTRINSIC = "arXiv 2106.09685, section 7", "arXiv 2012.13255"
STUDIES: dict[str, Study] = {
    "weight-types": Study("Which weight matrices should be adapted, at one parameter budget?", _LORA, _weight_types),
    "ranks": Study("Which rank is needed?", _LORA, _ranks),
    "subspace": Study("Do different ranks and seeds learn the same directions?", _LORA, _subspace),
    "amplification": Study("How does the change compare with the weight?", _LORA, _amplification),
    "intrinsic-dimension": Study("How many numbers does it take?", _INTRINSIC, _intrinsic_dimension, repeats=False),
}


def run_study(name: str, recipe: Recipe, directory: Path, seeds: int, console: Console) -> Outcome:
    """Conduct a study. Its training runs are kept in ``directory``, so that it goes on where it was stopped.

    Raises:
        RecipeError: no such study, or too few seeds for it.
    """
    if name not in STUDIES:
        raise RecipeError(f"study: expected one of {', '.join(STUDIES)}, found {name!r}{nearest(name, STUDIES)}")
    if seeds < 1:
        raise RecipeError(f"study: expected 1 seed at least, found {seeds}")
    _ = recipe.peak_learning_rate  # at which searches begin: says so where it is no number
    loaded = run.load(recipe, console)
    return STUDIES[name].conduct(Request(recipe, loaded, Runs(directory, console), seeds))


def write_outcome(name: str, outcome: Outcome, recipe: Recipe, seeds: int, directory: Path) -> Path:
    """Write a study's numbers as ``NAME.json`` and its page as ``NAME.html``; returns the page's path."""
    study = STUDIES[name]
    seeds = seeds if study.repeats else 1
    versions = {package: version(package) for package in ("rankwise", "torch", "transformers", "trl")}
    fields = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir"})
    content = {
        "what": study.summary,
        "paper": study.paper,
        "recipe": fields,
        "seeds": seeds,
        **outcome.results,
        "versions": versions,
        "threads": torch.get_num_threads(),
    }
    html = page(
        study.summary,
        headline={"study": name, "model": Path(recipe.model).name, "data": recipe.data_name, "seeds": str(seeds)},
        sections=[("Results", outcome.panels)],
        configuration=yaml.safe_dump(fields, sort_keys=False).strip(),
        versions=versions,
        notes=[
            f"After {study.paper}.",
            "Every arm runs at its own best learning rate, chosen on the first seed's held-out loss.",
        ],
    )
    return write_page(directory / f"{name}.html", html, content)
