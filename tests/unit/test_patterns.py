"""Regular expressions over module names: what `re` would match, and never for longer than a few seconds."""

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import left_as_it_was, zoo_and_inputs

import rankwise as rw
from rankwise.automaton import matches
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


@pytest.mark.parametrize(
    "expression",
    [r".*\.(q|k)_proj", r"layers\.[0-9]+\..*", "(a|b)", r"\w+", "(?i:A)", r"(?a:\w)\.b", r"(?s:a.)|(?m:^a$)",
     r"(?!.*layers).*", r"(?=.*q_)(?!.*\.0\.).*proj", r".*(?<=\.)b(?!\.).*", r"(?<!b)a?", r"\ba\b.*", r".*\B.*"],
)  # fmt: skip
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


atoms = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", "", "^", "$", r"\b"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{0,2}", "{1,}"])).map(
            lambda of: f"(?:{of[0]}){of[1]}"
        ),
        st.tuples(st.sampled_from(["?=", "?!", "?i:", "?s-i:"]), inner).map(lambda of: f"({of[0]}{of[1]})"),
    ),
    max_leaves=8,
)


@given(expressions)
@settings(max_examples=500)
def test_random_expressions_match_what_re_matches(expression: str):
    names = ["", "a", "b", ".", "ab", "ba", "a.b", "aab", "bb.a", "A", "a\n", "ä"]
    (answer,) = matches([expression], names)
    assert answer == [number for number, name in enumerate(names) if re.fullmatch(expression, name)]


@pytest.mark.parametrize("expression", [r"(a)\1", "(?>a)", "a++", "(?(1)a|b)()"])
def test_what_needs_backtracking_is_refused_by_name(expression: str):
    with pytest.raises(TargetError, match=r"is not a regular expression: .* is not read here"):
        matching("f", expression, NAMES)


HANGING = ["(a+)+$", "(a|a)*b", "(.*)*x", "(?:a|aa)+$", "(?:a?){60}a{60}b"]


@pytest.mark.parametrize("expression", HANGING)
def test_one_that_would_take_forever_is_answered(expression: str):
    """What `re` says of names of 12 letters, where it still ends, holds for 60: each tells the two ends apart."""
    before = time.process_time()
    for end in ("", "!", "b"):
        (short,) = matches([expression.replace("60", "12")], ["a" * 12 + end])
        assert bool(short) == bool(re.fullmatch(expression.replace("60", "12"), "a" * 12 + end))
        assert matching("f", expression, ["a" * 60 + end]) == ({"a" * 60 + end} if short else set())
    assert time.process_time() - before < 1


TOO_LONG = {"states": "(?:(?:a{100}){100}){100}", "steps": "(?:(?!x)a?){5000}b", "letters": "(?:a|b)" * 200_000}


@pytest.mark.parametrize("expression", TOO_LONG.values(), ids=TOO_LONG)
def test_one_that_takes_too_many_steps_is_stopped_at_the_same_one_on_every_machine(
    expression: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rankwise.automaton.STEPS", 10**6)  # the tests' checks of types make each a slow one
    names = ["a" * 60 + str(number) for number in range(99)]
    with pytest.raises(
        TargetError, match=r"^f '.*': not done with 99 module names after 10,000,000 steps.*give a list"
    ):
        matching("f", expression, names)


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
        {"target_modules": TOO_LONG["states"]},
        {"target_modules": ["linear"], "exclude_modules": TOO_LONG["states"]},
        {"target_modules": ["linear"], "rank_pattern": {TOO_LONG["states"]: 4}},
        {"target_modules": ["linear"], "alpha_pattern": {TOO_LONG["states"]: 4}},
    ],
    ids=lambda fields: list(fields)[-1],
)
def test_a_spec_with_such_a_pattern_is_refused_and_the_model_left_alone(fields: dict[str, Any]):
    zoo, _ = zoo_and_inputs(names=["linear"])
    field = list(fields)[-1]
    with (
        left_as_it_was(zoo),
        pytest.raises((SpecError, TargetError), match=rf"{field}.*not done with \d+ module names"),
    ):
        rw.plan(zoo, rw.LoRA(rank=2, **fields))


def test_a_pattern_that_is_none_is_refused_by_the_spec():
    with pytest.raises(SpecError, match=r"rank_pattern key '\(\?i\)a' is not a regular expression"):
        rw.LoRA(rank_pattern={"(?i)a": 4})
    with pytest.raises(SpecError, match=r"alpha_pattern key 3 is not a regular expression"):
        rw.LoRA(alpha_pattern={3: 4})  # type: ignore[dict-item]
