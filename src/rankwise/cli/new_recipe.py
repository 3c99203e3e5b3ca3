"""`rankwise new`: a first recipe from a few answers, each checked as it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rankwise.disk import write_file
from rankwise.errors import RecipeError
from rankwise.train import recipe as recipes
from rankwise.train.recipe import Recipe

# What is asked, in this order, and the answer that is offered.
QUESTIONS: Mapping[str, str] = {
    "model": "smollm2-135m",
    "task": "causal-lm",
    "data": "kjv",
    "eval_split": "0.05",
    "init": "kaiming",
    "rank": "8",
    "learning_rate": "auto",
    "num_train_epochs": "3",
    "per_device_train_batch_size": "8",
    "output_dir": "rankwise-run",
}
_NEEDED = {"model": "smollm2-135m", "data": "kjv"}  # for an answer to be checked by itself

# (question, the answer that is offered) → the answer.
Ask = Callable[[str, str], str]


def answers(ask: Ask, refuse: Callable[[str], None], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe: those that are given, and the others asked for until each can be used.

    Args:
        refuse: told why an answer cannot be used, before it is asked for again.
    """
    values = dict(given)
    for name, offered in QUESTIONS.items():
        while name not in values:
            try:
                value = recipes.flag_value(name, ask(question(name), offered))
                recipes.parse({**_NEEDED, name: value})
            except RecipeError as error:
                refuse(str(error))
            else:
                values[name] = value
    return values


def question(name: str) -> str:
    """What is asked for a field: its name, and what it is."""
    return f"{name}: {Recipe.model_fields[name].description}"


def write_recipe(values: Mapping[str, Any], path: Path) -> Recipe:
    """Write these fields, each with what it is, and return the recipe that they make.

    Raises:
        RecipeError: they make none, or a file is there already.
    """
    if path.exists():
        raise RecipeError(f"{path}: expected a new file, found one that is there; choose another name")
    recipe = recipes.parse(values, source=str(path))
    lines = (f"{name}: {_plain(value)}  # {Recipe.model_fields[name].description}" for name, value in values.items())
    write_file(path, "".join(line + "\n" for line in lines).encode())
    return recipe


def _plain(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.strip().removesuffix("\n...")
