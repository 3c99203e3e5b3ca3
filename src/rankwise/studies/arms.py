"""Arms of a study: recipes that differ in one thing, each at its own best learning rate, over several seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from rankwise.studies.runs import Runs
from rankwise.train.recipe import Recipe
from rankwise.tuning import tune


@dataclass(frozen=True)
class Arm:
    """One arm's outcome.

    Attributes:
        rank: of its adapter.
        parameters: trained numbers.
        learning_rate: the best on the ladder, chosen on the first seed.
        losses: seed → held-out loss at that rate.
        tried: rate → held-out loss of the first seed.
        bracketed: whether the rates on both sides of the best were tried, and did worse.
    """

    rank: int
    parameters: int
    learning_rate: float
    losses: Mapping[int, float]
    tried: Mapping[float, float]
    bracketed: bool

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.losses.values())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return stdev(self.losses.values()) if len(self.losses) > 1 else 0.0


def compare(runs: Runs, recipes: Mapping[str, Recipe], seeds: int) -> dict[str, Arm]:
    """Train every recipe with ``seeds`` seeds, from its own on, at the best rate of a ladder around its own rate."""
    return {name: _arm(runs, recipe, seeds) for name, recipe in recipes.items()}


def _arm(runs: Runs, recipe: Recipe, seeds: int) -> Arm:
    def at(rate: float, seed: int) -> Recipe:
        return recipe.model_copy(update={"learning_rate": rate, "seed": seed})

    tuned = tune(lambda rate: runs.adapter(at(rate, recipe.seed)).loss, recipe.peak_learning_rate)
    outcomes = {seed: runs.adapter(at(tuned.rate, seed)) for seed in range(recipe.seed, recipe.seed + seeds)}
    losses = {seed: outcome.loss for seed, outcome in outcomes.items()}
    parameters = outcomes[recipe.seed].parameters
    return Arm(recipe.rank, parameters, tuned.rate, losses, tuned.tried, tuned.bracketed)
