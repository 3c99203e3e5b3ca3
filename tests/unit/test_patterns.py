"""Regular expressions over module names: what `re` would match, and never for longer than a few seconds."""

import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zoo import left_as_it_was, zoo_and_inputs

import rankwise as rw
from rankwise.errors import SpecError, TargetError
from rankwise.patterns import matching, matching_ends

NAMES = [
    "",
    "a",
    "a.b",
    "a.b.c",
    "aXb",
    "b",
    "c.a",
    "ab",
    "layers.0.q_proj",
    "layers.10.q_proj",
    "layers.0.k-proj",
    "ä.b",
]
pieces = st.sampled_from(["a", "b", "c", "q_proj", "layers", "0", "ä", r"\.", ".", "^", "$", "|", r"\-", "-", " "])


@given(st.lists(pieces, min_size=1, max_size=6).map("".join))
def test_without_repetition_it_is_what_re_says(expression: str):
    assert matching("f", expression, NAMES) == {n for n in NAMES if re.fullmatch(expression, n)}
    ends = matching_ends("f", [expression], NAMES)[expression]
    assert ends == {n for n in NAMES if re.match(rf"(.*\.)?({expression})$", n)}


@pytest.mark.parametrize("expression", [r".*\.(q|k)_proj", r"layers\.[0-9]+\..*", "(a|b)", r"\w+", "(?i:A)", r"(a)\1?"])
def test_with_repetition_and_groups_too(expression: str):
    assert matching("f", expression, NAMES) == {n for n in NAMES if re.fullmatch(expression, n)}
    # Alone: PEFT's form puts two groups around it, so a number in it counts from there.
    ends = matching_ends("f", [expression, "q_proj"], NAMES)
    assert ends[expression] == {n for n in NAMES if re.match(rf"(.*\.)?({expression})$", n)}
    assert ends["q_proj"] == {"layers.0.q_proj", "layers.10.q_proj"}


def test_many_escaped_names_are_looked_up():
    names = [f"layers.{layer}.experts.{expert}.up_proj" for layer in range(60) for expert in range(128)]
    before = time.process_time()
    assert matching("f", "|".join(map(re.escape, names)), names) == set(names)
    found = matching_ends("f", [f"^{re.escape(name)}" for name in names], names)
    assert all(found[f"^{re.escape(name)}"] == {name} for name in names)
    assert time.process_time() - before < 2  # seven thousand expressions on as many names


HANGING = ["(a+)+$", "(a|a)*b", "(.*)*x", "(?:a|aa)+$", "(?:a?){60}a{60}b"]


@pytest.mark.parametrize("expression", HANGING)
def test_one_that_would_take_forever_is_stopped(expression: str):
    before = time.monotonic()
    with pytest.raises(
        TargetError, match=r"^f '.*': not done with 2 module names after 2 s.*simplify it, or give a list"
    ):
        matching("f", expression, ["b", "a" * 60 + "!"])
    assert time.monotonic() - before < 10  # two seconds of computing; on a busy machine they last longer


@pytest.mark.parametrize("expression", ["(", "a{2", "*a", "(?P<x>a", "(" * 5000, "a{99999999999999}", "[b-a]", "(?i)a"])
def test_one_that_is_none_is_said(expression: str):
    try:
        re.compile(rf"(.*\.)?({expression})")
    except (re.error, RecursionError, OverflowError):
        with pytest.raises(TargetError, match=r"^f '.*' is not a regular expression: ."):
            matching_ends("f", [expression], NAMES)
    else:
        assert expression == "a{2"  # which stands for itself


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.*)*!"},
        {"target_modules": ["linear"], "exclude_modules": "(.*)*!"},
        {"target_modules": ["linear"], "rank_pattern": {"(.*)*!": 4}},
        {"target_modules": ["linear"], "alpha_pattern": {"(.*)*!": 4}},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_a_spec_with_such_a_pattern_is_refused_and_the_model_left_alone(fields: dict[str, Any]):
    zoo, _ = zoo_and_inputs(names=["linear"])
    zoo.add_module("a" * 60, zoo.linear.__class__(2, 2))
    spec = rw.LoRA(rank=2, **fields)
    field = list(fields)[-1]
    if field.endswith("_pattern"):  # these are matched against what is adapted only
        spec = rw.LoRA(rank=2, **{**fields, "target_modules": ["linear", "a" * 60]})
    with left_as_it_was(zoo), pytest.raises(TargetError, match=rf"{field}.*not done with \d+ module names after 2 s"):
        rw.plan(zoo, spec)


def test_a_pattern_that_is_none_is_refused_by_the_spec():
    with pytest.raises(SpecError, match=r"rank_pattern key '\(\?i\)a' is not a regular expression"):
        rw.LoRA(rank_pattern={"(?i)a": 4})
    with pytest.raises(SpecError, match=r"alpha_pattern key 3 is not a regular expression"):
        rw.LoRA(alpha_pattern={3: 4})  # type: ignore[dict-item]
