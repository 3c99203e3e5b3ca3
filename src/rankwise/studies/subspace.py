"""Do different ranks and seeds learn the same directions? (Hu 2021, section 7.2, figures 3 and 4.)"""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.format.peft import read_adapter
from rankwise.report.measure import Similarity, similarity
from rankwise.studies.arms import Arm
from rankwise.studies.runs import Runs
from rankwise.train.recipe import Recipe


@dataclass(frozen=True)
class SubspaceStudy:
    """φ between the changes of two ranks, and of two seeds at the larger one."""

    ranks: Similarity
    seeds: Similarity


def subspace(recipe: Recipe, arms: dict[str, Arm], runs: Runs) -> SubspaceStudy:
    """Compare what the ranks study trained: its smallest rank of 8 or more with its largest, two seeds of the largest.

    Args:
        arms: of the ranks study, over two seeds at least.
    """
    small, large = (str(rank) for rank in two_ranks(arms))

    def trained(rank: str, seed: int) -> tuple[str, Recipe]:
        changes = {"rank": int(rank), "learning_rate": arms[rank].learning_rate, "seed": seed}
        return f"rank {rank}, seed {seed}", recipe.model_copy(update=changes)

    def compared(one: tuple[str, Recipe], two: tuple[str, Recipe]) -> Similarity:
        outcomes = [runs.adapter(arm).adapter for _, arm in (one, two)]
        first, second = (read_adapter(path) for path in outcomes if path is not None)
        return similarity(one[0], first, two[0], second)

    seed = recipe.seed
    return SubspaceStudy(
        # Of different seeds: with the same one, the smaller A starts as the first rows of the larger.
        ranks=compared(trained(small, seed), trained(large, seed + 1)),
        seeds=compared(trained(large, seed), trained(large, seed + 1)),
    )


def two_ranks(arms: dict[str, Arm]) -> tuple[int, int]:
    """The paper's 8 and 64, or what comes nearest."""
    tried = sorted(int(rank) for rank in arms)
    return min(tried[:-1], key=lambda rank: abs(rank - 8)), tried[-1]
