"""Which arms can share a forward pass: those for which it changes nothing. The others take their steps alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankwise.errors import RankwiseError
from rankwise.sweep.course import Course
from rankwise.sweep.shared_model import Batch, RandomNumbers, Trunk, is_joinable, row_ranges


def check_joined(courses: Sequence[Course], trunk: Trunk, together: int) -> list[str]:
    """Let arms join whose first batch has, with the others' in one forward, the loss that it has alone.

    Returns:
        For each kind of arm that does not join, its names and the reason.
    """
    reasons = {course.arm.name: reason for course in courses if (reason := _own_reason(course))}
    joining = [course for course in courses if course.arm.name not in reasons]
    for first in range(0, len(joining), together):
        reasons |= _tried(joining[first : first + together], trunk)
    for course in courses:
        course.joins = course.arm.name not in reasons
    names = {reason: [arm for arm in reasons if reasons[arm] == reason] for reason in reasons.values()}
    return [f"Not in one forward with other arms: {', '.join(arms)}: {why}" for why, arms in names.items()]


def _own_reason(course: Course) -> str | None:
    spec = course.prepared.loaded.spec
    if spec.dropout:
        return "its dropout draws other random numbers there than alone"
    if spec.modules_to_save:
        return f"it trains modules whole ({', '.join(spec.modules_to_save)}), of which there is one for all rows"
    if not is_joinable(course.prepared.batches[0]):
        return "its batches are not rows of tokens with a mask"
    return None


@torch.no_grad()
def _tried(courses: Sequence[Course], trunk: Trunk) -> dict[str, str]:
    """Arm → why it does not join, of those that would be in a forward together."""
    batches = [course.prepared.batches[0] for course in courses]
    with torch.random.fork_rng():
        before = RandomNumbers.now()
        try:
            hidden = trunk.forward([course.seat for course in courses], batches)
        except RankwiseError as error:
            return {course.arm.name: str(error) for course in courses}
        if before.drawn_since():
            return {course.arm.name: "the model draws random numbers in training" for course in courses}
        losses = [_loss(c, trunk, b, hidden[r]) for c, b, r in zip(courses, batches, row_ranges(batches), strict=True)]
    near = torch.finfo(hidden.dtype).eps ** 0.5
    different = {}
    for course, loss in zip(courses, losses, strict=True):
        alone = course.prepared.trial.loss if course.prepared.trial else loss
        if not abs(loss - alone) <= near * max(1.0, abs(alone)):
            different[course.arm.name] = f"its first loss would be {loss:.6g} instead of {alone:.6g}"
    return different


def _loss(course: Course, trunk: Trunk, batch: Batch, hidden: Tensor) -> float:
    with course.seat.turn(), trunk.giving(hidden[:, : batch["input_ids"].shape[1]]):
        return float(course.prepared.model(**batch).loss)
