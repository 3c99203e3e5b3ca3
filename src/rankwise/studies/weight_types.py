"""Which weight matrices should LoRA adapt? (Hu 2021, section 7.1, table 5.)

One budget of parameters, spent on one kind of attention matrix at a higher rank or on several at a lower one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rankwise.errors import TargetError
from rankwise.sites import Site
from rankwise.studies.arms import Arm, compare
from rankwise.studies.runs import Runs
from rankwise.train.recipe import Recipe

# What families call the query, key, value and output projections.
NAMES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q_lin", "wq", "q"),
    "k": ("k_proj", "key", "k_lin", "wk", "k"),
    "v": ("v_proj", "value", "v_lin", "wv", "v"),
    "o": ("o_proj", "out_proj", "out_lin", "wo", "o"),
}
ARMS = ("q", "k", "v", "o", "qk", "qv", "qkvo")


def weight_types(recipe: Recipe, sites: Sequence[Site], runs: Runs, seeds: int) -> dict[str, Arm]:
    """Arm ("qv", ..., and "all" linear layers) → its outcome, at the budget of the recipe's rank on q alone.

    Args:
        sites: all linear layers of the model.

    Raises:
        TargetError: a model whose projections have other names, or are fused into one.
    """
    names = attention_names(sites)
    ends = {arm: [names[letter] for letter in arm] for arm in ARMS}
    ends["all"] = sorted({site.name.rpartition(".")[2] for site in sites})
    costs = {arm: _cost(sites, chosen) for arm, chosen in ends.items()}
    budget = recipe.rank * costs["q"]
    recipes = {
        arm: recipe.model_copy(update={"target_modules": chosen, "rank": max(1, round(budget / costs[arm]))})
        for arm, chosen in ends.items()
    }
    return compare(runs, recipes, seeds)


def attention_names(sites: Sequence[Site]) -> Mapping[str, str]:
    """What this model calls its "q", "k", "v" and "o"."""
    present = {site.name.rpartition(".")[2] for site in sites}
    names_by_letter = {letter: [name for name in names if name in present] for letter, names in NAMES.items()}
    missing = [letter for letter, names in names_by_letter.items() if not names]
    if missing:
        raise TargetError(
            f"expected linear layers for {', '.join(missing)} of the attention under one of the names "
            f"{', '.join(NAMES[missing[0]])}, found {', '.join(sorted(present))}; models whose projections are fused "
            "into one matrix cannot be studied by kind of matrix"
        )
    return {letter: names[0] for letter, names in names_by_letter.items()}


def _cost(sites: Sequence[Site], ends: Sequence[str]) -> int:
    """Trained numbers of rank 1 on these layers."""
    return sum(sum(site.shape) for site in sites if site.name.rpartition(".")[2] in ends)
