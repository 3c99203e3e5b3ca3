"""Outcomes → the figures of the table: means over seeds, the gap to full fine-tuning, shares of steps and seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rankwise.compare.search import Outcome

REFERENCE = "adamw"  # of full fine-tuning: what the gap is measured to


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the standard deviation; 0 for one seed."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None of no values."""
        numbers = list(values)
        if not numbers:
            return None
        mean = fmean(numbers)
        return cls(mean, stdev(numbers) if len(numbers) > 1 and math.isfinite(mean) else 0.0)


@dataclass(frozen=True)
class Row:
    """One arm's line.

    Attributes:
        rate: the best; None: none was tried.
        difference: of the test loss from the first arm's, seed by seed.
        gap_closed: share of the way from the first arm's test loss to full fine-tuning's; None where there is no gap.
        steps, seconds: of the shortest schedule that reached the first arm's validation loss, as shares of its own;
            None where none did or it was not looked for.
    """

    arm: str
    parameters: int
    rate: float | None
    bracketed: bool
    seeds: int
    validation: Spread | None
    test: Spread | None
    difference: Spread | None
    accuracy: Spread | None
    gap_closed: float | None
    steps: float | None
    seconds: float | None
    complete: bool


def summary(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row an arm, in their order."""
    baseline = outcomes[0]
    full = next((outcome for outcome in outcomes if outcome.arm.full == REFERENCE), None)
    return [_row(outcome, baseline, full) for outcome in outcomes]


def _row(outcome: Outcome, baseline: Outcome, full: Outcome | None) -> Row:
    trials = list(outcome.seeds.values())
    gap = None
    if full is not None:
        gap = gap_closed(_test_losses(outcome), _test_losses(baseline), _test_losses(full))
    steps, seconds = _shares(outcome, baseline)
    return Row(
        outcome.arm.name,
        max((trial.parameters for trial in trials), default=0),
        outcome.ladder.rate,
        outcome.ladder.bracketed,
        len(trials),
        Spread.of(trial.validation.loss for trial in trials),
        Spread.of(trial.test.loss for trial in trials),
        difference(_test_losses(outcome), _test_losses(baseline)),
        Spread.of(trial.test.accuracy for trial in trials if trial.test.accuracy is not None),
        gap,
        steps,
        seconds,
        outcome.complete,
    )


def _test_losses(outcome: Outcome) -> dict[int, float]:
    return {seed: trial.test.loss for seed, trial in outcome.seeds.items()}


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Spread | None:
    """arm − baseline over the seeds that both have: what a seed does to both alike is not in its spread.

    >>> spread = difference({0: 1.5, 1: 1.75, 2: 9.0}, {0: 1.25, 1: 1.5})
    >>> spread.mean, spread.deviation
    (0.25, 0.0)
    """
    return Spread.of(arm[seed] - baseline[seed] for seed in arm if seed in baseline)


def gap_closed(arm: Mapping[int, float], baseline: Mapping[int, float], full: Mapping[int, float]) -> float | None:
    """(baseline − arm)/(baseline − full), of means over the seeds that all three have.

    None where there is no such seed, or where full fine-tuning does no better than the baseline.

    >>> gap_closed({0: 1.1}, {0: 1.4, 1: 1.0}, {0: 1.0, 1: 1.0})
    0.75
    """
    seeds = arm.keys() & baseline.keys() & full.keys()
    if not seeds:
        return None
    reached, start, goal = (fmean(losses[seed] for seed in seeds) for losses in (arm, baseline, full))
    return round((start - reached) / (start - goal), 12) if start > goal else None


def _shares(outcome: Outcome, baseline: Outcome) -> tuple[float | None, float | None]:
    """The shortest schedule's steps and seconds over those of the baseline's whole one, on the first seed."""
    whole = baseline.seeds.get(baseline.arm.recipe.seed)
    reached = None if outcome.shortest is None else outcome.shortest.reached
    if reached is None or whole is None:
        return None, None
    return reached.steps / whole.steps, reached.seconds / whole.seconds
