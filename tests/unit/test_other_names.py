"""Other libraries' names for our fields are told in the message; each leads to one that is there."""

import copy
import re

import pytest

from rankwise import LoRA
from rankwise.errors import RecipeError, SpecError
from rankwise.other_names import ADAPTER, RUN
from rankwise.train import recipe as recipes
from rankwise.train.recipe import Recipe

SHORTEST = {"model": "smollm2-135m", "data": "kjv"}


@pytest.mark.parametrize("name", ADAPTER)
def test_an_adapters(name):
    with pytest.raises(SpecError, match=re.escape(f"LoRA has no field {name!r}; here it is `{ADAPTER[name]}`")):
        LoRA(**{name: 1})


@pytest.mark.parametrize("name", RUN)
def test_a_runs(name):
    assert name not in Recipe.model_fields
    with pytest.raises(RecipeError, match=f"`{name}` is not a field of a recipe; here it is .*{re.escape(RUN[name])}"):
        recipes.parse({**SHORTEST, name: 1})


def test_what_is_told_can_be_written():
    for told in {text for text in RUN.values() if " " not in text or ":" in text}:
        name, _, value = told.partition(": ")
        assert name in Recipe.model_fields
        if value:
            recipes.parse({**SHORTEST, name: recipes.flag_value(name, value)})


def test_an_unknown_name_has_a_near_one_or_none():
    with pytest.raises(SpecError, match="LoRA has no field 'rankk'; did you mean 'rank'"):
        LoRA(rankk=8)
    with pytest.raises(RecipeError, match=r"is not a field of a recipe\. Did you mean `rank`"):
        recipes.parse({**SHORTEST, "rankk": 8})


def test_a_spec_can_still_be_copied():
    spec = LoRA(rank=2)
    assert copy.deepcopy(spec) == spec


@pytest.mark.parametrize(("short", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_short_names_of_a_precision(short, dtype):
    assert recipes.parse({**SHORTEST, "dtype": short}).dtype == dtype
