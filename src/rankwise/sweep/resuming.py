"""Where a sweep stands: which arms are through, and the step from which the others go on together.

Arms are trained in one forward, whose rounding depends on who is in it. So those that go on do so from the same step,
and an arm that was stopped later than that is trained again, to be stopped again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise.disk import write_json
from rankwise.errors import SpecMismatch
from rankwise.files import read_json
from rankwise.sweep.arms import Arm
from rankwise.train.trainer import checkpoints
from rankwise.train.trainer.trainer import RESULTS

PLAN = "sweep-plan.json"
STOPPED = "stopped.json"  # of an arm that was stopped early


@dataclass(frozen=True)
class Stopped:
    """Why an arm was stopped early, and after which step.

    Attributes:
        diverged: then it has no results.
    """

    step: int
    reason: str
    diverged: bool = False


def record_stop(arm: Arm, stopped: Stopped) -> None:
    """Write it down, before the arm's files are written: without it they are those of an arm that ran to its end."""
    write_json(arm.directory / STOPPED, asdict(stopped))


def stop_of(arm: Arm) -> Stopped | None:
    """The record of an arm that was stopped; None of another."""
    path = arm.directory / STOPPED
    return Stopped(**read_json(path)) if path.is_file() else None


def results_of(arm: Arm) -> dict[str, Any] | None:
    """The numbers that an arm's run ended with; None where it did not."""
    path = arm.directory / RESULTS
    return read_json(path) if path.is_file() else None


def check_plan(directory: Path, plan: Mapping[str, Any]) -> None:
    """Refuse to go on with another sweep than the one that the directory holds; write down a new one.

    Raises:
        SpecMismatch: naming what differs.
    """
    path = directory / PLAN
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, plan)
        return
    before = read_json(path)
    different = sorted(name for name in before.keys() | plan.keys() if before.get(name) != plan.get(name))
    if different:
        raise SpecMismatch(
            f"{directory}: holds a sweep with other {', '.join(different)} (see {path.name}); its arms could not go on "
            "as they began. Set these back, or give this sweep another directory"
        )


def is_through(arm: Arm, step: int) -> bool:
    """Whether nothing is left to train after a step: the arm was stopped before or there, or came to its end."""
    stopped, results = stop_of(arm), results_of(arm)
    if stopped is not None:
        return stopped.step <= step and (stopped.diverged or results is not None)
    return results is not None and int(results["steps"]) <= step


def common_step(arms: Sequence[Arm]) -> int:
    """The newest step at which every arm is through or has a checkpoint that it can go on from; 0: begin."""
    steps = {checkpoints.step_of(path) for arm in arms for path in checkpoints.checkpoints(arm.directory)}
    steps |= {int(results["steps"]) for results in map(results_of, arms) if results is not None}
    for step in sorted(steps, reverse=True):
        if all(is_through(arm, step) or checkpoints.is_valid(checkpoint_at(arm, step)) for arm in arms):
            return step
    return 0


def checkpoint_at(arm: Arm, step: int) -> Path:
    """Where an arm's checkpoint of a step lies."""
    return arm.directory / checkpoints.name_of(step)


def trim(arms: Sequence[Arm], limit: int) -> None:
    """Keep only the newest checkpoints, once every arm has one of the newest step."""
    for arm in arms:
        checkpoints.keep_newest(arm.directory, limit)
