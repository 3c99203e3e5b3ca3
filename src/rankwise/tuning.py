"""A learning rate, found on a ladder of powers of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rankwise.errors import Diverged


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

    A rate at which training diverges (``Diverged``) counts as infinitely bad.

    Args:
        most: rates to try at most.

    >>> tuned = tune(lambda rate: abs(rate - 4e-3), start=1e-3)
    >>> tuned.rate, tuned.bracketed, len(tuned.tried)
    (0.004, True, 5)
    """
    losses: dict[int, float] = {}

    def attempt(step: int) -> None:
        if step not in losses and len(losses) < most:
            try:
                losses[step] = loss(start * factor**step)
            except Diverged:
                losses[step] = float("inf")

    best = 0
    while True:
        before = len(losses)
        for step in (best, best - 1, best + 1):
            attempt(step)
        best = min(losses, key=lambda step: (losses[step], step))  # where all diverge, on downwards
        if {best - 1, best + 1} <= losses.keys() or len(losses) == before:
            break
    tried = {start * factor**step: losses[step] for step in sorted(losses)}
    bracketed = {best - 1, best + 1} <= losses.keys() and math.isfinite(losses[best])
    return Tuned(start * factor**best, losses[best], tried, bracketed)
