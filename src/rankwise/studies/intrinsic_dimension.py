"""How many numbers does the task need? (Aghajanyan 2020, arXiv 2012.13255.)

d₉₀ is the smallest dimension of a random subspace in which training reaches 90 % of what training all of the target
weights reaches. The paper scores accuracy; here the score is the fall of the held-out loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rankwise.studies.runs import Runs
from rankwise.train.recipe import Recipe
from rankwise.tuning import Tuned, tune

# The share of full fine-tuning's gain that counts as reached.
SHARE = 0.9
# Full fine-tuning wants a rate about ten times smaller than LoRA's ("LoRA Without Regret").
FULL_OVER_LORA = 1 / 16


@dataclass(frozen=True)
class Dimension:
    """The search for d₉₀ with one kind of projection.

    Attributes:
        d90: the smallest power of two that reached the goal; None where none up to the largest did.
        tried: dimension → its best rate and loss.
    """

    d90: int | None
    tried: Mapping[int, Tuned]


@dataclass(frozen=True)
class IntrinsicDimension:
    """The outcome of the study.

    Attributes:
        pretrained: held-out loss before training.
        full: training all target weights, at its best rate.
        goal: the loss that d₉₀ reaches.
        weights: how many there are.
        searches: "DID" and "SAID" → how it went.
    """

    pretrained: float
    full: Tuned
    goal: float
    weights: int
    searches: Mapping[str, Dimension]


def intrinsic_dimension(recipe: Recipe, layers: int, runs: Runs, *, largest: int = 2**18) -> IntrinsicDimension:
    """d₉₀ by bisection over the powers of two, with the learning rate of every dimension tuned.

    Args:
        layers: how many target layers there are.
        largest: dimension to try, where there are as many weights.
    """

    def at(rate: float) -> Recipe:
        return recipe.model_copy(update={"learning_rate": rate})

    pretrained = runs.untrained(recipe)
    full = tune(lambda rate: runs.full(at(rate)).loss, recipe.peak_learning_rate * FULL_OVER_LORA)
    weights = runs.full(at(full.rate)).parameters
    goal = pretrained - SHARE * (pretrained - full.loss)

    last: dict[int, float] = {}  # the dimension that was tried last → its best rate

    def search(layer_scales: bool) -> Dimension:
        def best(dimension: int) -> Tuned:
            def loss(rate: float) -> float:
                return runs.random_subspace(at(rate), dimension, layer_scales=layer_scales).loss

            # Adam moves every number by about its rate, so steps are equally long where rate · √d is. Where nothing
            # was tried yet, four times as long as a full step: a random direction does less.
            known, rate = last.popitem() if last else (weights, 4 * full.rate)
            tuned = tune(loss, rate * 2.0 ** round(math.log2(known / dimension) / 2), factor=4.0)
            last[dimension] = tuned.rate
            return tuned

        smallest = math.ceil(math.log2(layers + 1)) + 1 if layer_scales else 4
        return bisect(best, goal, smallest, int(math.log2(min(largest, weights))))

    return IntrinsicDimension(pretrained, full, goal, weights, {"DID": search(False), "SAID": search(True)})


def bisect(best: Callable[[int], Tuned], goal: float, low: int, high: int) -> Dimension:
    """The smallest 2ⁿ, n from ``low`` to ``high``, with ``best(2ⁿ).loss`` ≤ goal, if reaching it is monotone in n."""
    tried = {2**high: best(2**high)}
    if tried[2**high].loss > goal:
        return Dimension(None, tried)
    reached, low = high, low - 1  # invariant: 2^reached does, 2^low counts as not
    while reached - low > 1:
        middle = (reached + low) // 2
        tried[2**middle] = best(2**middle)
        if tried[2**middle].loss <= goal:
            reached = middle
        else:
            low = middle
    return Dimension(2**reached, dict(sorted(tried.items())))
