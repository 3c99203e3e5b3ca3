"""What a sweep came to: its arms' records read from disk, the best of them, and the page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rankwise.disk import write_files
from rankwise.errors import BrokenFile, Diverged
from rankwise.files import read_json
from rankwise.report.history import History, points
from rankwise.report.page import finite, page
from rankwise.sweep.arms import Arm
from rankwise.sweep.figures import panels
from rankwise.sweep.resuming import Stopped, results_of, stop_of
from rankwise.train.recipe import Recipe

PAGE = "sweep.html"
BEST = "best"  # a file with the place of the best adapter: a link would not survive every copy


@dataclass(frozen=True)
class Outcome:
    """What an arm came to.

    Attributes:
        validation: the last loss on the samples that arms are chosen by; infinite where it diverged.
        test: on the others; None of an arm that was stopped.
        rate: its peak learning rate, as chosen where it was to be.
        stopped: why it was stopped early; None: it was not.
    """

    arm: Arm
    validation: float
    test: float | None
    steps: int
    rate: float | None
    parameters: int | None
    history: History
    stopped: Stopped | None


@dataclass(frozen=True)
class Sweep:
    """What was trained, and what came of it.

    Attributes:
        best: of the arms that came to their ends, the one with the least validation loss.
    """

    recipe: Recipe
    outcomes: Sequence[Outcome]
    prune: str
    loss_unit: str
    best: Outcome


def outcome_of(recipe: Recipe, arms: Sequence[Arm], prune: str, loss_unit: str) -> Sweep:
    """What the arms' directories say.

    Raises:
        Diverged: every arm did. BrokenFile: an arm's records cannot be read.
    """
    outcomes = [_outcome(arm) for arm in arms]
    finished = [outcome for outcome in outcomes if outcome.stopped is None]
    if not finished:
        raise Diverged(
            f"{arms[0].directory.parent}: expected an arm that came to its end, found none: "
            f"{outcomes[0].stopped and outcomes[0].stopped.reason}"
        )
    return Sweep(recipe, outcomes, prune, loss_unit, min(finished, key=lambda outcome: outcome.validation))


def _outcome(arm: Arm) -> Outcome:
    stopped, results = stop_of(arm), results_of(arm)
    if stopped is not None and stopped.diverged:
        return Outcome(arm, math.inf, None, stopped.step, None, None, (), stopped)
    try:
        assert results is not None
        history = read_json(arm.directory / "report.json")["runs"]["run"]
        tests = points(history, "test_loss")[1]
        return Outcome(
            arm,
            results["eval_loss_after"],
            tests[-1] if tests else None,
            results["steps"],
            results["learning_rate"],
            results["trainable_parameters"],
            history,
            stopped,
        )
    except (KeyError, TypeError, AssertionError) as error:
        raise BrokenFile(
            f"{arm.directory}: expected the records of a run that is through, found: {error!r}; remove the directory "
            "to train this arm anew"
        ) from None


def write_sweep(sweep: Sweep, directory: Path) -> Path:
    """Write ``sweep.json``, the page that compares the arms, and ``best``; returns the page's path."""
    numbers = json.dumps(finite(results(sweep)), indent=1, ensure_ascii=False) + "\n"
    best = sweep.best.arm.directory.relative_to(directory) / "adapter"
    contents = {"sweep.json": numbers, BEST: f"{best.as_posix()}\n", PAGE: _page(sweep)}
    write_files(directory, {name: text.encode() for name, text in contents.items()}, last=PAGE)
    return directory / PAGE


def results(sweep: Sweep) -> dict[str, Any]:
    """All of it as plain data. A test loss is there for the best arm alone, as it is reported once."""
    return {
        "recipe": _fields(sweep.recipe),
        "prune": sweep.prune,
        "best": sweep.best.arm.name,
        "test": sweep.best.test,
        "arms": {outcome.arm.name: _figures(outcome) for outcome in sweep.outcomes},
        "versions": _versions(),
    }


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {
        "directory": outcome.arm.directory.name,
        "changes": dict(outcome.arm.changes),
        "validation": outcome.validation,
        "steps": outcome.steps,
        "learning_rate": outcome.rate,
        "parameters": outcome.parameters,
        "stopped": None if outcome.stopped is None else asdict(outcome.stopped),
        "history": [_logged(row) for row in outcome.history],
    }


def _logged(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("step", "loss", "eval_loss", "learning_rate", "grad_norm") if key in row}


def _fields(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir"})


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("rankwise", "torch", "transformers", "trl")}


def _page(sweep: Sweep) -> str:
    best, recipe = sweep.best, sweep.recipe
    headline = {
        "model": Path(recipe.model).name,
        "data": recipe.data_name,
        "arms": str(len(sweep.outcomes)),
        "best": best.arm.name,
        "its validation loss": f"{best.validation:.4f}",
        "its test loss": "–" if best.test is None else f"{best.test:.4f}",
    }
    return page(
        "Sweep",
        headline=headline,
        sections=[("Arms", panels(sweep.outcomes, best, sweep.loss_unit))],
        configuration=yaml.safe_dump(_fields(recipe), sort_keys=False).strip(),
        versions=_versions(),
        notes=[
            "Every arm is trained as it would be alone, with its own optimizer, schedule and order of the data.",
            "Held-out samples are validation and test in turn. The best arm is chosen on the validation samples; the "
            "test samples chose nothing, and are reported for it alone.",
        ],
    )
