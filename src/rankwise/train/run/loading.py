"""The beginning of a run, and all that planning needs: the model, and which of its layers a recipe adapts."""

from __future__ import annotations

from rich.console import Console

from rankwise.train.model.busy import busy
from rankwise.train.recipe import Recipe
from rankwise.train.run.tables import plan_table
from rankwise.train.tasks.base import Loaded, Task
from rankwise.train.tasks.causal_lm import CausalLM
from rankwise.train.tasks.classification import Classification
from rankwise.train.trainer.optimizer_choice import optimizer_of

TASKS: dict[str, Task] = {"causal-lm": CausalLM(), "classification": Classification()}


def load(recipe: Recipe, console: Console) -> Loaded:
    """The model, and which of its layers the recipe adapts.

    Raises:
        SpecError, RecipeError: an option of the adapter or the optimizer. TargetError: layers that do not fit.
    """
    optimizer_of(recipe)  # which says what is wrong with its options before the model is loaded
    with busy(console, "Loading the model"):
        return TASKS[recipe.task].load(recipe)


def show_plan(loaded: Loaded, console: Console) -> None:
    """Say what will be adapted, what its start is computed from, what trained whole, and at which rate."""
    console.print(plan_table(loaded.sites))
    if loaded.sites.evidence.kind != "nothing":
        console.print(str(loaded.sites.evidence), highlight=False, soft_wrap=True)
    for note in loaded.sites.left_out:
        console.print(f"Left out: {note}", highlight=False, soft_wrap=True, markup=False)
    if loaded.spec.modules_to_save:
        console.print(f"Trained whole and saved beside the adapter: {', '.join(loaded.spec.modules_to_save)}")
    console.print(_rate(loaded.recipe), highlight=False)


def _rate(recipe: Recipe) -> str:
    name = recipe.optimizer if isinstance(recipe.optimizer, str) else recipe.optimizer["name"]
    if recipe.learning_rate == "auto":
        return f"Optimizer: {name}, peak learning rate chosen before the first step"
    default = "" if "learning_rate" in recipe.model_fields_set else ", its default"
    return f"Optimizer: {name}, peak learning rate {recipe.learning_rate:g}{default}"
