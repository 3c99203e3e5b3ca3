"""The optimizer that a recipe asks for."""

from __future__ import annotations

import torch
from torch import nn

from rankwise.attaching import attach
from rankwise.errors import RecipeError, SpecError
from rankwise.methods import name_of, resolve
from rankwise.optim import OPTIMIZERS
from rankwise.optim.choice import GroupsChoice, OptimizerChoice
from rankwise.spec import LoRA
from rankwise.train.recipe import Recipe


def optimizer_of(recipe: Recipe) -> OptimizerChoice:
    """The optimizer that a recipe asks for.

    Raises:
        SpecError: an unknown name or option. RecipeError: an option's value that it refuses, fields or a variant that
            do not go with it.
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
    _try(choice, recipe)
    return choice


def _try(choice: OptimizerChoice, recipe: Recipe) -> None:
    """Build it for one layer of the recipe's variant: what it refuses there need not wait for the model's start."""
    with torch.random.fork_rng(devices=[]):
        model = nn.ModuleDict({"any layer": nn.Linear(2, 2)})
    attach(model, LoRA(rank=1, variant=recipe.variant))
    try:
        choice(model, 1.0, recipe.weight_decay)
    except SpecError as error:
        raise RecipeError(f"`optimizer`: {name_of(OPTIMIZERS, choice)}: {error}") from None
