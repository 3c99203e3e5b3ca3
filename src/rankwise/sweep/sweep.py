"""A sweep from recipe to its arms' runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rankwise.errors import RankwiseError, RecipeError
from rankwise.methods import nearest
from rankwise.sweep.arms import Arm
from rankwise.sweep.outcome import Sweep, outcome_of
from rankwise.sweep.pruning import PRUNERS
from rankwise.sweep.remote import train_remotely
from rankwise.sweep.resuming import check_plan
from rankwise.sweep.training import Training
from rankwise.train.data.dataset import load_data
from rankwise.train.recipe import Recipe
from rankwise.train.run import lock, run
from rankwise.train.run.loading import check_method
from rankwise.trials.held_out import check_held_out


def run_sweep(
    recipe: Recipe,
    arms: Sequence[Arm],
    directory: Path,
    console: Console,
    *,
    prune: str = "none",
    rows: int | None = None,
    ray: str | None = None,
) -> Sweep:
    """Train a recipe's arms together, each as `rankwise train` would train it alone. Stopped, it goes on.

    Args:
        directory: of the sweep; the arms' directories are below it.
        prune: who is stopped early, a name from ``PRUNERS``.
        rows: how many a forward may hold, whole batches of arms; None: as many as fit.
        ray: address of a Ray cluster whose machines take the arms in equal shares; ``local``: workers here; None: this
            process trains them.

    Raises:
        RecipeError: another task or a pruner that there is not, nothing held out, an arm's fields that do not fit.
        SpecError, TargetError, EvidenceError: an arm that does not go with the model. SpecMismatch: the directory holds
            another sweep. RunLocked: another process writes to it. RunStopped: a signal came; every arm is saved.
    """
    if prune not in PRUNERS:
        raise RecipeError(f"prune: expected one of {', '.join(PRUNERS)}, found {prune!r}{nearest(prune, PRUNERS)}")
    if ray is not None and prune != "none":
        raise RecipeError(f"prune: arms on several machines are not judged together; expected none, found {prune}")
    _check(recipe, arms)
    data = load_data(recipe)
    check_held_out(data, "sweep")
    with lock.only_writer(directory, console):
        check_plan(directory, _plan(recipe, arms, prune, rows))
        if ray is None:
            Training(run.load(recipe, console), arms, data, console).train(PRUNERS[prune], rows)
        else:
            train_remotely(ray, recipe, arms, rows, console)
    return outcome_of(recipe, arms, prune, run.task_of(recipe).loss_unit)


def _check(recipe: Recipe, arms: Sequence[Arm]) -> None:
    """Refuse what cannot be trained together, before a model is loaded."""
    if recipe.task != "causal-lm":
        raise RecipeError(
            f"`task`: a sweep trains language models, found {recipe.task}, whose new head starts from the seed and is "
            "trained whole, so that arms share too little; use rankwise compare"
        )
    if recipe.resume_from_checkpoint is not None:
        raise RecipeError("`resume_from_checkpoint`: a sweep goes on by itself, from its own directory; leave it out")
    for arm in arms:
        try:
            check_method(arm.recipe)
        except RankwiseError as error:
            raise RecipeError(f"arm {arm.name!r}: {error}") from None


def _plan(recipe: Recipe, arms: Sequence[Arm], prune: str, rows: int | None) -> dict[str, Any]:
    """What decides how the arms are trained: the recipes but for their places."""
    shared = recipe.model_dump(mode="json", exclude={"output_dir"}, exclude_defaults=True)
    own = {arm.name: dict(arm.changes) for arm in arms}
    return {"recipe": shared, "arms": own, "prune": prune, "rows": rows}
