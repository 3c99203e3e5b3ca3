"""Going on with a run: from which checkpoint, and whether that is exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from rankwise.errors import CheckpointError, SpecMismatch
from rankwise.train.learning_rate import choice as learning_rate
from rankwise.train.recipe import Recipe
from rankwise.train.trainer import checkpoints, exact_resume
from rankwise.train.trainer.contents import check_contents, steps_done
from rankwise.train.trainer.run_log import LOG
from rankwise.train.trainer.trainer import RESULTS

# What a run leaves beside its checkpoints.
_OF_A_RUN = ("adapter", "loss.png", "report.html", "report.json", RESULTS, LOG, learning_rate.FILE)


def choose(recipe: Recipe, console: Console) -> Path | None:
    """The checkpoint that a recipe resumes from, if any: the newest valid one, or the one that it names.

    Newer ones that are broken are named on the console, and none is ever deleted.

    Raises:
        CheckpointError: there is none. BrokenFile, UnsafeFile: the named one is broken.
    """
    choice = recipe.resume_from_checkpoint
    if not choice:
        return None
    if isinstance(choice, str):
        if not Path(choice).is_dir():
            raise CheckpointError(f"{choice}: no such directory; expected a checkpoint of the run to resume")
        checkpoints.check_directory(choice)
        check_contents(Path(choice))
        return Path(choice)
    newest, broken = checkpoints.newest_valid(recipe.output_dir)
    for error in broken:
        console.print(f"Passed over a broken checkpoint: {error}", style="yellow")
    if newest is None:
        state = f"found {len(broken)}, all broken: {broken[0]}" if broken else "found none"
        earlier = sorted(path.name for path in Path(recipe.output_dir).glob(f"{checkpoints.EARLIER}-*/"))
        moved = f" Those of earlier runs are in {', '.join(earlier)}." if earlier else ""
        raise CheckpointError(
            f"{recipe.output_dir}: expected a checkpoint-N directory to resume from, {state}. "
            f"Drop resume_from_checkpoint to start anew, or name the directory.{moved}"
        )
    return newest


def with_rate_of(checkpoint: Path, recipe: Recipe) -> Recipe:
    """The recipe with the rate that the run chose before its first step, where it was to choose one."""
    if recipe.learning_rate != "auto":
        return recipe
    chosen = checkpoints.facts_of(checkpoint)["recipe"]["learning_rate"]
    return recipe.model_copy(update={"learning_rate": chosen, "rate_probe_steps": None})


def check_exact(checkpoint: Path, now: Mapping[str, Any], console: Console, *, anyway: bool) -> None:
    """Compare what the checkpoint was written under with what it would go on under.

    Raises:
        SpecMismatch: they differ, and ``anyway`` is not set.
    """
    differences = exact_resume.differences(checkpoints.check_directory(checkpoint), now)
    if not differences:
        return
    listed = "".join(f"\n  {line}" for line in differences)
    if not anyway:
        raise SpecMismatch(
            f"{checkpoint}: the run would not go on exactly as it was:{listed}\nSet these back, or resume with "
            "resume_anyway: true (--resume-anyway) if the change is meant."
        )
    console.print(f"{checkpoint}: resuming, although not exactly:{listed}", style="yellow")


def tidy(run_dir: str | Path, resumed: Path | None, console: Console) -> None:
    """Ready a run's directory to be written to; call it holding the run's lock.

    What a killed writer left half-written goes. Checkpoints after the step that the run starts at belong to another
    course of it and would be mistaken for its newest: they are moved into a folder of their own, and with them, where
    the run starts anew, whatever else an earlier one left. The one that is resumed stays, whatever it is called.
    """
    checkpoints.clear_leftovers(run_dir)
    start = 0 if resumed is None else steps_done(resumed)
    later = [checkpoint for checkpoint in checkpoints.checkpoints(run_dir) if checkpoints.step_of(checkpoint) > start]
    later = [checkpoint for checkpoint in later if resumed is None or not checkpoint.samefile(resumed)]
    if resumed is None:
        later += [path for name in _OF_A_RUN if (path := Path(run_dir) / name).exists()]
    if any(path.name != LOG for path in later):
        folder = checkpoints.set_aside(Path(run_dir), later)
        names = ", ".join(sorted(path.name for path in later))
        moved = f"{names} moved to {folder.name}/"
        console.print(f"{run_dir}: the run starts at step {start}; {moved}", style="yellow")
