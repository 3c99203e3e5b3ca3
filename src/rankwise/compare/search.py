"""Arms → what they come to: each at its best rate, over seeds, and how soon each does as well as the first.

Everything is asked of one function, arm → trial, which raises ``BudgetSpent`` for what it may not train any more: then
what is on file still counts, and what is missing stays out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.compare.arms import Arm
from rankwise.compare.runs import BudgetSpent, Trial
from rankwise.tuning import tune

Run = Callable[[Arm], Trial]
# (function, what it is called with one after the other, or at once) → the results in that order.
Mapped = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
MOST_RATES = 8
TENTHS = 10


@dataclass(frozen=True)
class Ladder:
    """The search for an arm's rate, on the first seed.

    Attributes:
        tried: rate → its run.
        rate: the one with the least validation loss; None: none was tried.
        bracketed: whether the rates on both sides of it were tried, and did worse.
        complete: whether the search came to its end.
    """

    tried: Mapping[float, Trial]
    rate: float | None
    bracketed: bool
    complete: bool


@dataclass(frozen=True)
class Shortest:
    """The search for the shortest schedule that does as well as the first arm's whole one.

    Attributes:
        tried: the runs on shorter schedules.
        reached: of them and the whole one, the shortest that reached it; None: none did, or the search did not end.
        complete: whether it did.
    """

    tried: Sequence[Trial] = ()
    reached: Trial | None = None
    complete: bool = True


@dataclass(frozen=True)
class Outcome:
    """What an arm came to.

    Attributes:
        seeds: seed → its run at the arm's rate.
        shortest: None where it was not asked for.
        complete: whether all of it was run.
    """

    arm: Arm
    ladder: Ladder
    seeds: Mapping[int, Trial]
    shortest: Shortest | None
    complete: bool

    @property
    def runs(self) -> list[tuple[float, int, Trial]]:
        """Every run once, with its rate and seed."""
        rate, first = self.ladder.rate, self.arm.recipe.seed
        runs = [(tried, first, trial) for tried, trial in self.ladder.tried.items()]
        if rate is not None:
            runs += [(rate, seed, trial) for seed, trial in self.seeds.items() if seed != first]
            runs += [(rate, first, trial) for trial in (self.shortest.tried if self.shortest else ())]
        return runs


def compare(
    arms: Sequence[Arm], run: Run, seeds: int, *, steps_to_baseline: bool, mapped: Mapped = map
) -> list[Outcome]:
    """Every arm, first the rates of all, then the seeds of all, then the shorter schedules.

    Args:
        seeds: how many, from the recipe's on.
        steps_to_baseline: whether to look how soon each arm reaches the validation loss of the first.
        mapped: does what does not depend on each other, one after the other like ``map`` or at once.
    """
    ladders = list(mapped(lambda arm: climb(arm, run), arms))
    chosen = [
        (arm, ladder.rate, arm.recipe.seed + number)
        for number in range(seeds)
        for arm, ladder in zip(arms, ladders, strict=True)
        if ladder.rate is not None
    ]
    trials = list(mapped(lambda choice: _attempt(run, choice[0].at(*choice[1:])), chosen))
    repeats: list[dict[int, Trial]] = [{} for _ in arms]
    for (arm, _, seed), trial in zip(chosen, trials, strict=True):
        if trial is not None:
            repeats[arms.index(arm)][seed] = trial
    shortest: list[Shortest | None] = [None for _ in arms]
    if steps_to_baseline:
        baseline = repeats[0].get(arms[0].recipe.seed)
        others = list(zip(arms[1:], ladders[1:], strict=True))
        shortest[1:] = mapped(lambda pair: shorten(pair[0], pair[1], baseline, run), others)
    return [
        Outcome(arm, ladder, trials, short, _is_complete(ladder, short) and len(trials) == seeds)
        for arm, ladder, trials, short in zip(arms, ladders, repeats, shortest, strict=True)
    ]


def climb(arm: Arm, run: Run) -> Ladder:
    """The arm's best rate: factors of two from its recipe's, until both neighbours do worse."""
    tried: dict[float, Trial] = {}

    def validation_loss(rate: float) -> float:
        tried[rate] = run(arm.at(rate, arm.recipe.seed))
        return tried[rate].validation.loss

    try:
        tuned = tune(validation_loss, arm.recipe.peak_learning_rate, most=MOST_RATES)
    except BudgetSpent:
        best = min(tried, key=lambda rate: tried[rate].validation.loss, default=None)
        return Ladder(dict(sorted(tried.items())), best, False, False)
    return Ladder(dict(sorted(tried.items())), tuned.rate, tuned.bracketed, True)


def shorten(arm: Arm, ladder: Ladder, baseline: Trial | None, run: Run) -> Shortest:
    """The fewest tenths of the steps, each length with a schedule of its own, that reach the baseline's loss.

    The rate is that of the whole run. Where a length reaches it, all longer ones count as reaching it.
    """
    if baseline is None or ladder.rate is None or not ladder.complete:
        return Shortest(complete=False)
    whole = ladder.tried[ladder.rate]
    if not whole.validation.loss <= baseline.validation.loss < math.inf:
        return Shortest()
    at_rate, trials = arm.at(ladder.rate, arm.recipe.seed), {whole.steps: whole}

    def reached(steps: int) -> bool:
        trials[steps] = run(at_rate.shorter(steps, whole.steps))
        return trials[steps].validation.loss <= baseline.validation.loss

    try:
        steps = bisect(reached, tenths(whole.steps))
    except BudgetSpent:
        return Shortest(list(trials.values())[1:], complete=False)
    return Shortest(list(trials.values())[1:], trials[steps])


def tenths(steps: int) -> list[int]:
    """A tenth of the steps, two tenths and so on up to all of them; fewer lengths where there are fewer steps."""
    return sorted({max(1, steps * number // TENTHS) for number in range(1, TENTHS)} | {steps})


def bisect(reached: Callable[[int], bool], lengths: Sequence[int]) -> int:
    """The least of ascending lengths that reaches the goal; the last is known to."""
    low, high = -1, len(lengths) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if reached(lengths[middle]):
            high = middle
        else:
            low = middle
    return lengths[high]


def runs_needed(arms: int, seeds: int, *, steps_to_baseline: bool) -> tuple[int, int]:
    """How many runs a comparison takes at least, and at most."""
    shorter = math.ceil(math.log2(TENTHS)) * (arms - 1) if steps_to_baseline else 0
    return arms * (3 + seeds - 1), arms * (MOST_RATES + seeds - 1) + shorter


def _attempt(run: Run, arm: Arm) -> Trial | None:
    try:
        return run(arm)
    except BudgetSpent:
        return None


def _is_complete(ladder: Ladder, shortest: Shortest | None) -> bool:
    return ladder.complete and (shortest is None or shortest.complete)
