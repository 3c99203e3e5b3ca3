"""The beginning of a run, and all that planning needs: the model, and which of its layers a recipe adapts."""

from __future__ import annotations

from rich.console import Console

from rankwise.errors import RecipeError
from rankwise.reshaping import check_narrowable, check_restartable
from rankwise.train.model.busy import busy
from rankwise.train.recipe import Recipe
from rankwise.train.run.beside import earlier_run
from rankwise.train.run.tables import plan_table
from rankwise.train.tasks.base import Loaded, Task, spec_of
from rankwise.train.tasks.causal_lm import CausalLM
from rankwise.train.tasks.classification import Classification
from rankwise.train.tasks.grpo import Grpo
from rankwise.train.tasks.preference import preference_task
from rankwise.train.tasks.seq2seq import Seq2Seq
from rankwise.train.trainer.optimizer_choice import optimizer_of
from rankwise.train.trainer.trackers import check_trackers

TASKS: dict[str, Task] = {
    "causal-lm": CausalLM(),
    "classification": Classification(),
    "seq2seq": Seq2Seq(),
    "grpo": Grpo(),
}


def task_of(recipe: Recipe) -> Task:
    """The recipe's task; on preferences, the one that its loss is for."""
    return preference_task(recipe) if recipe.task == "preference" else TASKS[recipe.task]


def load(recipe: Recipe, console: Console) -> Loaded:
    """The model, and which of its layers the recipe adapts.

    Raises:
        SpecError, RecipeError: an option of the adapter or the optimizer, a tracker or an earlier run. TargetError:
            layers that do not fit.
    """
    check_method(recipe)
    check_trackers(recipe.report_to)
    if recipe.beside is not None:
        earlier_run(recipe.beside)
    with busy(console, "Loading the model"):
        return task_of(recipe).load(recipe)


def check_method(recipe: Recipe) -> None:
    """Refuse what does not go together in a recipe's method, whatever the model.

    Raises:
        SpecError, RecipeError: saying which fields.
    """
    optimizer_of(recipe)
    if recipe.restart_every is not None:
        check_restartable(spec_of(recipe))
    elif recipe.restart_rank is not None:
        raise RecipeError("`restart_rank`: cuts what restarts keep; expected restart_every beside it, found none")
    if recipe.ship_rank is not None:
        check_narrowable(spec_of(recipe), recipe.ship_rank)


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
