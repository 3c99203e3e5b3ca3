"""The optimizer that a recipe asks for."""

from __future__ import annotations

from rankwise.errors import RecipeError
from rankwise.methods import name_of, resolve
from rankwise.optim import OPTIMIZERS
from rankwise.optim.choice import GroupsChoice, OptimizerChoice
from rankwise.train.recipe import Recipe


def optimizer_of(recipe: Recipe) -> OptimizerChoice:
    """The optimizer that a recipe asks for.

    Raises:
        SpecError: an unknown name or option. RecipeError: fields that do not go with it.
    """
    choice: OptimizerChoice = resolve(OPTIMIZERS, recipe.optimizer, "optimizer")
    if not isinstance(choice, GroupsChoice):
        for field in ("optim", "adam_beta1", "adam_beta2"):
            value, default = getattr(recipe, field), Recipe.model_fields[field].default
            if value != default:
                raise RecipeError(
                    f"`{field}`: goes with the optimizers adamw and lora-plus; with {name_of(OPTIMIZERS, choice)} "
                    f"expected {default!r}, found {value!r}. Leave it out; options stand in `optimizer` itself."
                )
    return choice
