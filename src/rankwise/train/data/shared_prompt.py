"""The prompt of a preference: a field of its own, or what both answers begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankwise.errors import DataError
from rankwise.train.data.messages import shortened, wrong_type


def with_prompt(record: dict[str, Any], place: str) -> dict[str, Any]:
    """A record whose ``prompt``, ``chosen`` and ``rejected`` follow on each other.

    TRL's forms: texts or lists of messages; without a prompt, both answers begin with it. As in UltraFeedback, a prompt
    that is a text may also stand beside whole conversations, whose message it then is.

    Raises:
        DataError: answers of two kinds, without a beginning in common, or that a prompt does not belong to.
    """
    chosen, rejected = record["chosen"], record["rejected"]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(answer, str | list) or answer == []:
            raise wrong_type(f"{place}: {name}", "a text, or a list of messages", answer)
    if type(chosen) is not type(rejected):
        raise wrong_type(f"{place}: rejected", f"a {type(chosen).__name__}, as the chosen answer is", rejected)
    prompt = record.get("prompt")
    if isinstance(chosen, str):
        return record if prompt is not None else {**record, **_split_texts(chosen, rejected)}
    if isinstance(prompt, list):
        return record
    split = _split_messages(chosen, rejected)
    if not split["prompt"]:
        raise DataError(
            f"{place}: expected chosen and rejected to begin with the same messages, the prompt, and to go on with an "
            f"answer each, found {shortened(chosen)} and {shortened(rejected)}. Give the prompt in a field of its own."
        )
    if prompt is not None and prompt not in [message.get("content") for message in split["prompt"]]:
        raise DataError(
            f"{place}: prompt: expected a message that chosen and rejected begin with, or a list of messages that they "
            f"answer, found {shortened(prompt)}."
        )
    return {**record, **split}


def _split_texts(chosen: str, rejected: str) -> dict[str, str]:
    """Up to the first difference; a space before it belongs to the answer, as tokenizers have it."""
    shared = chosen[: _shared(chosen, rejected)]
    prompt = shared.removesuffix(" ")
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _split_messages(chosen: list[Any], rejected: list[Any]) -> dict[str, list[Any]]:
    """Up to the first message that differs; the last of each is an answer."""
    turn = min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    return {"prompt": chosen[:turn], "chosen": chosen[turn:], "rejected": rejected[turn:]}


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How much of one the other begins with too."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
