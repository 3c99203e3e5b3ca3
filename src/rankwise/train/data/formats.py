"""The forms that a record of training data comes in, read off its fields, and each brought into one of a few.

A conversation (``messages``, with ``tools``, ``chat_template_kwargs`` and ``given``, the number of messages that are a
prompt), a ``prompt`` with its ``completion``, a ``text``, or a text with its ``label``. A preference is the chosen one
of two such samples with the end of the other under ``rejected``; or one sample with a ``desirable`` of 1 or 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.errors import DataError
from rankwise.train.data.files import Record
from rankwise.train.data.messages import MEDIA, conversation, shortened, text_of, turns_of_pairs, wrong_type
from rankwise.train.data.shared_prompt import with_prompt


@dataclass(frozen=True)
class Format:
    """One form that training data comes in.

    Attributes:
        fields: the fields that make a record of this form.
        normalise: (record, where it stands) → the record as it is tokenised.
        optional: further fields that it reads.
        refused: fields that change what a sample means, and have no place in this form.
    """

    fields: tuple[str, ...]
    normalise: Callable[[Record, str], Record]
    optional: tuple[str, ...] = ()
    refused: tuple[str, ...] = MEDIA


def _messages(record: Record, place: str) -> Record:
    return conversation(record, record["messages"], f"{place}: messages", place)


def _sharegpt(record: Record, place: str) -> Record:
    return conversation(record, record["conversations"], f"{place}: conversations", place)


def _prompt_completion(record: Record, place: str) -> Record:
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, str):
        return conversation(record, prompt, f"{place}: prompt", place, completion)
    _refuse(record, (*_TEMPLATE, "system"), "needs a prompt that is a list of messages", place)
    return {"prompt": prompt, "completion": text_of(completion, f"{place}: completion")}


def _text(record: Record, place: str) -> Record:
    return {"text": text_of(record["text"], f"{place}: text")}


def _alpaca(record: Record, place: str) -> Record:
    """Stanford Alpaca's own prompt; ``system`` stands in place of its first sentences, ``history`` before the task."""
    instruction, answer = (text_of(record[key], f"{place}: {key}") for key in ("instruction", "output"))
    input_text, system = (text_of(record.get(key) or "", f"{place}: {key}") for key in ("input", "system"))
    context = ", paired with an input that provides further context" if input_text else ""
    head = system or (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request."
    )
    before = turns_of_pairs(record.get("history") or [], f"{place}: history")
    tasks = [_task(asked, "") + f"{answered}\n\n" for asked, answered in before] + [_task(instruction, input_text)]
    return {"prompt": f"{head}\n\n" + "".join(tasks), "completion": answer}


def _task(instruction: str, input_text: str) -> str:
    input_part = f"### Input:\n{input_text}\n\n" if input_text else ""
    return f"### Instruction:\n{instruction}\n\n{input_part}### Response:\n"


def _classification(record: Record, place: str) -> Record:
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise wrong_type(f"{place}: label", "a whole number or a string", label)
    pair = record.get("text_pair")
    return {
        "text": text_of(record["text"], f"{place}: text"),
        "text_pair": None if pair is None else text_of(pair, f"{place}: text_pair"),
        "label": label,
    }


def _preference(record: Record, place: str) -> Record:
    """The sample with the chosen answer, and the rejected one beside it."""
    pair = with_prompt(record, place)
    chosen, rejected = (
        _prompt_completion({**pair, "completion": pair[name]}, f"{place}: {name}") for name in ("chosen", "rejected")
    )
    if chosen.keys() != rejected.keys():
        raise wrong_type(f"{place}: rejected", "an answer of the same kind as the chosen one", record["rejected"])
    return {**chosen, "rejected": rejected["messages"] if "messages" in rejected else rejected["completion"]}


def _unpaired_preference(record: Record, place: str) -> Record:
    label = record["label"]
    if label not in (0, 1):
        raise wrong_type(f"{place}: label", "true, of a desirable completion, or false", label)
    return {**_prompt_completion(record, place), "desirable": int(label)}


def _prompt(record: Record, place: str) -> Record:
    """What is asked, and all else that the record holds, for the reward to see."""
    fields = {name: value for name, value in record.items() if name not in ("prompt", *_TEMPLATE, "system")}
    kept = json.dumps(fields, ensure_ascii=False)
    if isinstance(record["prompt"], str):
        _refuse(record, (*_TEMPLATE, "system"), "needs a prompt that is a list of messages", place)
        return {"prompt": record["prompt"], "fields": kept}
    return {**conversation(record, record["prompt"], f"{place}: prompt", place, asks=True), "fields": kept}


_TEMPLATE = ("tools", "functions", "chat_template_kwargs")  # what a chat template is given beside the messages

# In the order in which they are looked for, but for those that a task asks for first: of what is no preference, `text`
# is last, since the others often bring one along.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages, (*_TEMPLATE, "system")),
    "sharegpt": Format(("conversations",), _sharegpt, (*_TEMPLATE, "system")),
    "prompt-completion": Format(
        ("prompt", "completion"), _prompt_completion, (*_TEMPLATE, "system"), (*MEDIA, "history")
    ),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "system", "history"), (*MEDIA, *_TEMPLATE)),
    "classification": Format(("text", "label"), _classification, ("text_pair",)),
    "text": Format(("text",), _text),  # it is all there is, whatever messages and tools it was made of
    "preference": Format(
        ("chosen", "rejected"), _preference, ("prompt", *_TEMPLATE, "system"), (*MEDIA, "history", "margin")
    ),
    "prompt": Format(("prompt",), _prompt, (*_TEMPLATE, "system")),
    "unpaired-preference": Format(
        ("prompt", "completion", "label"), _unpaired_preference, (*_TEMPLATE, "system"), (*MEDIA, "history")
    ),
}


def detect(record: Record, place: str, first: Sequence[str] = ()) -> str:
    """The form of a record, by its fields; the names in ``first`` are looked for before the others."""
    for name in (*first, *FORMATS):
        if all(key in record for key in FORMATS[name].fields):
            return name
    known = "; ".join(f"{name} ({', '.join(form.fields)})" for name, form in FORMATS.items())
    raise DataError(f"{place}: expected the fields of a known form: {known}. Found the fields {fields_of(record)}.")


def normalised(name: str, record: Record, place: str) -> Record:
    """A record of a form as it is tokenised.

    Raises:
        DataError: a field is missing, is of another type, or has a meaning that this form has no place for.
    """
    form = FORMATS[name]
    if missing := [key for key in form.fields if key not in record]:
        raise DataError(
            f"{place}: expected the fields {', '.join(form.fields)} of the {name} form, found {fields_of(record)}: "
            f"{', '.join(missing)} is missing."
        )
    _refuse(record, form.refused, f"has no place in the {name} form", place)
    return form.normalise(record, place)


def unread_fields(name: str, record: Record) -> list[str]:
    """The fields that a form does not look at, such as a number or a source."""
    return [key for key in record if key not in FORMATS[name].fields + FORMATS[name].optional]


def _refuse(record: Record, names: tuple[str, ...], why: str, place: str) -> None:
    """Refuse what would be dropped though it changes what a sample means; an empty field has no meaning."""
    for name in names:
        if record.get(name):
            raise DataError(
                f"{place}: {name}: found {shortened(record[name])}, which {why}: expected a sample that loses nothing. "
                "Bring it into the messages form, or take the field out."
            )


def same_types(first: Record, record: Record, first_place: str, place: str) -> None:
    """A field is of one type throughout: text or a chat, numbered or named labels."""
    if first.keys() != record.keys():
        kinds = ["messages" if "messages" in each else "a string" for each in (first, record)]
        raise DataError(f"{place}: prompt: expected {kinds[0]}, as in {first_place}, found {kinds[1]}.")
    for key in record.keys() - {*_TEMPLATE, "given"}:
        expected, actual = (_TYPES[type(item)] for item in (first[key], record[key]))
        if actual != expected:
            raise DataError(f"{place}: {key}: expected {expected}, as in {first_place}, found {actual}.")


_TYPES: dict[type, str] = {
    str: "a string",
    list: "a list of messages",
    int: "a whole number",
    type(None): "nothing",
}


def fields_of(record: Mapping[str, Any]) -> str:
    """A record's fields, for a message."""
    return ", ".join(record) or "(none)"
