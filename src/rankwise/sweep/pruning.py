"""Which arms are stopped early, from the validation losses of all of them at a step.

All arms stand at the same step when they are judged, so a rule needs no memory of arms before it and gives the same
answer whenever it is asked, also by a sweep that goes on after it was killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median

# (arm → validation loss at this step, the share of the run that is done, how many arms began) → arm → why it is
# stopped.
Pruner = Callable[[Mapping[str, float], float, int], dict[str, str]]

WARM_UP = 0.25  # of the run, in which the median stops nobody: a warm-up of the rate, or a slow start, is not a loss


def none(losses: Mapping[str, float], done: float, began: int) -> dict[str, str]:
    """Nobody is stopped."""
    return {}


def halving(losses: Mapping[str, float], done: float, began: int) -> dict[str, str]:
    """Successive halving (Jamieson and Talwalkar 2016): half of the arms have half of the run before them.

    Of n arms the better half goes on after 2^-⌈log₂ n⌉ of the run, half of these after twice as much, and one alone
    is trained to the end.

    >>> sorted(halving({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, 0.25, began=4))
    ['c', 'd']
    """
    rounds = math.ceil(math.log2(began))
    passed = sum(2.0**-left <= done for left in range(1, rounds + 1))
    kept = max(1, math.ceil(began / 2**passed))
    ranked = sorted(losses, key=lambda arm: (losses[arm], arm))
    return {
        arm: f"{place} of {len(ranked)} by validation loss ({losses[arm]:.4f}), of which {kept} went on"
        for place, arm in enumerate(ranked[kept:], kept + 1)
    }


def median_rule(losses: Mapping[str, float], done: float, began: int) -> dict[str, str]:
    """Whoever does worse than the median of the arms at this step, after a quarter of the run (Golovin et al. 2017).

    >>> median_rule({"a": 1.0, "b": 2.0, "c": 3.0}, 0.5, began=3)
    {'c': 'validation loss 3.0000, worse than the median 2.0000'}
    """
    middle = median(losses.values())
    if done < WARM_UP:
        return {}
    return {
        arm: f"validation loss {loss:.4f}, worse than the median {middle:.4f}"
        for arm, loss in losses.items()
        if loss > middle
    }


PRUNERS: dict[str, Pruner] = {"none": none, "halving": halving, "median": median_rule}
