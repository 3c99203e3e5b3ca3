"""How does ΔW compare to W? (Hu 2021, section 7.3, table 7.)"""

from __future__ import annotations

from torch import nn

from rankwise.format.peft import read_adapter
from rankwise.report.measure import SiteMeasures, measure
from rankwise.studies.arms import Arm
from rankwise.studies.runs import Runs
from rankwise.train.recipe import Recipe


def amplification_by_rank(
    recipe: Recipe, arms: dict[str, Arm], base: nn.Module, runs: Runs
) -> dict[str, list[SiteMeasures]]:
    """Rank → every site of the ranks study's adapter of that rank, measured against the base."""
    sites_by_rank = {}
    for rank, arm in arms.items():
        changes = {"rank": int(rank), "learning_rate": arm.learning_rate}
        directory = runs.adapter(recipe.model_copy(update=changes)).adapter
        assert directory is not None  # a run that trains an adapter has one
        sites_by_rank[rank] = measure(read_adapter(directory), base)
    return sites_by_rank
