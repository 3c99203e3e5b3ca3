"""A comparison from recipe to page."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

import rankwise as rw
from rankwise.compare.arms import Arm, presets, read_arms
from rankwise.compare.figures import panels
from rankwise.compare.runs import Budget, RemoteTrials, Trial, Trials, machine
from rankwise.compare.search import Outcome, Run, compare, runs_needed
from rankwise.compare.summary import Row, summary
from rankwise.errors import RankwiseError, RecipeError
from rankwise.report.page import page, write_page
from rankwise.train.data.dataset import load_data
from rankwise.train.recipe import Recipe
from rankwise.train.run import run
from rankwise.train.run.loading import check_method
from rankwise.train.tasks.base import Loaded, spec_of
from rankwise.trials.held_out import check_held_out
from rankwise.trials.on_ray import cluster
from rankwise.trials.preparing import target_weights


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what came of it."""

    recipe: Recipe
    seeds: int
    outcomes: Sequence[Outcome]
    rows: Sequence[Row]


def run_comparison(
    recipe: Recipe,
    directory: Path,
    console: Console,
    *,
    preset: str = "best",
    arms_file: Path | None = None,
    seeds: int = 3,
    minutes: float | None = None,
    steps_to_baseline: bool | None = None,
    ray: str | None = None,
) -> Comparison:
    """Compare a recipe's methods. Their runs are kept in ``directory``, so that it goes on where it was stopped.

    Args:
        arms_file: the arms; None: the preset's.
        minutes: after which no run is started any more; None: no end.
        steps_to_baseline: also find the shortest schedule of each arm that does as well as the first arm's whole one;
            None: with the preset best.
        ray: address of a Ray cluster whose machines train the arms; ``local``: workers here; None: this process does.

    Raises:
        RecipeError: arms that cannot be, no seeds, nothing held out, weights that full fine-tuning cannot train.
        SpecError, TargetError, EvidenceError: an arm that does not go with the model.
    """
    if seeds < 1:
        raise RecipeError(f"compare: expected 1 seed at least, found {seeds}")
    budget, recipe = Budget(minutes), _common(recipe)
    arms = presets(recipe, preset) if arms_file is None else read_arms(recipe, arms_file)
    shorten = (arms_file is None and preset == "best") if steps_to_baseline is None else steps_to_baseline
    data = load_data(recipe)
    check_held_out(data, "compare")
    check_arms(run.load(recipe, console), arms)
    runs = runs_needed(len(arms), seeds, steps_to_baseline=shorten)
    given = (directory, recipe, data, budget, console)
    if ray is None:
        announced = Announced(Trials(*given).run, runs, minutes, console)
        outcomes = compare(arms, announced, seeds, steps_to_baseline=shorten)
    else:
        with cluster(ray) as machines, ThreadPoolExecutor(len(arms) * seeds) as waiting:
            announced = Announced(RemoteTrials(machines, *given).run, runs, minutes, console)
            outcomes = compare(arms, announced, seeds, steps_to_baseline=shorten, mapped=waiting.map)
    return Comparison(recipe, seeds, outcomes, summary(outcomes))


def _common(recipe: Recipe) -> Recipe:
    """What all arms share of it: their runs neither resume nor report, and look at nothing on the way."""
    idle = {"alignment_steps": None, "report_to": "none", "resume_from_checkpoint": None, "init_cache": None}
    return recipe.model_copy(update=idle)


def check_arms(loaded: Loaded, arms: Sequence[Arm]) -> None:
    """Refuse what an arm asks of the model, or of its optimizer, before anything is trained."""
    for arm in arms:
        if arm.full is not None:
            target_weights(loaded)
            continue
        _check_method(arm)
        spec = replace(spec_of(arm.recipe), modules_to_save=loaded.spec.modules_to_save)
        rw.plan(loaded.model, spec, method=arm.recipe.init_method, memory_budget=arm.recipe.memory_budget)


def _check_method(arm: Arm) -> None:
    try:
        check_method(arm.recipe)
    except RankwiseError as error:
        raise RecipeError(f"arm {arm.name!r}: {error}") from None


class Announced:
    """Says how many runs there are, and once the first was timed how long they take."""

    def __init__(self, run: Run, runs: tuple[int, int], minutes: float | None, console: Console) -> None:
        self._run, self._runs, self._minutes, self._console = run, runs, minutes, console
        self._timed = False
        console.print(f"{runs[0]} to {runs[1]} runs, less those that are on file.", highlight=False)

    def __call__(self, arm: Arm) -> Trial:
        """The run."""
        trial = self._run(arm)
        if trial.elapsed and not self._timed:
            self._timed = True
            least, most = (f"{runs * trial.elapsed / 60:.0f}" for runs in self._runs)
            end = "" if self._minutes is None else f"; none is started after {self._minutes:g} minutes"
            self._console.print(
                f"At {trial.elapsed:.0f} s a run they take {least} to {most} minutes{end}.", highlight=False
            )
        return trial


def write_comparison(comparison: Comparison, directory: Path) -> Path:
    """Write the numbers as ``compare.json`` and the page as ``compare.html``; returns the page's path."""
    return write_page(directory / "compare.html", _page(comparison), results(comparison))


def results(comparison: Comparison) -> dict[str, Any]:
    """The summary and all runs, as plain data."""
    arms = [outcome.arm for outcome in comparison.outcomes]
    return {
        "recipe": _shared(comparison.recipe),
        "arms": {arm.name: {"full": arm.full, **_fields(arm.recipe)} for arm in arms},
        "seeds": comparison.seeds,
        "summary": [asdict(row) for row in comparison.rows],
        "runs": [
            {"arm": outcome.arm.name, "rate": rate, "seed": seed, **_figures(trial)}
            for outcome in comparison.outcomes
            for rate, seed, trial in outcome.runs
        ],
        "versions": _versions(),
        "machine": machine(),
    }


def _figures(trial: Trial) -> dict[str, Any]:
    return {name: value for name, value in asdict(trial).items() if name != "history"}


def _fields(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir"})


def _shared(recipe: Recipe) -> dict[str, Any]:
    """The recipe but for its rate, as every arm has its own."""
    return {name: value for name, value in _fields(recipe).items() if name != "learning_rate"}


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("rankwise", "torch", "transformers", "trl")}


def _page(comparison: Comparison) -> str:
    recipe, first = comparison.recipe, comparison.rows[0].arm
    unit = run.task_of(recipe).loss_unit
    return page(
        "Methods, each at its best rate",
        headline={
            "model": Path(recipe.model).name,
            "data": recipe.data_name,
            "arms": str(len(comparison.rows)),
            "seeds": str(comparison.seeds),
        },
        sections=[("Results", panels(comparison.outcomes, comparison.rows, unit))],
        configuration=yaml.safe_dump(_shared(recipe), sort_keys=False).strip(),
        versions=_versions(),
        notes=[
            "Every arm takes equally many steps on the same samples; held-out samples are validation and test in turn.",
            "Rates are chosen on the first seed's validation loss, then all seeds run at the rate chosen.",
            f"Shorter schedules keep the rate of the whole one. Seconds are of optimizer steps on {machine()}.",
            f"What others are measured by is {first}, at its own best rate.",
        ],
    )
