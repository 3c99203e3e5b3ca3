"""The forms that a record of training data comes in, read off its fields, and each brought into what TRL takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rankwise.errors import DataError

Record = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One form that training data comes in.

    Attributes:
        fields: the fields that make a record of this form.
        normalise: (record, where it stands) → the record as TRL takes it.
        loss: the fields of `SFTConfig` that take the loss where it belongs.
    """

    fields: tuple[str, ...]
    normalise: Callable[[Record, str], Record]
    loss: Mapping[str, bool] = field(default_factory=dict)


def _messages(record: Record, place: str) -> Record:
    messages = _chat(record["messages"], f"{place}: messages")
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{place}: messages: expected at least one message of the assistant to learn from, found none.")
    return {"messages": messages}


def _prompt_completion(record: Record, place: str) -> Record:
    take = _string if isinstance(record["prompt"], str) else _chat
    return {key: take(record[key], f"{place}: {key}") for key in ("prompt", "completion")}


def _text(record: Record, place: str) -> Record:
    return {"text": _string(record["text"], f"{place}: text")}


def _alpaca(record: Record, place: str) -> Record:
    """Stanford Alpaca's own prompt."""
    instruction, answer = (_string(record[key], f"{place}: {key}") for key in ("instruction", "output"))
    input_text = _string(record.get("input") or "", f"{place}: input")
    context, input_part = (", paired with an input that provides further context", f"### Input:\n{input_text}\n\n")
    prompt = (
        f"Below is an instruction that describes a task{context if input_text else ''}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{input_part if input_text else ''}### Response:\n"
    )
    return {"prompt": prompt, "completion": answer}


def _classification(record: Record, place: str) -> Record:
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise wrong_type(f"{place}: label", "a whole number or a string", label)
    pair = record.get("text_pair")
    return {
        "text": _string(record["text"], f"{place}: text"),
        "text_pair": None if pair is None else _string(pair, f"{place}: text_pair"),
        "label": label,
    }


# In the order in which they are looked for: `text` is last, since the others often bring one along.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages, {"assistant_only_loss": True}),
    "prompt-completion": Format(("prompt", "completion"), _prompt_completion, {"completion_only_loss": True}),
    "alpaca": Format(("instruction", "output"), _alpaca, {"completion_only_loss": True}),
    "classification": Format(("text", "label"), _classification),
    "text": Format(("text",), _text),
}


def detect(record: Record, place: str) -> str:
    """The form of a record, by its fields."""
    for name, form in FORMATS.items():
        if all(key in record for key in form.fields):
            return name
    known = "; ".join(f"{name} ({', '.join(form.fields)})" for name, form in FORMATS.items())
    raise DataError(f"{place}: expected the fields of a known form: {known}. Found the fields {fields_of(record)}.")


def normalised(name: str, record: Record, place: str) -> Record:
    """A record of a form as TRL takes it."""
    form = FORMATS[name]
    if missing := [key for key in form.fields if key not in record]:
        raise DataError(
            f"{place}: expected the fields {', '.join(form.fields)} of the {name} form, found {fields_of(record)}: "
            f"{', '.join(missing)} is missing."
        )
    return form.normalise(record, place)


def same_types(first: Record, record: Record, first_place: str, place: str) -> None:
    """A field is of one type throughout: text or a chat, numbered or named labels."""
    for key, value in record.items():
        expected, actual = (_TYPES[type(item)] for item in (first[key], value))
        if actual != expected:
            raise DataError(f"{place}: {key}: expected {expected}, as in {first_place}, found {actual}.")


_TYPES: dict[type, str] = {
    str: "a string",
    list: "a list of messages",
    int: "a whole number",
    type(None): "nothing",
}


def _chat(value: Any, place: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise wrong_type(place, "a list of messages, at least one", value)
    return [_message(message, f"{place}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, place: str) -> dict[str, str]:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        raise wrong_type(place, 'an object with exactly "role" and "content"', value)
    return {key: _string(value[key], f"{place}.{key}") for key in ("role", "content")}


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(place, "a string", value)
    return value


def wrong_type(place: str, expected: str, value: Any) -> DataError:
    """The error for a value of another type."""
    return DataError(f"{place}: expected {expected}, found {type(value).__name__}: {shortened(value)}.")


def fields_of(record: Record) -> str:
    """A record's fields, for a message."""
    return ", ".join(record) or "(none)"


def shortened(value: Any) -> str:
    """A value, for a message."""
    text = repr(value.strip() if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
