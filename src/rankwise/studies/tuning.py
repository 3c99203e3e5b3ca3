"""The learning rate of each arm of a study, found on a ladder of powers of two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rankwise.errors import TrainingError


@dataclass(frozen=True)
class Tuned:
    """A rate that does better than its neighbours on the ladder.

    Attributes:
        rate: it.
        loss: its loss.
        tried: every rate that was tried → its loss, by rate.
        bracketed: whether both neighbours were tried, and did worse.
    """

    rate: float
    loss: float
    tried: Mapping[float, float]
    bracketed: bool


def tune(loss: Callable[[float], float], start: float, *, factor: float = 2.0, most: int = 8) -> Tuned:
    """Walk down a ladder start · factorⁿ until the best rate has tried neighbours on both sides.

    A rate at which training diverges (``TrainingError``) counts as infinitely bad.

    Args:
        most: rates to try at most.

    >>> tuned = tune(lambda rate: abs(rate - 4e-3), start=1e-3)
    >>> tuned.rate, tuned.bracketed, len(tuned.tried)
    (0.004, True, 5)
    """
    found: dict[int, float] = {}

    def attempt(step: int) -> None:
        if step not in found and len(found) < most:
            try:
                found[step] = loss(start * factor**step)
            except TrainingError:
                found[step] = float("inf")

    best = 0
    while True:
        before = len(found)
        for step in (best, best - 1, best + 1):
            attempt(step)
        best = min(found, key=lambda step: found[step])
        if {best - 1, best + 1} <= found.keys() or len(found) == before:
            break
    tried = {start * factor**step: found[step] for step in sorted(found)}
    return Tuned(start * factor**best, found[best], tried, {best - 1, best + 1} <= found.keys())
