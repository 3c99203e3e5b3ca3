"""What rank does LoRA need? (Hu 2021, section 7.2, table 6.)"""

from __future__ import annotations

from rankwise.studies.arms import Arm, compare
from rankwise.studies.runs import Runs
from rankwise.train.recipe import Recipe

RANKS = (1, 2, 4, 8, 64)


def ranks(recipe: Recipe, largest: int, runs: Runs, seeds: int) -> dict[str, Arm]:
    """Rank → its outcome on the recipe's targets. Ranks above ``largest`` are left out."""
    wanted = [rank for rank in RANKS if rank <= largest]
    return compare(runs, {str(rank): recipe.model_copy(update={"rank": rank}) for rank in wanted}, seeds)
