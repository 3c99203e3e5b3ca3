"""What scores a model's answers for `task: grpo`: a check that is built in, or a function in a Python file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from inspect import isfunction
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, RecipeError
from rankwise.train.data import scores

# (prompts, completions, the records' other fields by name, a list each) → a reward for each completion.
Reward = Callable[..., Sequence[float | None]]


def exact(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the answer, between ``<answer>`` marks if it has them, is the record's word for word."""
    return [scores.exact([_said(text)], [known]) for text, known in zip(completions, answer, strict=True)]


def number(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where its last number is that of the record's answer."""
    return [scores.number([_said(text)], [known]) for text, known in zip(completions, answer, strict=True)]


def reasoning_gym(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    **_: Any,
) -> list[float]:
    """The score that the task itself gives an answer, from 0 to 1."""
    from reasoning_gym import get_score_answer_fn

    samples = zip(prompts, completions, answer, metadata, strict=True)
    return [
        float(
            get_score_answer_fn(facts["source_dataset"])(
                _said(text), {"question": asked, "answer": known, "metadata": facts}
            )
        )
        for asked, text, known, facts in samples
    ]


REWARDS: dict[str, Reward] = {"exact": exact, "number": number, "reasoning-gym": reasoning_gym}


def _said(completion: str) -> str:
    return completion.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def load_reward(name: str) -> Reward:
    """A reward by its name in `REWARDS`, or the function ``reward`` of a Python file, whose code is run.

    Raises:
        RecipeError: no such file, or none that can be run, or no such function in it.
    """
    if name in REWARDS:
        return REWARDS[name]
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise RecipeError(
            f"`reward`: expected one of {', '.join(REWARDS)}, or a Python file with a function reward(prompts, "
            f"completions, **fields), found {name!r}"
        )
    spec = importlib.util.spec_from_file_location("rankwise_reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is a program, and can fail in any way
        raise RecipeError(f"`reward`: {path} cannot be run: {type(error).__name__}: {error}") from error
    function = vars(module).get("reward")
    if not isfunction(function):
        raise RecipeError(f"`reward`: {path}: expected a function reward(prompts, completions, **fields), found none")
    found: Reward = function
    return found


def on_fields(reward: Reward) -> Reward:
    """The same, called as TRL does, with each record's other fields as JSON in ``fields``."""

    def rewarded(prompts: Sequence[str], completions: Sequence[str], fields: Sequence[str], **_: Any) -> Any:
        rows = [json.loads(text) for text in fields]
        columns = {name: [row.get(name) for row in rows] for name in rows[0]}
        return reward(prompts=prompts, completions=completions, **columns)

    return rewarded


def check_reward(reward: Reward, prompt: str, fields: str, place: str) -> None:
    """Call a reward once, for it to fail before the run does.

    Raises:
        DataError: it fails, or returns anything but a number.
    """
    try:
        found = list(on_fields(reward)([prompt], ["an answer"], [fields]))
    except Exception as error:  # it is a program, and can fail in any way
        raise DataError(
            f"{place}: the reward fails on it: {type(error).__name__}: {error}. It is called with prompts, completions "
            f"and the record's other fields ({', '.join(json.loads(fields)) or 'none'}), a list each."
        ) from error
    if len(found) != 1 or not (found[0] is None or isinstance(found[0], int | float)):
        raise DataError(f"{place}: expected of the reward a list with a number for each completion, found {found!r}.")
