"""Arms in equal shares for the machines of a Ray cluster, each share trained together on its machine."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from rich.console import Console

from rankwise.errors import RecipeError
from rankwise.sweep.arms import Arm
from rankwise.sweep.pruning import none
from rankwise.sweep.resuming import PLAN
from rankwise.sweep.training import Training
from rankwise.train.data.dataset import load_data
from rankwise.train.recipe import Recipe
from rankwise.train.run import lock, run
from rankwise.trials.on_ray import cluster
from rankwise.trials.preparing import SILENT


def train_remotely(address: str, recipe: Recipe, arms: Sequence[Arm], rows: int | None, console: Console) -> None:
    """Train the arms on a cluster. A share whose worker is killed is begun again, and goes on from its checkpoints.

    Raises:
        RecipeError: there is no cluster there, or one of its machines does not see the sweep's directory. What training
            raises.
    """
    with cluster(address) as machines:
        count = min(machines.workers, len(arms))
        console.print(f"{len(arms)} arms in {count} shares on {machines.workers} workers.", highlight=False)
        shares = [machines.start(_train, recipe, arms[first::count], rows) for first in range(count)]
        for wait in shares:
            wait()


def _train(recipe: Recipe, arms: Sequence[Arm], rows: int | None) -> None:
    """What a worker does with a share."""
    directory = arms[0].directory.parent
    if not (directory / PLAN).is_file():
        raise RecipeError(
            f"--ray: {platform.node()} does not see {directory}: expected a directory that all machines share"
        )
    for arm in arms:
        lock.forget(arm.directory)  # of a worker that was killed; the sweep's own lock keeps everyone else away
    Training(run.load(recipe, SILENT), arms, load_data(recipe), SILENT).train(none, rows)
